"""Pooling statistics equals computing the statistic of the pooled values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import REGIMES, seeds, sequence

EPS = torch.finfo(torch.float64).eps
STATISTICS = (an.Moments, an.Average)


@given(
    seed=seeds, rows=st.integers(1, 4), count=st.integers(1, 6), size=st.integers(1, 5), regime=st.sampled_from(REGIMES)
)
def test_pooling_equal_weights_is_the_statistic_of_all_values(seed, rows, count, size, regime):
    xs = sequence(regime, seed, (rows, count, size))
    pooled = an.Moments.of(xs).pool(torch.ones(rows, count, dtype=torch.float64), 1)
    mean, var = xs.mean((1, 2)), xs.var((1, 2), correction=0)
    level = float(xs.abs().max())
    compare(pooled.mean.flatten(), mean, tolerance=8 * EPS, scale=level, what="mean")
    compare(
        pooled.var.flatten(), var, tolerance=64 * EPS, scale=level * (level * EPS + float(var.max().sqrt())), what="var"
    )
    compare(
        an.Average.of(xs).pool(torch.ones(rows, count, dtype=torch.float64), 1).mean.flatten(),
        mean,
        tolerance=8 * EPS,
        scale=level,
    )


@given(seed=seeds, rows=st.integers(1, 3), count=st.integers(1, 6), size=st.integers(1, 5))
def test_pooling_weights_each_statistic(seed, rows, count, size):
    xs = sequence("normal", seed, (rows, count, size))
    weights = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    share = (weights / weights.sum(1, keepdim=True))[..., None] / size
    mean = (share * xs).sum((1, 2))
    var = (share * (xs - mean[:, None, None]) ** 2).sum((1, 2))
    pooled = an.Moments.of(xs).pool(weights, 1)
    compare(pooled.mean.flatten(), mean, tolerance=64 * EPS)  # sums of at most 30 terms of order 1
    compare(pooled.var.flatten(), var, tolerance=64 * EPS)


@pytest.mark.parametrize("kind", STATISTICS)
@given(seed=seeds, cut=st.integers(1, 4))
def test_pooling_in_two_stages_is_pooling_at_once(kind, seed, cut):
    xs = sequence("normal", seed, (2, 5, 3))
    all_at_once = kind.of(xs).pool(torch.ones(2, 5, dtype=torch.float64), 1)
    halves = [
        kind.of(part).pool(torch.ones(part.shape[:2], dtype=torch.float64), 1) for part in (xs[:, :cut], xs[:, cut:])
    ]
    both = kind(*(torch.stack(leaf, 1) for leaf in zip(*halves, strict=True)))
    merged = both.pool(torch.tensor([[cut, 5 - cut]] * 2, dtype=torch.float64), 1)
    compare(list(merged), list(all_at_once), tolerance=64 * EPS)  # the order of sums of 15 terms


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
def test_an_entry_of_weight_zero_is_hidden_in_value_and_gradient(kind, poison):
    xs = sequence("normal", 0, (2, 3, 4))
    dirty = [leaf.clone().requires_grad_() for leaf in kind.of(xs)]
    with torch.no_grad():
        for leaf in dirty:
            leaf[:, 1] = poison
    weights = torch.tensor([[1.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    pooled = kind(*dirty).pool(weights, 1)
    clean = kind.of(xs[:, [0, 2]]).pool(torch.ones(2, 2, dtype=torch.float64), 1)
    compare(list(pooled), list(clean), tolerance=8 * EPS)
    for gradient in torch.autograd.grad(torch.stack([leaf.sum() for leaf in pooled]).sum(), dirty, allow_unused=True):
        if gradient is not None:
            assert torch.isfinite(gradient).all()
            assert (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("kind", STATISTICS)
def test_total_weight_zero_gives_a_finite_value_without_gradient(kind):
    start = [leaf.clone().requires_grad_() for leaf in kind.of(sequence("normal", 0, (2, 3, 4)))]
    weights = torch.zeros(2, 3, dtype=torch.float64)
    pooled = kind(*start).pool(weights, 1)
    assert all(torch.isfinite(leaf).all() for leaf in pooled)
    for gradient in torch.autograd.grad(torch.stack([leaf.sum() for leaf in pooled]).sum(), start, allow_unused=True):
        assert gradient is None or (gradient == 0).all()


@given(
    seed=seeds,
    regime=st.sampled_from(REGIMES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    count=st.integers(1, 100),
)
def test_a_variance_is_never_negative(seed, regime, dtype, count):
    xs = sequence(regime, seed, (2, count, 3)).to(dtype)
    steps = an.Moments.of(xs)
    assert (steps.var >= 0).all()
    weights = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for drawn in (torch.ones_like(weights), weights, (weights > 0.5).double()):
        assert (steps.pool(drawn, 1).var >= 0).all()


def test_of_keeps_the_reduced_axis_and_takes_any_axis():
    xs = sequence("normal", 0, (3, 4, 5))
    for dim in (0, 1, 2, -1):
        moments = an.Moments.of(xs, dim=dim)
        compare(moments.mean, xs.mean(dim, keepdim=True), tolerance=8 * EPS)
        compare(moments.var, xs.var(dim, correction=0, keepdim=True), tolerance=8 * EPS)
        compare(an.Average.of(xs, dim=dim).mean, xs.mean(dim, keepdim=True), tolerance=8 * EPS)


@pytest.mark.parametrize("kind", STATISTICS)
def test_a_statistic_is_rebuilt_from_its_leaves(kind):
    statistic = kind.of(sequence("normal", 0, (2, 3, 4)))
    again = type(statistic)(*statistic)
    assert type(again) is kind
    compare(list(again), list(statistic), tolerance=0)


@pytest.mark.parametrize("kind", STATISTICS)
def test_pooling_is_twice_differentiable_in_its_leaves(kind):
    start = [leaf.clone().requires_grad_() for leaf in kind.of(sequence("normal", 0, (2, 3, 4)))]
    weights = torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]], dtype=torch.float64)

    def pooled(*leaves):
        return tuple(kind(*leaves).pool(weights, 1))

    torch.autograd.gradcheck(pooled, start)
    torch.autograd.gradgradcheck(pooled, start)
