"""Laws of a normalizer: shapes and digits are kept, rows are apart, and what is declared holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from atn_norms.assorted_time import AssortedTime
from atn_norms.normalizers import feature_moments
from atn_norms.statistics import statistics_dtype
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.laws.statistic import without_statistic
from atn_norms.testing.subjects import NormalizerSubject, noise

CLOSE = 1e-9  # float64, sums of at most a few dozen terms: 1e-13 is due
SEEN = 1e-6  # what must change does so by far more than rounding can


@law("normalizer")
def shapes_are_kept(subject: NormalizerSubject, case: Case) -> None:
    """A statement has every leading axis of `x` and more, the output has the shape of `x`, with a batch of 1 too.

    `x` comes as `[B, D]` and as `[T, B, D]`. A squeezed axis of length 1 is right until the first batch of one row, and
    then broadcasts into nonsense without an error.
    """
    for training in (True, False):
        normalizer = subject.normalizer(case).train(training)
        batch = case.batch if training and subject.couples else 1
        for leading in ((batch,), (case.steps, batch), (case.steps, case.batch)):
            x = noise(case.seed, *leading, case.features)
            said = normalizer.measure(x)
            for leaf in said:
                demand(
                    leaf.ndim >= x.ndim and leaf.shape[: x.ndim - 1] == x.shape[:-1],
                    f"x {list(x.shape)} is measured to a leaf {list(leaf.shape)}; allowed: {[*leading, '...']}",
                )
            y = normalizer.normalize(x, said)
            demand(y.shape == x.shape, f"x {list(x.shape)} is normalized to {list(y.shape)}")
        xs = noise(case.seed, case.steps, batch, case.features)
        ys, _ = AssortedTime(normalizer, case.window).scan(xs)
        demand(bool(ys.isfinite().all()), "the output of finite numbers is not finite")


@law("normalizer")
def the_dtype_is_kept(subject: NormalizerSubject, case: Case) -> None:
    """`normalize` gives no narrower a type than `x` has, and computes in none.

    It may keep a wider one: the type of `x` is restored once, at the end, which would also hide digits that were lost
    on the way. So `normalize` itself is called here, in every floating type, and float64 must see a change of 1e-9.
    """
    x = noise(case.seed, case.batch, case.features)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        normalizer = subject.normalizer(case).to(dtype)
        y = normalizer.normalize(x.to(dtype), normalizer.measure(x.to(dtype)))
        demand(
            y.is_floating_point() and torch.promote_types(y.dtype, dtype) == y.dtype,
            f"x of type {dtype} is normalized to {y.dtype}; allowed: {dtype} or wider",
        )
    normalizer, pooled = subject.normalizer(case), subject.normalizer(case).measure(x + 1)
    change = normalizer.normalize(x + 1e-9, pooled) - normalizer.normalize(x, pooled)
    demand(bool(change.any()), "normalize of float64 does not see a change of 1e-9: it computes in a narrower type")


@law("normalizer")
def float32_keeps_its_digits(subject: NormalizerSubject, case: Case) -> None:
    """Statements are made in float64, so that in float32 a level of 1e4 beside a spread of 1e-2 is normalized rightly.

    What is averaged over many steps and then subtracted must not have been rounded first: a mean of 1e4 in float32 is
    off by up to 5e-4, a twentieth of that spread. So `measure` must say of float32 what it says of the same
    numbers in float64. What is computed first and widened afterwards has lost its digits by then, or all of it: the
    square of 1e20 is infinite in float32, and that of 256 in float16.
    """
    normalizer, exact = subject.normalizer(case).float(), subject.normalizer(case).float().double()
    drawn = noise(case.seed, case.steps, case.batch, case.features)
    xs = (1e4 + 1e-2 * drawn).float()
    wide = statistics_dtype(xs.device)
    for x in (drawn.float(), xs):
        for leaf, other in zip(normalizer.measure(x), exact.measure(x.double()), strict=True):
            demand(leaf.dtype == wide, f"x of float32 is measured to a leaf of {leaf.dtype}; allowed: {wide}")
            largest = max(float(other.detach().abs().max()), 1e-30)
            compare(leaf, other.to(wide), tolerance=CLOSE, scale=largest, what="measured of float32 against float64")
    ys, _ = AssortedTime(normalizer, case.window).scan(xs)
    expected, _ = AssortedTime(exact, case.window).scan(xs.double())
    compare(ys.double(), expected, tolerance=1e-5, what="float32 against float64")


@law("normalizer", unless=without_statistic)
def the_pooled_statement_is_used(subject: NormalizerSubject, case: Case) -> None:
    """What `normalize` gives depends on the pooled statement, not on `x` alone.

    One that measures `x` anew is right at a window of 1, and then every longer window does nothing at all. One that
    needs no statement, such as a fixed squashing function, fails here for a reason of its own: expect it, and say so.
    """
    x, other = noise(case.seed, 2, case.batch, case.features)
    normalizer = subject.normalizer(case)
    own, foreign = (normalizer.normalize(x, normalizer.measure(each)) for each in (x, 2 * other + 3))
    seen = float((own - foreign).detach().abs().max())
    demand(seen > SEEN, "normalize gives the same whatever was pooled: it may use x where it is to use pooled")


@law("normalizer", batch=(2, 3))
def rows_meet_only_as_declared(subject: NormalizerSubject, case: Case) -> None:
    """No row is seen by another, unless `uses_batch_statistics` is declared, and then rows are.

    A sample's output may not depend on what else is in its batch, and on another step by no other way than the window.
    One that couples the batch and `train_eval_differ` leaves rows alone in evaluation: one sample is a batch too.
    """
    normalizer = subject.normalizer(case).eval()
    xs = noise(case.seed, case.steps, case.batch, case.features)
    said = normalizer.measure(xs)
    for place in ((0, 1), (case.steps - 1, 0)):
        other = xs.clone()
        other[place] += 3 * noise(case.seed + 1, case.features)
        elsewhere = torch.ones(xs.shape[:2], dtype=torch.bool)
        elsewhere[place] = False
        for mine, theirs in zip(normalizer.measure(other), said, strict=True):
            compare(mine[elsewhere], theirs[elsewhere], tolerance=0, what="another row's own statement")
        mine, theirs = (normalizer.normalize(x, said)[elsewhere] for x in (other, xs))
        compare(mine, theirs, tolerance=0, what="another row, normalized with the same statements")
    for training in (False, True):
        normalizer.train(training)
        other = xs.clone()
        other[:, 1] += 3 * noise(case.seed + 1, case.steps, case.features)
        mine, theirs = (AssortedTime(normalizer, case.window).scan(x)[0][:, 0] for x in (other, xs))
        if subject.couples and (training or not subject.declares("train_eval_differ")):
            seen = float((mine - theirs).detach().abs().max())
            demand(seen > SEEN, "uses_batch_statistics is declared, and another row of the batch is not seen")
        else:
            compare(mine, theirs, tolerance=0, what="a row beside another one")


@law("normalizer", batch=(2, 3))
def evaluation_differs_only_as_declared(subject: NormalizerSubject, case: Case) -> None:
    """Training and evaluation compute the same, unless `train_eval_differ` is declared, and then they differ.

    A window's own statistic serves at both times. Whoever reads the declaration (a study, a person who streams) relies
    on it in both directions.
    """
    norm, (xs,) = subject.make(case), subject.inputs(case)
    training, _ = norm.train().scan(xs)
    evaluation, _ = norm.eval().scan(xs)
    if subject.declares("train_eval_differ"):
        seen = float((training - evaluation).detach().abs().max())
        demand(seen > SEEN, "train_eval_differ is declared, and evaluation computes what training does")
    else:
        compare(evaluation, training, tolerance=0, what="evaluation against training")


def _unless_declared(name: str) -> Callable[[NormalizerSubject], str | None]:
    return lambda subject: None if subject.declares(name) else f"{name} is not declared"


@law("normalizer", unless=_unless_declared("scale_invariant"))
def scale_invariance_holds(subject: NormalizerSubject, case: Case) -> None:
    """Declared `scale_invariant`, a whole sequence times d > 0 comes out the same (as eps goes to 0).

    It is what makes a site insensitive to the scale of its weights; method and documentation claim it by this name.
    """
    norm, xs = subject.make(case), 1e6 * subject.inputs(case)[0]  # so large that no sensible eps is seen
    expected, _ = norm.scan(xs)
    level = max(1e-3, float(expected.detach().abs().max()))
    for d in (0.5, 3.0):
        compare(norm.scan(d * xs)[0], expected, tolerance=1e-5, scale=level, what=f"the sequence times {d}")


@law("normalizer", unless=_unless_declared("shift_invariant"))
def shift_invariance_holds(subject: NormalizerSubject, case: Case) -> None:
    """Declared `shift_invariant`, a whole sequence plus one number comes out the same, with a number of a million too.

    A variance as the mean square less the squared mean keeps the law on paper and loses its digits here.
    """
    norm, (xs,) = subject.make(case), subject.inputs(case)
    expected, _ = norm.scan(xs)
    for level in (2.0, 1e6):
        # 1e6 + x is itself rounded by 1e-10; a spread of sqrt(eps) magnifies that some 300 times
        compare(norm.scan(xs + level)[0], expected, tolerance=1e-6, what=f"the sequence plus {level:g}")


@law("normalizer", unless=_unless_declared("permutation_equivariant"))
def feature_order_does_not_matter(subject: NormalizerSubject, case: Case) -> None:
    """Declared `permutation_equivariant`, permuting the features permutes the output, gain and shift apart.

    Features of one gate have no order, so a normalizer that gives them one should say so by not declaring this.
    """
    normalizer, (xs,) = subject.normalizer(case, stir=False), subject.inputs(case)
    norm = AssortedTime(normalizer, case.window)
    order = torch.randperm(case.features, generator=torch.Generator().manual_seed(case.seed))
    compare(norm.scan(xs[..., order])[0], norm.scan(xs)[0][..., order], tolerance=CLOSE, what="permuted features")


@law("normalizer")
def flat_rows_stay_finite(subject: NormalizerSubject, case: Case) -> None:
    """Rows of zeros, and of one number, have a finite output and a finite gradient.

    They are common: without biases the first recurrent pre-activation is exactly 0, and so is padding. A square root
    has an infinite slope at 0, which is why eps belongs inside the root.
    """
    norm, (xs,) = subject.make(case), subject.inputs(case)
    for value in (0.0, 3.7):
        flat = torch.full_like(xs, value).requires_grad_()
        ys, _ = norm.scan(flat)
        demand(bool(ys.isfinite().all()), f"rows of {value} have an output that is not finite")
        (gradient,) = torch.autograd.grad((ys * noise(case.seed + 1, *ys.shape)).sum(), flat)
        demand(bool(gradient.isfinite().all()), f"rows of {value} have a gradient that is not finite")


@law("normalizer", batch=(2, 3))
def a_state_dict_restores_it(subject: NormalizerSubject, case: Case) -> None:
    """Loaded into a fresh one, a state dict gives the same outputs, in training and in evaluation.

    A checkpoint holds nothing else: what a normalizer has learned or recorded is a parameter or a buffer.
    """
    norm = subject.make(case)
    for seed in (100, 200, 300):
        norm.train().scan(3 + 2 * noise(seed, case.steps, case.batch, case.features))
    torch.manual_seed(case.seed + 1)
    again = AssortedTime(subject.spec.build(case.features).double(), case.window)
    again.load_state_dict(norm.state_dict())
    for training in (False, True):
        pair = [module.train(training).scan(*subject.inputs(case))[0] for module in (again, norm)]
        compare(*pair, tolerance=0, what="restored, in " + ("training" if training else "evaluation"))


def _undeclared_moments(subject: NormalizerSubject) -> str | None:
    return None if feature_moments(subject.declared) is not None else "feature_moments declares nothing"


@law("normalizer", unless=_undeclared_moments)
def declared_feature_moments_hold(subject: NormalizerSubject, case: Case) -> None:
    """Declared by `feature_moments`, `measure` and `normalize` are exactly that formula.

    A fast backend computes the formula and never calls the methods, so a variance divided by D - 1, or an eps outside
    the root, would give other numbers in C than in Python.
    """
    normalizer = subject.normalizer(case)
    declared = feature_moments(normalizer)
    demand(declared is not None, "feature_moments declares nothing for some number of features")
    assert declared is not None
    x = noise(case.seed, case.batch, case.features)
    grouped = x.unflatten(-1, (declared.groups, -1))
    mean = grouped.mean(-1) if declared.centred else torch.zeros(grouped.shape[:-1], dtype=torch.float64)
    var = (grouped - mean.unsqueeze(-1)).square().mean(-1)
    leaf = (case.batch, *declared.leaf)
    expected = [each.reshape(leaf) for each in ([mean, var] if declared.centred else [var])]
    said = normalizer.measure(x)
    compare([each.detach() for each in said], expected, tolerance=CLOSE, what="the statement")
    y = ((grouped - mean.unsqueeze(-1)) / (var + declared.eps).sqrt().unsqueeze(-1)).flatten(-2)
    y = y if declared.gain is None else y * declared.gain
    y = y if declared.shift is None else y + declared.shift
    compare(normalizer.normalize(x, said), y, tolerance=CLOSE, what="the output")
