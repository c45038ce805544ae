"""Invariances of each normalizer over each window: one section for each row of the table of invariances."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import BASES, CELLS, LayerCase, leaves, level, normalizer, seeds, sequence, stirred, window

TINY = 1e-15  # the invariances hold for eps -> 0; a variance of 1e-3 then changes by a factor of 1e-12
HELD = 1e-8  # float64, at most 8 steps, sums of 30 terms, over deviations of 1e-3 and more
CHANGED = 1e-6  # far above rounding: an expected change is larger than this

many = st.sampled_from([("sliding", 2), ("sliding", 3), ("sliding", 5), ("cumulative",), ("exponential", 2.0)])
any_window = st.one_of(st.just(("sliding", 1)), many)
factors = st.sampled_from([0.25, 0.5, 2.0, 3.0])


def norm(base, kind, seed, features=6):
    module = an.AssortedTime(normalizer(base, features, eps=TINY).double(), window=window(kind))
    return stirred(module, seed)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site(base, kind, seed):
    """Return inputs, weight and bias of a site, and the function that computes its output."""
    module = norm(base, kind, seed)
    xs, weight, bias = draw(seed, 6, 5, 3), draw(seed + 1, 6, 3), draw(seed + 2, 6)
    return xs, weight, bias, lambda w, b, x=xs: module.scan(x @ w.T + b)[0]


def changes(after, before, what):
    difference = float((after - before).detach().abs().max())
    assert difference > CHANGED, f"{what}: nothing changed ({difference:.3g})"


# row 1: all weights and biases of the site times d


@pytest.mark.parametrize("base", BASES)
@given(seed=seeds, kind=any_window, d=factors)
def test_scaling_the_weights_has_no_effect_and_divides_their_gradient(base, seed, kind, d):
    _, weight, bias, run = site(base, kind, seed)
    before = run(weight, bias)
    compare(run(d * weight, d * bias), before, tolerance=HELD)
    loss = draw(seed + 3, *before.shape)
    gradients = []
    for scale in (1.0, d):
        w = (scale * weight).requires_grad_()
        (gradient,) = torch.autograd.grad((run(w, scale * bias) * loss).sum(), w)
        gradients.append(gradient)
    compare(d * gradients[1], gradients[0], tolerance=HELD, scale=level(gradients[0]))


@given(seed=seeds, kind=any_window)
def test_batch_is_invariant_to_a_scale_per_feature(seed, kind):
    _, weight, bias, run = site("batch", kind, seed)
    d = torch.linspace(0.5, 3.0, 6, dtype=torch.float64)
    compare(run(d[:, None] * weight, d * bias), run(weight, bias), tolerance=HELD)


@pytest.mark.parametrize("base", ["layer", "rms"])
@given(seed=seeds, kind=any_window)
def test_layer_and_rms_change_with_a_scale_per_feature(base, seed, kind):
    _, weight, bias, run = site(base, kind, seed)
    d = torch.linspace(0.5, 3.0, 6, dtype=torch.float64)
    changes(run(d[:, None] * weight, d * bias), run(weight, bias), "a scale per feature")


@given(
    seed=seeds,
    cell=st.sampled_from(CELLS),
    base=st.sampled_from(BASES),
    kind=any_window,
    name=st.sampled_from(["ih", "hh"]),
    d=factors,
)
def test_a_layer_is_invariant_to_the_scale_of_one_site(seed, cell, base, kind, name, d):
    case = LayerCase(seed, cell, base, kind, steps=5, batch=4, inputs=3, hidden=4)
    layer = case.layer(norm={"kind": base, "eps": TINY})
    xs, hx = case.xs(), case.hx(layer)
    before = layer(xs, hx)[0].detach()
    with torch.no_grad():
        getattr(layer, f"weight_{name}_l0").mul_(d)
        getattr(layer, f"bias_{name}_l0").mul_(d)
    # the norm of the cell, over 4 features, may magnify 100 times
    compare(layer(xs, hx)[0].detach(), before, tolerance=1e-6)


# row 2: the same vector added to every row of W


@given(seed=seeds)
def test_layer_normalization_of_one_step_is_invariant_to_recentring(seed):
    _, weight, bias, run = site("layer", ("sliding", 1), seed)
    compare(run(weight + draw(seed + 4, 3), bias), run(weight, bias), tolerance=HELD)


@given(seed=seeds, kind=many)
def test_a_longer_window_changes_with_recentring(seed, kind):
    _, weight, bias, run = site("layer", kind, seed)
    before, after = run(weight, bias), run(weight + draw(seed + 4, 3), bias)
    compare(after[0], before[0], tolerance=HELD)  # at the first step the window holds one step
    changes(after[1:], before[1:], "re-centring")


@given(seed=seeds, kind=many)
def test_recentring_with_a_constant_product_has_no_effect(seed, kind):
    xs, weight, bias, run = site("layer", kind, seed)
    vector = draw(seed + 4, 3)
    xs = xs - (xs @ vector)[..., None] * vector / vector.square().sum()  # remove the component along the vector
    xs = xs + draw(seed + 5, 1, 5, 1) * vector  # a different level for each row, constant in time
    compare(run(weight + vector, bias, xs), run(weight, bias, xs), tolerance=HELD)


@pytest.mark.parametrize("base", ["rms", "batch"])
@given(seed=seeds, kind=any_window)
def test_rms_and_batch_change_with_recentring(base, seed, kind):
    _, weight, bias, run = site(base, kind, seed)
    changes(run(weight + draw(seed + 4, 3), bias), run(weight, bias), "re-centring")


# row 3: a shift per feature, constant in time


@given(seed=seeds, kind=any_window)
def test_batch_is_invariant_to_a_shift_per_feature(seed, kind):
    _, weight, bias, run = site("batch", kind, seed)
    compare(run(weight, bias + draw(seed + 4, 6)), run(weight, bias), tolerance=HELD)


@pytest.mark.parametrize("base", ["layer", "rms"])
@given(seed=seeds, kind=any_window)
def test_layer_and_rms_change_with_a_shift_per_feature(base, seed, kind):
    _, weight, bias, run = site(base, kind, seed)
    changes(run(weight, bias + draw(seed + 4, 6)), run(weight, bias), "a shift per feature")


# row 4: the whole sequence times d


@pytest.mark.parametrize("base", BASES)
@given(seed=seeds, kind=any_window, d=factors)
def test_scaling_the_whole_sequence_has_no_effect(base, seed, kind, d):
    xs, module = draw(seed, 6, 5, 6), norm(base, kind, seed)
    compare(module.scan(d * xs)[0], module.scan(xs)[0], tolerance=HELD)


# row 5: one step times d


@pytest.mark.parametrize("base", BASES)
@given(seed=seeds, step=st.integers(0, 5), d=factors)
def test_a_window_of_one_is_invariant_to_the_scale_of_one_step(base, seed, step, d):
    xs, module = draw(seed, 6, 5, 6), norm(base, ("sliding", 1), seed)
    other = xs.clone()
    other[step] *= d
    compare(module.scan(other)[0], module.scan(xs)[0], tolerance=HELD)


@pytest.mark.parametrize("base", BASES)
@given(seed=seeds, kind=many, step=st.integers(1, 5), d=factors)
def test_a_longer_window_changes_with_the_scale_of_one_step(base, seed, kind, step, d):
    xs, module = draw(seed, 6, 5, 6), norm(base, kind, seed)
    other = xs.clone()
    other[step] *= d
    before, after = module.scan(xs)[0], module.scan(other)[0]
    compare(after[:step], before[:step], tolerance=0)
    changes(after[step], before[step], "the scaled step itself")


@given(seed=seeds, d=factors)
def test_only_a_longer_window_keeps_the_level_of_a_step(seed, d):
    """Motivation of the method: an input term u_t w keeps u_t relative to its recent past."""
    direction = draw(seed, 6)
    direction = direction - direction.mean()  # a one-step layer norm cannot distinguish levels
    levels = torch.tensor([1.0, 1.0, 1.0 + d, 1.0], dtype=torch.float64)
    xs = levels[:, None, None] * direction
    short, long = (norm("layer", ("sliding", k), seed).scan(xs)[0] for k in (1, 3))
    compare(short[2], short[1], tolerance=1e-9)
    changes(long[2], long[1], "a step's level")


# rows 6 and 7: the batch


@pytest.mark.parametrize("base", BASES)
@given(seed=seeds, kind=any_window)
def test_permuting_rows_permutes_outputs_and_state(base, seed, kind):
    xs, module = draw(seed, 6, 5, 6), norm(base, kind, seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    ys, state = module.scan(xs)
    other, turned = module.scan(xs[:, order])
    compare(other, ys[:, order], tolerance=1e-12)  # a sum over the batch in another order
    same = state if base == "batch" else an.reorder(state, order)  # batch statistics share one row
    compare(leaves(turned), leaves(same), tolerance=1e-12)


@pytest.mark.parametrize("base", ["layer", "rms"])
@given(seed=seeds, kind=any_window, row=st.integers(0, 4))
def test_dropping_a_row_does_not_change_the_others(base, seed, kind, row):
    xs, module = draw(seed, 6, 5, 6), norm(base, kind, seed)
    others = [r for r in range(5) if r != row]
    compare(module.scan(xs[:, others])[0], module.scan(xs)[0][:, others], tolerance=0)


@given(seed=seeds, kind=any_window, row=st.integers(0, 4))
def test_dropping_a_row_changes_the_others_only_under_batch_statistics_in_training(seed, kind, row):
    xs, module = draw(seed, 6, 5, 6), norm("batch", kind, seed)
    others = [r for r in range(5) if r != row]
    changes(module.scan(xs[:, others])[0], module.scan(xs)[0][:, others], "the others' statistics")
    module.eval()
    compare(module.scan(xs[:, others])[0], module.scan(xs)[0][:, others], tolerance=0)


@pytest.mark.parametrize("base", ["layer", "rms"])
@given(seed=seeds, kind=any_window, row=st.integers(0, 4))
def test_rows_have_independent_gradients(base, seed, kind, row):
    xs, module = draw(seed, 6, 5, 6).requires_grad_(), norm(base, kind, seed)
    (gradient,) = torch.autograd.grad(module.scan(xs)[0][:, row].square().sum(), xs)
    gradient[:, row] = 0
    assert (gradient == 0).all()


@given(seed=seeds, kind=any_window, training=st.booleans())
def test_rows_are_coupled_only_under_batch_statistics_in_training(seed, kind, training):
    xs, module = draw(seed, 6, 5, 6).requires_grad_(), norm("batch", kind, seed).train(training)
    (gradient,) = torch.autograd.grad((module.scan(xs)[0][:, 0] * draw(seed + 1, 6)).sum(), xs)
    assert bool(gradient[:, 1:].abs().max() > CHANGED) == training


# row 8, forgetting, is in test_windows.py; evaluation with population statistics is in test_population.py


@given(seed=seeds, k=st.sampled_from([2, 3, 5]))
def test_a_window_keeps_the_directions_that_one_step_annihilates(seed, k):
    """Layer normalization of one step annihilates the directions 1 and x_t; a longer window does not."""
    xs = sequence("normal", seed, (6, 2, 6))
    for kind, blind in ((("sliding", 1), True), (("sliding", k), False)):
        module = norm("layer", kind, seed)
        start = xs.clone().requires_grad_()
        ys = module.scan(start)[0]
        (gradient,) = torch.autograd.grad((ys[4] * draw(seed + 1, 2, 6)).sum(), start)
        along = (gradient[4].sum(-1), (gradient[4] * xs[4]).sum(-1))
        for part in along:
            if blind:
                compare(part, torch.zeros_like(part), tolerance=1e-9)
            else:
                assert (part.abs() > 1e-9).all()
