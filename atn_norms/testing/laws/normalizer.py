"""Laws of a normalizer: shapes and precision are kept, rows are independent, and declarations hold."""

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

CLOSE = 1e-9  # float64: sums of a few dozen terms are exact to 1e-13
ROWS = 32  # pooled into one statistic, so that one feature has a deviation too
SEEN = 1e-6  # a required change is far larger than any rounding error


@law("normalizer")
def shapes_are_kept(subject: NormalizerSubject, case: Case) -> None:
    """A statistic has every leading axis of `x`, the output has the shape of `x`, also for a batch of 1.

    `x` has the shape `[B, D]` or `[T, B, D]`. A squeezed axis of length 1 is right until the first batch of one row.
    Then it broadcasts to wrong values without an error.
    """
    for training in (True, False):
        normalizer = subject.normalizer(case).train(training)
        batch = case.batch if training and subject.couples else 1
        for leading in ((batch,), (case.steps, batch), (case.steps, case.batch)):
            x = noise(case.seed, *leading, case.features)
            statistic = normalizer.measure(x)
            for leaf in statistic:
                demand(
                    leaf.ndim >= x.ndim and leaf.shape[: x.ndim - 1] == x.shape[:-1],
                    f"measure: got a leaf of shape {list(leaf.shape)}; expected {[*leading, '...']}",
                )
            y = normalizer.normalize(x, statistic)
            demand(y.shape == x.shape, f"normalize: got shape {list(y.shape)}; expected {list(x.shape)}, as x")
        xs = noise(case.seed, case.steps, batch, case.features)
        ys, _ = AssortedTime(normalizer, case.window).scan(xs)
        demand(bool(ys.isfinite().all()), "the output for finite input is not finite")


@law("normalizer")
def the_dtype_is_kept(subject: NormalizerSubject, case: Case) -> None:
    """`normalize` returns no narrower type than that of `x`, and computes in no narrower one.

    It may return a wider type: the caller casts once, at the end. That cast would also hide digits lost on the way, so
    the law calls `normalize` itself, in every floating type. In float64 a change of 1e-12 of `x` must change the result
    of some element, at one of several scales: a normalizer may saturate.
    """
    x = noise(case.seed, case.batch, case.features)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        normalizer = subject.normalizer(case).to(dtype)
        y = normalizer.normalize(x.to(dtype), normalizer.measure(x.to(dtype)))
        demand(
            y.is_floating_point() and torch.promote_types(y.dtype, dtype) == y.dtype,
            f"normalize: got {y.dtype}; expected {dtype} or a wider type for x of {dtype}",
        )
    normalizer, rows = subject.normalizer(case), noise(case.seed, ROWS, case.features)
    rows = rows.float().double()  # float32 rounds a changed number back to itself
    leaves = normalizer.measure(rows).pool(rows.new_ones(ROWS), 0)
    pooled = type(leaves)(*(leaf.expand(ROWS, *leaf.shape) for leaf in leaves))
    changed = [
        normalizer.normalize(scale * rows * (1 + 1e-12), pooled) != normalizer.normalize(scale * rows, pooled)
        for scale in (1.0, 2.0**-7, 2.0**4)
    ]
    seen = bool(torch.stack(changed).any())
    demand(seen, "normalize: in float64 a change of 1e-12 of x has no effect: it computes in a narrower type")


@law("normalizer")
def float32_keeps_its_digits(subject: NormalizerSubject, case: Case) -> None:
    """Statistics are computed in float64, so float32 input with mean 1e4 and spread 1e-2 is normalized correctly.

    A mean over many steps that is later subtracted must not be rounded first: a mean of 1e4 in float32 is off by up to
    5e-4, a twentieth of that spread. So `measure` must return the same for float32 input as for the same numbers in
    float64. Widening after the computation is too late: the square of 1e20 is infinite in float32, that of 256 in
    float16.
    """
    normalizer, exact = subject.normalizer(case).float(), subject.normalizer(case).float().double()
    drawn = noise(case.seed, case.steps, case.batch, case.features)
    xs = (1e4 + 1e-2 * drawn).float()
    wide = statistics_dtype(xs.device)
    for x in (drawn.float(), xs):
        for leaf, other in zip(normalizer.measure(x), exact.measure(x.double()), strict=True):
            demand(leaf.dtype == wide, f"measure: got a leaf of {leaf.dtype}; expected {wide} for x of float32")
            largest = max(float(other.detach().abs().max()), 1e-30)
            compare(
                leaf,
                other.to(wide),
                tolerance=CLOSE,
                scale=largest,
                what="the statistic of float32 and float64",
            )
    ys, _ = AssortedTime(normalizer, case.window).scan(xs)
    expected, _ = AssortedTime(exact, case.window).scan(xs.double())
    compare(ys.double(), expected, tolerance=1e-5, what="float32 compared with float64")


@law("normalizer", unless=without_statistic)
def the_pooled_statistic_is_used(subject: NormalizerSubject, case: Case) -> None:
    """The result of `normalize` depends on the pooled statistic, not on `x` alone.

    A `normalize` that measures `x` again is right for a window of 1, and then no longer window has any effect. A
    normalizer without a statistic, such as a fixed squashing function, declares `stateless = True`.
    """
    if case.features == 1 and len(subject.sizes) > 1:  # of one feature, a deviation from the mean is always 0
        case = case.but(features=subject.sizes[1])
    x, other = noise(case.seed, 2, case.batch, case.features)
    normalizer = subject.normalizer(case)
    own, foreign = (normalizer.normalize(x, normalizer.measure(each)) for each in (x, 2 * other + 3))
    seen = float((own - foreign).detach().abs().max())
    demand(seen > SEEN, "normalize: the result does not depend on pooled; it may use the statistic of x instead")


@law("normalizer", batch=(2, 3))
def rows_are_independent_unless_declared(subject: NormalizerSubject, case: Case) -> None:
    """No row depends on another row, unless `uses_batch_statistics` is declared; then it must.

    The output for a sample must not depend on the rest of its batch, and on other steps only through the window. With
    `train_eval_differ` declared too, rows are independent in evaluation: a batch may hold one sample.
    """
    normalizer = subject.normalizer(case).eval()
    xs = noise(case.seed, case.steps, case.batch, case.features)
    statistic = normalizer.measure(xs)
    for place in ((0, 1), (case.steps - 1, 0)):
        other = xs.clone()
        other[place] += 3 * noise(case.seed + 1, case.features)
        elsewhere = torch.ones(xs.shape[:2], dtype=torch.bool)
        elsewhere[place] = False
        for mine, theirs in zip(normalizer.measure(other), statistic, strict=True):
            compare(mine[elsewhere], theirs[elsewhere], tolerance=0, what="the statistic of another row")
        mine, theirs = (normalizer.normalize(x, statistic)[elsewhere] for x in (other, xs))
        compare(mine, theirs, tolerance=0, what="another row, normalized with the same statistics")
    for training in (False, True):
        normalizer.train(training)
        other = xs.clone()
        other[:, 1] += 3 * noise(case.seed + 1, case.steps, case.features)
        mine, theirs = (AssortedTime(normalizer, case.window).scan(x)[0][:, 0] for x in (other, xs))
        if subject.couples and (training or not subject.declares("train_eval_differ")):
            seen = float((mine - theirs).detach().abs().max())
            demand(seen > SEEN, "uses_batch_statistics is declared, and another row of the batch has no effect")
        else:
            compare(mine, theirs, tolerance=0, what="a row next to a changed one")


@law("normalizer", batch=(2, 3))
def evaluation_equals_training_unless_declared(subject: NormalizerSubject, case: Case) -> None:
    """Training and evaluation compute the same, unless `train_eval_differ` is declared; then they must differ.

    The statistic of a window serves in both modes. Studies and streaming code rely on the declaration in both
    directions.
    """
    norm, (xs,) = subject.make(case), subject.inputs(case)
    training, _ = norm.train().scan(xs)
    evaluation, _ = norm.eval().scan(xs)
    if subject.declares("train_eval_differ"):
        seen = float((training - evaluation).detach().abs().max())
        demand(seen > SEEN, "train_eval_differ is declared, and evaluation computes the same as training")
    else:
        compare(evaluation, training, tolerance=0, what="evaluation compared with training")


def _unless_declared(name: str) -> Callable[[NormalizerSubject], str | None]:
    return lambda subject: None if subject.declares(name) else f"{name} is not declared"


@law("normalizer", unless=_unless_declared("scale_invariant"))
def scale_invariance_holds(subject: NormalizerSubject, case: Case) -> None:
    """With `scale_invariant` declared, a whole sequence times d > 0 gives the same output (in the limit of eps 0).

    This property makes a site insensitive to the scale of its weights. The method and its documentation rely on it.
    """
    norm, xs = subject.make(case), 1e6 * subject.inputs(case)[0]  # so large that eps has no effect
    expected, _ = norm.scan(xs)
    level = max(1e-3, float(expected.detach().abs().max()))
    for d in (0.5, 3.0):
        compare(norm.scan(d * xs)[0], expected, tolerance=1e-5, scale=level, what=f"the sequence times {d}")


@law("normalizer", unless=_unless_declared("shift_invariant"))
def shift_invariance_holds(subject: NormalizerSubject, case: Case) -> None:
    """With `shift_invariant` declared, adding one number to a whole sequence does not change the output, up to 1e6.

    A variance computed as the mean square minus the squared mean is shift invariant in theory, and loses its digits
    here.
    """
    norm, (xs,) = subject.make(case), subject.inputs(case)
    expected, _ = norm.scan(xs)
    for level in (2.0, 1e6):
        # 1e6 + x has a rounding error of 1e-10; a spread of sqrt(eps) magnifies it some 300 times
        compare(norm.scan(xs + level)[0], expected, tolerance=1e-6, what=f"the sequence plus {level:g}")


@law("normalizer", unless=_unless_declared("permutation_equivariant"))
def feature_order_does_not_matter(subject: NormalizerSubject, case: Case) -> None:
    """With `permutation_equivariant` declared, permuting the features permutes the output, without gain and shift.

    The features of one gate have no order. A normalizer that depends on their order must not declare this property.
    """
    normalizer, (xs,) = subject.normalizer(case, stir=False), subject.inputs(case)
    norm = AssortedTime(normalizer, case.window)
    order = torch.randperm(case.features, generator=torch.Generator().manual_seed(case.seed))
    compare(norm.scan(xs[..., order])[0], norm.scan(xs)[0][..., order], tolerance=CLOSE, what="permuted features")


@law("normalizer")
def flat_rows_stay_finite(subject: NormalizerSubject, case: Case) -> None:
    """Rows of zeros, and rows of one constant, have a finite output and a finite gradient.

    Such rows are common: without biases the first recurrent pre-activation is exactly 0, and so is padding. A square
    root has an infinite slope at 0, so eps belongs inside the root.
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
    """A fresh normalizer with a loaded state dict gives the same outputs, in training and in evaluation.

    A checkpoint holds nothing else: everything that a normalizer learns or records is a parameter or a buffer.
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
    """`measure` and `normalize` compute exactly the formula that `feature_moments` declares.

    A fast backend computes the formula and never calls the methods. A variance divided by D - 1, or an eps outside the
    root, would give other numbers in C than in Python.
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
    statistic = normalizer.measure(x)
    compare([each.detach() for each in statistic], expected, tolerance=CLOSE, what="the statistic")
    eps = torch.tensor(declared.eps, dtype=torch.float64).reshape(-1)
    below = (var + eps.repeat_interleave(declared.groups // len(eps))).sqrt()
    y = ((grouped - mean.unsqueeze(-1)) / below.unsqueeze(-1)).flatten(-2)
    y = y if declared.gain is None else y * declared.gain
    y = y if declared.shift is None else y + declared.shift
    compare(normalizer.normalize(x, statistic), y, tolerance=CLOSE, what="the output")
