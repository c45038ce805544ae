"""Unregistered third-party normalizers, statistics and windows in every cell."""

from typing import Any, ClassVar, Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from torch import Tensor, nn

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import CELLS, KINDS, LayerCase, leaves, seeds, sequence, window


class PMean(an.Normalizer):
    """y = gain x / (E|x|^p + eps)^(1/p)."""

    def __init__(self, features: int, p: float = 2.0):
        super().__init__()
        self.p = p
        self.weight = nn.Parameter(torch.ones(features))

    def measure(self, x: Tensor) -> an.Average:
        return an.Average.of(x.double().abs() ** self.p)

    def normalize(self, x: Tensor, pooled: an.Average) -> Tensor:
        return self.weight * x / (pooled.mean + 1e-5) ** (1 / self.p)


class PMeanSpec(an.NormSpec):
    kind: Literal["local_pmean"] = "local_pmean"
    p: float = Field(2.0, gt=0)

    def build(self, features: int) -> PMean:
        return PMean(features, self.p)


class Largest(NamedTuple):
    """Third-party statistic: the largest magnitude."""

    top: Tensor

    def pool(self, weights: Tensor, dim: int) -> "Largest":
        weights = weights.reshape(weights.shape + (1,) * (self.top.ndim - weights.ndim))
        return Largest(torch.where(weights > 0, self.top, 0.0).amax(dim))


class MaxNorm(an.Normalizer):
    def measure(self, x: Tensor) -> Largest:
        return Largest(x.abs().amax(-1, keepdim=True).double())

    def normalize(self, x: Tensor, pooled: Largest) -> Tensor:
        return x / (pooled.top + 1e-5)


class MaxNormSpec(an.NormSpec):
    kind: Literal["local_max"] = "local_max"

    def build(self, features: int) -> MaxNorm:
        return MaxNorm()


class Centre(an.Normalizer):
    """Third-party batch normalization: it declares batch statistics, so it receives the statistic of the batch."""

    uses_batch_statistics: ClassVar[bool] = True

    def measure(self, x: Tensor) -> an.Moments:
        return an.Moments(x.double(), torch.zeros_like(x, dtype=torch.float64))

    def normalize(self, x: Tensor, pooled: an.Moments) -> Tensor:
        return (x - pooled.mean) / (pooled.var + 1e-5).sqrt()


class CentreSpec(an.NormSpec):
    kind: Literal["local_centre"] = "local_centre"

    def build(self, features: int) -> Centre:
        return Centre()


class Pair(an.Window):
    """Window of the current step and the unmasked step before it, without a custom `scan`."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Pair

    __hash__ = object.__hash__

    def initial(self, now: Any) -> Any:
        kept = tuple(torch.zeros_like(leaf) for leaf in now)
        return kept[0].new_zeros(kept[0].shape[0]), kept

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        before, kept = state
        stacked = type(now)(*(torch.stack(pair, 1) for pair in zip(kept, now, strict=True)))
        pooled = stacked.pool(torch.stack([before, weight], 1), 1)

        def held(new: Tensor, old: Tensor) -> Tensor:
            return torch.where((weight > 0).reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

        return pooled, (held(weight, before), tuple(held(new, old) for new, old in zip(now, kept, strict=True)))


class PairSpec(an.WindowSpec):
    kind: Literal["local_pair"] = "local_pair"

    def build(self) -> Pair:
        return Pair()


def layer(cell, seed, **options):
    torch.manual_seed(seed)
    return getattr(an, cell)(2, 4, 2, dtype=torch.float64, **options)


@pytest.mark.parametrize("cell", CELLS)
@settings(max_examples=10)
@given(seed=seeds, kind=st.sampled_from(KINDS), gates=st.sampled_from(["joint", "per_gate"]))
def test_a_third_party_rms_equals_rms_in_every_cell(cell, seed, kind, gates):
    xs, limit = sequence("normal", seed, (6, 3, 2)), torch.tensor([6, 0, 4])
    options = {"window": window(kind), "placement": {"gates": gates}}
    mine = layer(cell, seed, norm=PMeanSpec(p=2.0), **options)
    theirs = layer(cell, seed, norm={"kind": "rms", "eps": 1e-5}, **options)
    y, state = mine.unroll(xs, lengths=limit)
    expected, final = theirs.unroll(xs, lengths=limit)
    compare(y, expected, tolerance=1e-10)
    compare(leaves(state), leaves(final), tolerance=1e-10)


@pytest.mark.parametrize("cell", CELLS)
@settings(max_examples=10)
@given(seed=seeds, base=st.sampled_from(["layer", "rms", "batch"]))
def test_a_third_party_pair_window_equals_a_window_of_two(cell, seed, base):
    xs, limit = sequence("normal", seed, (6, 3, 2)), torch.tensor([6, 3, 6])
    y, _ = layer(cell, seed, norm=base, window=PairSpec()).unroll(xs, lengths=limit)
    expected, _ = layer(cell, seed, norm=base, window=2).unroll(xs, lengths=limit)
    compare(y, expected, tolerance=1e-10)


@pytest.mark.parametrize("cell", CELLS)
@settings(max_examples=10)
@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_a_third_party_batch_norm_equals_batch_norm_in_training(cell, seed, kind):
    xs, limit = sequence("normal", seed, (6, 4, 2)), torch.tensor([6, 3, 6, 1])
    y, _ = layer(cell, seed, norm=CentreSpec(), window=window(kind)).unroll(xs, lengths=limit)
    expected, _ = layer(cell, seed, norm="batch", window=window(kind)).unroll(xs, lengths=limit)
    compare(y, expected, tolerance=1e-10)


@settings(max_examples=15)
@given(seed=seeds, k=st.sampled_from([1, 2, 3]))
def test_a_third_party_statistic_slides(seed, k):
    xs = sequence("normal", seed, (6, 3, 2))
    norm = an.AssortedTime(MaxNorm(), window=k)
    ys, _ = norm.scan(xs)
    for t in range(6):
        top = xs[max(0, t - k + 1) : t + 1].abs().amax((0, 2))[:, None]
        compare(ys[t], xs[t] / (top + 1e-5), tolerance=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", [PMeanSpec(p=3.0), MaxNormSpec()])
@pytest.mark.parametrize("chosen", [PairSpec(), *map(window, KINDS)])
def test_third_party_layers_stream_and_train(cell, norm, chosen):
    mine, xs = layer(cell, 3, norm=norm, window=chosen), sequence("normal", 3, (6, 3, 2))
    whole, _ = mine(xs)
    start, state = mine.unroll(xs[:2])
    rest, _ = mine.unroll(xs[2:], state)
    compare(torch.cat([start, rest]), whole, tolerance=1e-10)
    whole.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mine.parameters())


def test_third_party_kinds_work_in_one_step_cells_and_replaced_models():
    case = LayerCase(1, "LSTM", "layer", ("sliding", 2), 4, 2, 2, 4)
    cell = an.LSTMCell(2, 4, norm=PMeanSpec(p=1.5), window=PairSpec(), dtype=torch.float64)
    state = None
    for x in case.xs():
        y, state = cell(x, state)
    assert torch.isfinite(y).all()
    model: Any = an.replace(nn.Sequential(nn.GRU(2, 4)), norm=PMeanSpec(p=2.0), window=PairSpec())
    assert isinstance(model[0].norm_ih_l0, PMean)
