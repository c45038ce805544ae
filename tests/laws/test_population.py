"""Batch statistics: population statistics recorded in training and used in evaluation, with independent rows."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import atn_norms as an
from atn_norms.statistics import CountedMoments
from tests import oracle
from tests.compare import compare
from tests.laws.strategies import (
    CELLS,
    Case,
    LayerCase,
    cases,
    layer_cases,
    lengths,
    seeds,
    sequence,
    stirred,
    textbook,
    window,
)

EXACT = 1e-10
counted = st.one_of(st.tuples(st.just("sliding"), st.sampled_from([1, 2, 3, 100])), st.just(("cumulative",)))


def statistics(site: oracle.Site) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled mean, pooled unbiased variance and number of samples of every step of two rows or more."""
    steps = [pooled for pooled, mask in zip(site.pooled, site.mask, strict=True) if mask.sum() >= 2]
    steps = [(mean, var, float(total.max())) for mean, var, total in steps]
    means = [mean.flatten() for mean, _, _ in steps]
    variances = [(var * total / (total - 1)).flatten() for _, var, total in steps]
    totals = torch.tensor([[total] for _, _, total in steps], dtype=torch.float64)
    return torch.stack(means), torch.stack(variances), totals


def expected(site: oracle.Site, momentum: float = 0.1) -> dict[str, Tensor]:
    """Return the shared statistics after one scan from the start: one update with the mean over all samples."""
    means, variances, totals = statistics(site)
    share = totals / totals.sum()
    return {
        "running_mean": momentum * (share * means).sum(0),
        "running_var": (1 - momentum) + momentum * (share * variances).sum(0),
        "num_batches_tracked": torch.tensor(1),
    }


def buffers(module) -> dict[str, Tensor]:
    return {name: getattr(module, name) for name in ("running_mean", "running_var", "num_batches_tracked")}


@given(cases(bases=["batch"], kinds=counted, regimes=["normal"]), st.booleans())
def test_a_scan_is_one_update_with_the_mean_over_unmasked_steps(case: Case, ragged):
    norm, xs = case.norm(), case.xs()
    limit = lengths(case) if ragged else torch.full((case.batch,), case.steps)
    mask = torch.arange(case.steps)[:, None] < limit
    site = case.site(norm)
    oracle.run(site, xs, mask)
    norm.scan(torch.where(mask[..., None], xs, float("nan")), lengths=limit)
    compare(buffers(norm.normalizer), expected(site), tolerance=1e-12)


@given(layer_cases(bases=["batch"], kinds=counted), st.booleans())
def test_every_site_of_a_layer_is_updated_once_a_call(case: LayerCase, ragged):
    layer, kept = case.layer(), {}
    limit = lengths(case) if ragged else torch.full((case.batch,), case.steps)
    layer.unroll(case.xs(), layer.initial(case.batch, case.hx(layer)), lengths=limit)
    textbook(layer, case, case.xs(), case.hx(layer), limit, sites_out=kept)
    for name, site in kept.items():
        compare(buffers(getattr(layer, f"norm_{name}_l0")), expected(site), tolerance=EXACT, what=name)


@given(cases(bases=["batch"], kinds=counted, regimes=["normal"], steps=(1, 6)), st.integers(1, 8))
def test_a_population_per_step_up_to_a_last_one(case: Case, slots):
    """Steps past the last slot are not recorded; a step past the last recorded one reuses it."""
    norm = an.AssortedTime(an.BatchNorm(case.features, max_steps=slots).double(), window=window(case.window))
    xs, site = case.xs(), case.site(norm)
    oracle.run(site, xs)
    norm.scan(xs)
    means, variances, _ = statistics(site)
    seen = min(slots, case.steps)
    fresh_mean = torch.zeros(slots, case.features, dtype=torch.float64)
    fresh_var = torch.ones(slots, case.features, dtype=torch.float64)
    fresh_mean[:seen] = 0.1 * means[:seen]
    fresh_var[:seen] = 0.9 + 0.1 * variances[:seen]
    tracked = (torch.arange(slots) < seen).long()
    wanted = {"running_mean": fresh_mean, "running_var": fresh_var, "num_batches_tracked": tracked}
    compare(buffers(norm.normalizer), wanted, tolerance=1e-12)
    norm.eval()
    longer = sequence("normal", case.seed + 1, (case.steps + slots + 2, case.batch, case.features))
    ys, _ = norm.scan(longer)
    for t, (x, y) in enumerate(zip(longer, ys, strict=True)):
        place = min(t, seen - 1)
        compare(y, (x - fresh_mean[place]) / (fresh_var[place] + 1e-5).sqrt(), tolerance=1e-12, what=f"step {t}")


@given(cases(bases=["batch"], regimes=["normal"], steps=(2, 6)), st.integers(1, 5))
def test_steps_are_counted_across_a_cut(case: Case, cut):
    """A population per step belongs to the step's position in the sequence, not in the chunk."""
    cut = min(cut, case.steps - 1)
    whole, parts = (
        an.AssortedTime(an.BatchNorm(case.features, max_steps=4).double(), window=window(case.window)) for _ in range(2)
    )
    xs = case.xs()
    whole.scan(xs)
    _, state = parts.scan(xs[:cut])
    parts.scan(xs[cut:], state)
    compare(buffers(parts.normalizer), buffers(whole.normalizer), tolerance=1e-12)


@given(layer_cases(bases=["batch"]), st.sampled_from([None, 3]))
def test_evaluation_uses_the_population_and_changes_nothing(case: LayerCase, slots):
    layer = case.layer(norm={"kind": "batch", "max_steps": slots})
    for _ in range(3):
        layer(case.xs())
    layer.eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    together, _ = layer(case.xs())
    compare(dict(layer.state_dict()), before, tolerance=0)
    for row in range(case.batch):
        compare(layer(case.xs()[:, row : row + 1])[0], together[:, row : row + 1], tolerance=EXACT)


@given(layer_cases(bases=["batch"]), st.booleans(), st.sampled_from([None, 3]))
def test_a_padded_row_equals_that_row_alone_in_evaluation(case: LayerCase, both, slots):
    """In both directions; the reverse direction counts steps from the end of each row."""
    layer, xs = case.layer(bidirectional=both, norm={"kind": "batch", "max_steps": slots}), case.xs()
    for _ in range(3):
        layer(xs)
    layer.eval()
    limit = lengths(case)
    packed, _ = layer(pack_padded_sequence(xs, limit, enforce_sorted=False))
    ys, _ = pad_packed_sequence(packed)
    for row, n in enumerate(limit.tolist()):
        y, _ = layer(xs[:n, row : row + 1])
        compare(ys[:n, row], y[:, 0], tolerance=EXACT)


@pytest.mark.parametrize("cell", CELLS)
@given(seed=seeds, kind=counted, slots=st.sampled_from([None, 4]))
def test_the_reverse_direction_records_from_the_end_of_each_row(cell, seed, kind, slots):
    case = LayerCase(seed, cell, "batch", kind, steps=5, batch=4, inputs=2, hidden=3)
    norm = {"kind": "batch", "max_steps": slots}
    both, xs, limit = case.layer(bidirectional=True, norm=norm), case.xs(), lengths(case)
    single = case.layer(norm=norm)
    own = {name.removesuffix("_reverse"): p for name, p in both.named_parameters() if name.endswith("_reverse")}
    single.load_state_dict(own, strict=False)
    for name, module in both.named_children():
        if name.endswith("_reverse"):
            getattr(single, name.removesuffix("_reverse")).load_state_dict(module.state_dict())
    both(pack_padded_sequence(xs, limit, enforce_sorted=False))
    turned = torch.zeros_like(xs)
    for row, n in enumerate(limit.tolist()):
        turned[:n, row] = xs[:n, row].flip(0)
    single.unroll(turned, lengths=limit)
    for name, module in single.named_children():
        compare(buffers(getattr(both, name + "_reverse")), buffers(module), tolerance=EXACT, what=name)


def test_a_packed_batch_counts_only_its_unmasked_rows():
    """Three rows of lengths 4, 4, 1: after the first step, the statistics have two rows, with weight 2 instead of 3."""
    layer: Any = an.RNN(2, 3, norm="batch", window=1, dtype=torch.float64)
    xs = sequence("normal", 0, (4, 3, 2))
    layer(pack_padded_sequence(xs, torch.tensor([4, 4, 1])))
    a = xs @ layer.weight_ih_l0.T + layer.bias_ih_l0
    means = torch.stack([a[0].mean(0), *a[1:, :2].mean(1)])
    share = torch.tensor([[3.0], [2.0], [2.0], [2.0]], dtype=torch.float64) / 9
    compare(layer.norm_ih_l0.running_mean, 0.1 * (share * means).sum(0).detach(), tolerance=1e-12)


RAGGED = {"one long row": [100, 2], "eight rows": [60] + [20] * 7}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_ragged_rows_do_not_shrink_the_population(lengths, packed, backend):
    """Each step is weighted by its rows. A step with one row has no variance and is not recorded."""
    layer: Any = an.RNN(1, 2, norm={"kind": "batch", "momentum": 1.0}, dtype=torch.float64, backend=backend)
    xs, rows = sequence("normal", 0, (max(lengths), len(lengths), 1)), torch.tensor(lengths)
    a = xs @ layer.weight_ih_l0.T + layer.bias_ih_l0
    if packed:
        layer(pack_padded_sequence(xs, rows))
    else:
        layer.unroll(xs, lengths=rows)
    shared = int(rows.sort().values[-2])  # steps with two or more unmasked rows
    expected = a[:shared].var(1, correction=1).mean(0)
    compare(layer.norm_ih_l0.running_var, expected.detach(), tolerance=1e-12)
    compare(layer.norm_ih_l0.running_mean, a[:shared].mean((0, 1)).detach(), tolerance=1e-12)


@pytest.mark.parametrize("kind", [1, 3, "cumulative", {"kind": "exponential", "half_life": 2.0}])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_step_of_one_row_keeps_its_own_population_untouched(backend, kind):
    """The window of such a step may hold samples of earlier steps."""
    norm = {"kind": "batch", "max_steps": 6, "momentum": 1.0}
    layer: Any = an.RNN(1, 2, norm=norm, window=kind, dtype=torch.float64, backend=backend)
    layer.unroll(sequence("normal", 0, (6, 2, 1)), lengths=[6, 2])
    recorded = layer.norm_ih_l0
    assert recorded.num_batches_tracked.tolist() == [1, 1, 0, 0, 0, 0]
    assert torch.equal(recorded.running_var[2:], torch.ones(4, 2, dtype=torch.float64))
    assert recorded.running_var[:2].min() > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_steps_of_one_row_leave_a_shared_population_unchanged(backend):
    """Two rows of 3 and 9 steps record over a window of 4 what they record without the last six steps."""
    xs, found = sequence("normal", 0, (9, 2, 1)), []
    for steps in (9, 3):
        torch.manual_seed(0)
        layer: Any = an.GRU(1, 2, norm={"kind": "batch"}, window=4, dtype=torch.float64, backend=backend)
        layer.unroll(xs[:steps], lengths=[3, steps])
        found.append({name: buffer.clone() for name, buffer in layer.named_buffers()})
    compare(found[0], found[1], tolerance=1e-12)


@pytest.mark.parametrize("slots", [None, 6])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_infinite_step_of_one_row_leaves_the_populations_finite(backend, slots):
    layer = an.RNN(2, 3, norm={"kind": "batch", "max_steps": slots}, backend=backend).double()
    x = torch.randn(5, 2, 2, dtype=torch.float64)
    x[4, 1] = torch.inf
    layer.unroll(x, None, [3, 5])
    found = {name: buffer for name, buffer in layer.named_buffers() if buffer.is_floating_point()}
    assert found
    for name, buffer in found.items():
        assert buffer.isfinite().all(), name


@pytest.mark.parametrize("slots", [None, 6])
def test_single_steps_of_one_row_are_not_recorded(slots):
    norm = an.AssortedTime(an.BatchNorm(2, max_steps=slots), window=3)
    x, state = torch.randn(2, 2), None
    _, state = norm.step(x, state)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm.step(x, state, torch.tensor([True, False]))
    compare(dict(norm.named_buffers()), before, tolerance=0)


def test_a_step_without_records_uses_the_last_recorded_one():
    norm = an.BatchNorm(1, max_steps=5).eval()
    norm.num_batches_tracked.copy_(torch.tensor([0, 2, 0, 1, 0]))
    norm.running_mean.copy_(torch.arange(5.0).unsqueeze(1))
    nothing = torch.zeros(7, 1, 1, dtype=torch.float64)
    step = torch.tensor([-1, 0, 1, 2, 3, 4, 9]).unsqueeze(1)
    population = norm.population(CountedMoments(nothing, nothing, nothing), step)
    assert population.mean.flatten().tolist() == [1, 1, 1, 1, 3, 3, 3]


def test_the_last_recorded_step_of_every_pattern():
    """Before the first recorded step, the first one is used; without any record, step 0."""
    for counts in itertools.product([0, 3], repeat=5):
        norm = an.BatchNorm(1, max_steps=5)
        norm.num_batches_tracked.copy_(torch.tensor(counts))
        recorded = [step for step, count in enumerate(counts) if count] or [0]
        last = [max([r for r in recorded if r <= step], default=recorded[0]) for step in range(5)]
        assert norm._recorded().tolist() == last, counts


@pytest.mark.parametrize(("backend", "kind"), [("native", 1), ("native", 3), ("reference", 1), ("reference", 3)])
def test_threads_train_one_layer(backend, kind):
    """Every call of every thread is one update of every population."""
    layer: Any = an.GRU(2, 3, norm="batch", window=kind, backend=backend)
    threads, calls = 8, 12
    with ThreadPoolExecutor(threads) as pool:
        started = [pool.submit(lambda n: layer(torch.randn(n, 4, 2)), 3 + n % 5) for n in range(threads * calls)]
        assert all(future.exception() is None for future in started)
    for name in ("ih", "hh"):
        assert getattr(layer, f"norm_{name}_l0").num_batches_tracked == threads * calls


@pytest.mark.parametrize("slots", [None, 6])
@pytest.mark.parametrize("kind", [1, 3, "cumulative"])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_without_unmasked_rows_are_not_recorded(cell, kind, slots):
    """A batch padded beyond its longest row records the same statistics as without this padding."""
    xs = sequence("normal", 0, (6, 3, 2))
    xs[4:] = float("nan")
    layers = []
    for steps in (6, 4):
        torch.manual_seed(0)
        norm = {"kind": "batch", "max_steps": slots}
        layers.append(getattr(an, cell)(2, 3, norm=norm, window=kind, dtype=torch.float64))
        layers[-1].unroll(xs[:steps], lengths=[4, 2, 4])
    compare(dict(layers[0].state_dict()), dict(layers[1].state_dict()), tolerance=1e-12)
    before = {name: value.clone() for name, value in layers[0].state_dict().items()}
    layers[0].unroll(xs, lengths=[0, 0, 0])
    compare(dict(layers[0].state_dict()), before, tolerance=0)


def test_the_gain_may_start_small():
    layer: Any = an.LSTM(2, 3, norm={"kind": "batch", "initial_gain": 0.1})
    assert torch.equal(layer.norm_hh_l0.weight, torch.full((12,), 0.1))


def test_records_of_a_failed_call_are_dropped():
    layer = stirred(an.GRU(2, 3, norm="batch", dtype=torch.float64), 0)
    xs = sequence("normal", 0, (3, 4, 2))
    with pytest.raises((ValueError, RuntimeError)):
        layer(xs.float())
    layer(xs)
    fresh = stirred(an.GRU(2, 3, norm="batch", dtype=torch.float64), 0)
    fresh.load_state_dict(dict(layer.named_parameters()), strict=False)
    fresh(xs)
    compare(buffers(layer.norm_hh_l0), buffers(fresh.norm_hh_l0), tolerance=0)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_momentum_of_zero_freezes_the_populations(backend):
    layer: Any = an.RNN(2, 3, norm="batch", window=2, backend=backend)
    for norm in (layer.norm_ih_l0, layer.norm_hh_l0):
        norm.momentum = 0.0  # as users of torch's batch norms do
        norm.running_mean.fill_(7.0)
    layer(torch.randn(4, 5, 2))
    assert (layer.norm_ih_l0.running_mean == 7).all() and (layer.norm_hh_l0.running_var == 1).all()
    assert layer.norm_ih_l0.num_batches_tracked > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("gate", [0, 1])
def test_gates_in_different_modes_are_rejected(gate, backend):
    layer: Any = an.GRU(2, 3, norm="batch", placement={"gates": "per_gate"}, backend=backend)
    layer.norm_ih_l0.gates[gate].eval()
    with pytest.raises(ValueError, match=r"^gates: got .*Moments, .*; expected one class of statistic: gates of one"):
        layer(torch.randn(4, 5, 2))


def test_running_statistics_cannot_be_switched_off():
    norm = an.BatchNorm(3)
    with pytest.raises(ValueError, match="track_running_stats: got False; expected True, since evaluation"):
        norm.track_running_stats = False
    norm.track_running_stats = True
    assert norm.track_running_stats
