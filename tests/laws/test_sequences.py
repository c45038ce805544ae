"""Layers over sequences: cutting, padding, packing, permuting; independence of rows and calls."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import atn_norms as an
from atn_norms.pytree import where_mask
from atn_norms.statistics import promoted
from tests.compare import compare
from tests.laws.strategies import BASES, CELLS, KINDS, LayerCase, layer_cases, leaves, lengths, level, seeds, window

# As in test_cells.py: float64 sums in another order, magnified at most 316 times by a norm of few features.
EXACT = 1e-10
depths = st.integers(1, 2)


@given(layer_cases(steps=(2, 6)), depths, st.booleans())
def test_a_sequence_may_be_cut_anywhere(case: LayerCase, depth, first):
    layer, xs = case.layer(num_layers=depth, batch_first=first), case.xs()
    axis = 1 if first else 0
    xs = xs.transpose(0, 1) if first else xs
    whole, final = layer.unroll(xs)
    for cut in range(1, case.steps):
        start, state = layer.unroll(xs.narrow(axis, 0, cut))
        rest, state = layer.unroll(xs.narrow(axis, cut, case.steps - cut), state)
        compare(torch.cat([start, rest], axis), whole, tolerance=EXACT, what=f"cut at {cut}")
        compare(layer.hidden(state), layer.hidden(final), tolerance=EXACT)
        compare(leaves(state), leaves(final), tolerance=EXACT, what=f"state, cut at {cut}")


@given(layer_cases(steps=(2, 5)))
def test_gradients_pass_through_a_cut(case: LayerCase):
    layer, xs = case.layer(), case.xs().requires_grad_()
    wanted = [xs, *layer.parameters()]
    whole = torch.autograd.grad(layer.unroll(xs)[0].square().sum(), wanted)
    start, state = layer.unroll(xs[:1])
    rest, _ = layer.unroll(xs[1:], state)
    cut = torch.autograd.grad(torch.cat([start, rest]).square().sum(), wanted)
    compare(cut, whole, tolerance=EXACT, scale=level(*whole))


@given(layer_cases())
def test_a_call_is_an_unroll_from_a_fresh_state(case: LayerCase):
    layer, xs = case.layer(num_layers=2), case.xs()
    hx = case.hx(layer)
    ys, state = layer.unroll(xs, layer.initial(case.batch, hx))
    called, final = layer(xs, hx)
    compare(called, ys, tolerance=0)
    compare(final, layer.hidden(state), tolerance=0)
    compare(layer(xs)[0], layer.unroll(xs)[0], tolerance=0)


@given(layer_cases(bases=["layer", "rms"], batch=(2, 4)), depths)
def test_a_padded_row_equals_that_row_alone(case: LayerCase, depth):
    layer, xs = case.layer(num_layers=depth), case.xs()
    limit = lengths(case, zero=True)
    mask = torch.arange(case.steps)[:, None] < limit
    dirty = torch.where(mask[..., None], xs, float("nan")).requires_grad_()
    ys, state = layer.unroll(dirty, lengths=limit)
    weight = torch.randn(ys.shape, dtype=torch.float64)
    wanted = [dirty, *layer.parameters()]
    found = torch.autograd.grad((ys * weight).sum(), wanted)
    total = [torch.zeros_like(g) for g in found]
    for row, n in enumerate(limit.tolist()):
        assert (ys[n:, row] == 0).all()
        if n == 0:
            fresh = leaves(layer.initial(case.batch))
            compare([leaf[row] for leaf in leaves(state)], [leaf[row] for leaf in fresh], tolerance=0)
            continue
        alone = xs[:n, row : row + 1].clone().requires_grad_()
        y, final = layer.unroll(alone)
        compare(ys[:n, row], y[:, 0], tolerance=EXACT)
        compare([leaf[row : row + 1] for leaf in leaves(state)], leaves(final), tolerance=EXACT)
        gradient, *others = torch.autograd.grad((y * weight[:n, row : row + 1]).sum(), [alone, *layer.parameters()])
        total[0][:n, row] += gradient[:, 0]
        for place, other in enumerate(others, 1):
            total[place] += other
    compare(found, total, tolerance=EXACT, scale=level(*total))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [None, *BASES])
@pytest.mark.parametrize("cell", CELLS)
def test_a_length_of_zero_leaves_a_row_untouched(cell, norm, kind):
    case = LayerCase(1, cell, norm or "layer", kind, steps=4, batch=4, inputs=2, hidden=3)
    layer = case.layer() if norm else case.layer(norm=None, window=1)
    _, state = layer.unroll(case.xs())
    ys, after = layer.unroll(torch.full_like(case.xs(), float("nan")), state, torch.zeros(4, dtype=torch.int64))
    assert (ys == 0).all()
    compare(leaves(after), leaves(state), tolerance=0)
    mixed = case.xs()
    mixed[:, 1] = float("nan")
    ys, after = layer.unroll(mixed, state, torch.tensor([4, 0, 4, 2]))
    assert (ys[:, 1] == 0).all()
    before = layer.hidden(state)
    for mine, theirs in zip(leaves(layer.hidden(after)), leaves(before), strict=True):
        compare(mine[:, 1], theirs[:, 1], tolerance=0)


class MeanOfExp(an.Normalizer):
    """Divide by a mean that is never 0, and so without eps."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(features))

    def measure(self, x):
        return an.Average.of(promoted(x).exp())

    def normalize(self, x, pooled):
        return self.weight * x / pooled.mean


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_of_zero_gives_no_nan_gradient(kind):
    norm, xs = an.AssortedTime(MeanOfExp(3), window(kind)), torch.randn(4, 2, 3)
    ys, _ = norm.scan(xs, lengths=[4, 0])
    (scanned,) = torch.autograd.grad(ys.sum(), list(norm.parameters()))
    state, total = None, torch.zeros(())
    for x in xs:
        y, state = norm.step(x, state, torch.tensor([True, False]))
        total = total + y.sum()
    (stepped,) = torch.autograd.grad(total, list(norm.parameters()))
    alone, _ = norm.scan(xs[:, :1])
    (expected,) = torch.autograd.grad(alone.sum(), list(norm.parameters()))
    compare([scanned, stepped], [expected, expected], tolerance=1e-6)


@dataclass(frozen=True)
class EverySecond(an.Window[Any]):
    """The current step and the step two unmasked steps before it."""

    def initial(self, now):
        return an.Sliding(3).initial(now)

    def push(self, now, weight, state):
        weights = torch.cat([state[0], weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        pooled = type(now)(*(leaf[:, ::2] for leaf in leaves)).pool(weights[:, ::2], 1)
        return pooled, where_mask(weight > 0, (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves)), state)


class BatchMeanOfExp(MeanOfExp):
    """The same for a statistic over the rows of a batch."""

    uses_batch_statistics = True

    def measure(self, x):
        return an.Average(promoted(x).exp())


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (MeanOfExp, EverySecond()),
        (BatchMeanOfExp, an.Sliding(1)),
        (lambda features: an.RMSNorm(features, eps=0.0), an.Sliding(3)),
        (lambda features: an.LayerNorm(features, eps=0.0), EverySecond()),
    ],
)
def test_padding_gives_no_nan_gradient(build, steps):
    """A masked step has an empty window, or no unmasked row in its batch; its gradient is 0."""
    torch.manual_seed(1)
    norm, xs, limit = an.AssortedTime(build(3), steps), torch.randn(6, 3, 3), torch.tensor([0, 1, 4])
    ys, _ = norm.scan(xs, lengths=limit)
    scanned = torch.autograd.grad(ys.sum(), list(norm.parameters()))
    state, total = None, torch.zeros(())
    for time, x in enumerate(xs):
        y, state = norm.step(x, state, time < limit)
        total = total + y.sum()
    stepped = torch.autograd.grad(total, list(norm.parameters()))
    assert all(gradient.isfinite().all() for gradient in scanned)
    compare(stepped, scanned, tolerance=1e-5)
    if norm.normalizer.uses_batch_statistics:
        return
    alone = sum((norm.scan(xs[: limit[row], row : row + 1])[0].sum() for row in (1, 2)), torch.zeros(()))
    compare(scanned, torch.autograd.grad(alone, list(norm.parameters())), tolerance=1e-5)


def test_padding_in_a_layer_gives_no_nan_gradient():
    layer = an.GRU(3, 4, norm=MeanOfExpSpec(), window=EverySecondSpec(), backend="reference")
    layers: list[Any] = [layer, an.with_backend(layer, "auto")]
    xs, found = torch.randn(4, 3, 3), []
    for each in layers:
        ys, _ = each.unroll(xs, lengths=[1, 2, 4])
        found.append(torch.autograd.grad(ys.sum(), list(each.parameters())))
    assert all(gradient.isfinite().all() for gradient in found[0])
    compare(*found, tolerance=1e-5)


class MeanOfExpSpec(an.NormSpec):
    """Options of `MeanOfExp`."""

    kind: Literal["mean-of-exp"] = "mean-of-exp"

    def build(self, features):
        return MeanOfExp(features)


class EverySecondSpec(an.WindowSpec):
    """Options of `EverySecond`."""

    kind: Literal["every-second"] = "every-second"

    def build(self):
        return EverySecond()


@given(layer_cases(bases=["layer", "rms"], batch=(2, 4), steps=(2, 6)), st.integers(1, 5))
def test_ragged_streams_keep_the_sequence_of_each_row(case: LayerCase, cut):
    """Every row continues where it stopped, over chunks with different lengths per row, including 0."""
    cut = min(cut, case.steps - 1)
    layer, xs = case.layer(), case.xs()
    source = torch.Generator().manual_seed(case.seed)
    seen = [torch.randint(0, n + 1, (case.batch,), generator=source) for n in (cut, case.steps - cut)]
    first, state = layer.unroll(xs[:cut], lengths=seen[0])
    second, state = layer.unroll(xs[cut:], state, seen[1])
    for row in range(case.batch):
        a, b = int(seen[0][row]), int(seen[1][row])
        if a + b == 0:
            continue
        y, final = layer.unroll(torch.cat([xs[:a, row : row + 1], xs[cut : cut + b, row : row + 1]]))
        compare(torch.cat([first[:a, row], second[:b, row]]), y[:, 0], tolerance=EXACT)
        compare([leaf[row : row + 1] for leaf in leaves(state)], leaves(final), tolerance=EXACT)


@given(layer_cases(bases=["layer", "rms"], batch=(2, 4)), depths, st.booleans(), st.booleans())
def test_a_packed_row_equals_that_row_alone_in_every_direction(case: LayerCase, depth, both, given_states):
    layer, xs = case.layer(num_layers=depth, bidirectional=both), case.xs()
    limit, hx = lengths(case), case.hx(layer) if given_states else None
    packed = pack_padded_sequence(xs, limit, enforce_sorted=False)
    out, final = layer(packed, hx)
    assert type(out) is type(packed)
    compare(out.batch_sizes, packed.batch_sizes, tolerance=0)
    compare(out.unsorted_indices, packed.unsorted_indices, tolerance=0)
    compare(out.sorted_indices, packed.sorted_indices, tolerance=0)
    ys, counts = pad_packed_sequence(out)
    compare(counts, limit, tolerance=0)
    for row, n in enumerate(limit.tolist()):
        own = None
        if hx is not None:
            own = tuple(s[:, row : row + 1] for s in hx) if isinstance(hx, tuple) else hx[:, row : row + 1]
        y, last = layer(xs[:n, row : row + 1], own)
        compare(ys[:n, row], y[:, 0], tolerance=EXACT)
        for mine, theirs in zip(leaves(final), leaves(last), strict=True):
            compare(mine[:, row : row + 1], theirs, tolerance=EXACT)


@given(layer_cases(batch=(2, 4)))
def test_packing_sorted_or_not_is_unrolling_with_lengths(case: LayerCase):
    layer, xs, limit = case.layer(), case.xs(), lengths(case)
    expected, state = layer.unroll(xs, lengths=limit)
    out, final = layer(pack_padded_sequence(xs, limit, enforce_sorted=False))
    ys, _ = pad_packed_sequence(out, total_length=case.steps)
    compare(ys, expected, tolerance=EXACT)
    compare(final, layer.hidden(state), tolerance=EXACT)
    order = limit.argsort(descending=True, stable=True)
    out, final = layer(pack_padded_sequence(xs[:, order], limit[order]))
    assert out.sorted_indices is None
    ys, _ = pad_packed_sequence(out, total_length=case.steps)
    compare(ys, expected[:, order], tolerance=EXACT)
    compare(leaves(final), [s[:, order] for s in leaves(layer.hidden(state))], tolerance=EXACT)


@given(layer_cases(batch=(2, 4)), depths)
def test_permuting_the_batch_permutes_everything(case: LayerCase, depth):
    layer, xs = case.layer(num_layers=depth), case.xs()
    order = torch.randperm(case.batch, generator=torch.Generator().manual_seed(case.seed))
    ys, state = layer.unroll(xs)
    other, turned = layer.unroll(xs[:, order])
    compare(other, ys[:, order], tolerance=EXACT)
    compare(leaves(turned), leaves(an.reorder(state, order)), tolerance=EXACT)


@given(layer_cases(bases=["layer", "rms"], batch=(2, 4)), depths, st.booleans())
def test_rows_are_independent_in_value_and_gradient(case: LayerCase, depth, both):
    layer, xs = case.layer(num_layers=depth, bidirectional=both), case.xs().requires_grad_()
    ys, _ = layer(xs)
    (gradient,) = torch.autograd.grad(ys[:, 0].square().sum(), xs)
    assert (gradient[:, 1:] == 0).all()
    other = xs.detach().clone()
    other[:, 0] = float("nan")
    compare(layer(other)[0][:, 1:], ys[:, 1:], tolerance=0)


@given(layer_cases(steps=(2, 6)), depths)
def test_outputs_do_not_depend_on_future_steps(case: LayerCase, depth):
    layer, xs = case.layer(num_layers=depth), case.xs().requires_grad_()
    ys, _ = layer(xs)
    for t in range(case.steps - 1):
        (gradient,) = torch.autograd.grad(ys[t].square().sum(), xs, retain_graph=True)
        assert (gradient[t + 1 :] == 0).all()
    other = xs.detach().clone()
    other[-1] = float("nan")
    compare(layer(other)[0][:-1], ys[:-1], tolerance=0)


@given(layer_cases(kinds=st.just(("sliding", 1))), st.integers(0, 3))
def test_a_window_as_long_as_the_sequence_is_cumulative(case: LayerCase, extra):
    long = case.layer(window=case.steps + extra)
    compare(long(case.xs())[0], case.layer(window="cumulative")(case.xs())[0], tolerance=EXACT)


@given(layer_cases(hidden=(1, 1), batch=(1, 1), bases=["layer", "rms"], kinds=st.just(("sliding", 50))))
def test_one_row_one_unit_and_a_window_longer_than_the_sequence(case: LayerCase):
    layer, xs = case.layer(), case.xs()
    ys, _ = layer(xs)
    assert ys.shape == (case.steps, 1, 1)
    compare(layer(xs[:, 0])[0], ys[:, 0], tolerance=0)
    compare(ys, case.layer(window="cumulative")(xs)[0], tolerance=EXACT)


@given(layer_cases(), st.booleans())
def test_batch_first_is_only_a_view(case: LayerCase, ragged):
    layer, other, xs = case.layer(), case.layer(batch_first=True), case.xs()
    limit = lengths(case) if ragged and case.batch > 1 else None
    ys, state = layer.unroll(xs, lengths=limit)
    turned, final = other.unroll(xs.transpose(0, 1), lengths=limit)
    compare(turned.transpose(0, 1), ys, tolerance=0)
    compare(leaves(final), leaves(state), tolerance=0)
    compare(other.hidden(final), layer.hidden(state), tolerance=0)


@given(layer_cases(bases=["layer", "rms"]), st.booleans())
def test_an_unbatched_sequence_is_a_batch_of_one(case: LayerCase, both):
    layer, xs = case.layer(bidirectional=both), case.xs()
    hx = case.hx(layer)
    own = tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
    one = tuple(s[:, :1] for s in hx) if isinstance(hx, tuple) else hx[:, :1]
    ys, final = layer(xs[:, :1], one)
    y, last = layer(xs[:, 0], own)
    compare(y, ys[:, 0], tolerance=0)
    compare(leaves(last), [s[:, 0] for s in leaves(final)], tolerance=0)


def test_a_bidirectional_layer_rejects_a_carried_state():
    layer = an.LSTM(2, 3, bidirectional=True, norm="layer", window=2)
    xs = torch.randn(4, 2, 2)
    ys, state = layer.unroll(xs)
    compare(ys, layer(xs)[0], tolerance=0)
    with pytest.raises(ValueError, match="bidirectional"):
        layer.unroll(xs, state)


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([4, 5]), torch.tensor([-1, 4]), torch.tensor([4]), torch.tensor([4.0, 4.0]), torch.tensor([[4, 4]])],
)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_invalid_lengths_are_rejected(norm, wrong):
    with pytest.raises(ValueError, match="lengths"):
        an.GRU(2, 3, norm=norm).unroll(torch.randn(4, 2, 2), lengths=wrong)


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_a_sequence_without_steps_is_rejected(norm):
    layer = an.LSTM(2, 3, norm=norm, window=2)
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.zeros(0, 2, 2))
    with pytest.raises((ValueError, RuntimeError)):
        layer.unroll(torch.zeros(0, 2, 2))


def test_a_state_of_another_batch_size_is_rejected():
    layer = an.LSTM(2, 3, norm="layer", window=2)
    _, state = layer.unroll(torch.randn(4, 3, 2))
    with pytest.raises((ValueError, RuntimeError)):
        layer.unroll(torch.randn(4, 2, 2), state)


@given(seed=seeds, cell=st.sampled_from(CELLS), kind=st.sampled_from(KINDS))
def test_a_nan_input_stays_in_its_row(seed, cell, kind):
    case = LayerCase(seed, cell, "layer", kind, steps=5, batch=3, inputs=2, hidden=3)
    layer, xs = case.layer(window=window(kind)), case.xs()
    clean = layer(xs)[0]
    xs[2, 1, 0] = float("nan")
    ys = layer(xs)[0]
    compare(ys[:, [0, 2]], clean[:, [0, 2]], tolerance=0)
    compare(ys[:2], clean[:2], tolerance=0)
    assert ys[2:, 1].isnan().all()
