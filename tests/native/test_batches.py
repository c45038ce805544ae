"""Norms over the rows of a batch: values, states, gradients and populations, in training and in evaluation."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from atn_norms.backends.native import library
from tests.compare import compare
from tests.laws.cases import REGIMES, leaves, level, sequence
from tests.native.cases import CELLS, EXACT, WINDOWS, Outcome, Pair, agree, functional, needs_kernels, outcome
from tests.native.test_digits import ULPS, WIDTH, exact_products, normalization_alone
from tests.native.test_operators import Recorded, poisoned

pytestmark = needs_kernels
__all__ = ["poisoned"]  # a fixture

BATCH = {"kind": "batch", "momentum": 0.3}
PER_STEP = {"kind": "batch", "max_steps": 4, "momentum": None}
NORMS = {
    "batch": BATCH,
    "per step": PER_STEP,
    "ih": {"sites": {"ih": BATCH}},
    "hh": {"sites": {"hh": PER_STEP}},
    "c": {"sites": {"c": BATCH}},
    "eps": {"sites": {"ih": PER_STEP, "hh": {"kind": "batch", "eps": 1e-2}}},
}
STRUCTURES = [
    case
    for case in itertools.product(CELLS, NORMS, ["1", "4", "cumulative", "exponential"], [True, False])
    if case[1] != "c" or case[0] == "lstm"
]
SIZES = [(1, 2), (3, 5), (17, 33), (32, 3), (33, 2), (60, 5), (65, 7), (97, 4)]  # hidden, batch: blocks are of 32 units


def a_pair(cell="lstm", norm="batch", window="4", hidden=3, batch=5, steps=5, inputs=2, seed=0, **fields) -> Pair:
    options = {"norm": NORMS[norm]} | fields.pop("options", {})
    return Pair(cell, "layer", window, hidden, batch, steps, inputs, seed, options=options, **fields)


def made(pair, backend, training=True, dtype=None):
    """The layer; in evaluation with populations that no batch has."""
    layer = pair.layer(backend, dtype)
    if training:
        return layer
    source = torch.Generator().manual_seed(pair.seed)
    for name, buffer in layer.named_buffers():
        if name.endswith("tracked"):
            buffer.fill_(3)
        else:
            numbers = torch.rand(buffer.shape, generator=source, dtype=torch.float64)
            buffer.copy_(numbers + (0.5 if name.endswith("var") else -0.5))
    return layer.eval()


def both(pair, training=True):
    """What either backend gives, and its populations afterwards."""
    results = []
    for backend in ("native", "reference"):
        layer = made(pair, backend, training)
        found = outcome(layer, pair.xs(), pair.state(), pair.lengths())
        results.append((found, list(layer.buffers())))
    return results


def check(pair, training=True, tolerance=EXACT):
    (found, populations), (expected, others) = both(pair, training)
    agree(found, expected, tolerance)
    compare(populations, others, tolerance=1e-11, what="population")


@pytest.mark.parametrize("place", range(len(STRUCTURES)))
def test_every_structure(place):
    cell, norm, window, training = STRUCTURES[place]
    hidden, batch = SIZES[place % len(SIZES)]
    steps, before = [1, 3, 4, 5, 9][place % 5], [None, 2, 5][place % 3]
    # two or three rows may all but agree in a feature, where one step of a norm magnifies roundings 300 times
    batch = max(batch, 4) if cell == "relu" or window == "1" else batch
    pair = a_pair(cell, norm, window, hidden, batch, steps, 3, place, ragged=place % 2 == 1, before=before)
    check(pair, training, 10 * EXACT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "per step"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gate_by_gate(cell, norm, training):
    """The same numbers, in states of another shape."""
    for window, before in (("4", 3), ("exponential", None)):
        check(a_pair(cell, norm, window, 35, per_gate=True, before=before, ragged=True), training)


@given(
    st.sampled_from(sorted(CELLS)),
    st.sampled_from([name for name in NORMS if name != "c"]),
    st.sampled_from(sorted(WINDOWS)),
    st.integers(1, 40),
    st.integers(4, 20),
    st.integers(1, 7),
    st.integers(1, 70),
    st.integers(0, 2**20),
    st.sampled_from([None, 0, 1, 3, 6]),
    st.booleans(),
)
def test_any_structure(cell, norm, window, hidden, batch, steps, inputs, seed, before, ragged):
    options = {} if before is not None else {"bidirectional": seed % 2 == 0, "num_layers": 1 + seed % 3 % 2}
    pair = a_pair(cell, norm, window, hidden, batch, steps, inputs, seed, before=before, ragged=ragged, options=options)
    for training in (True, False):
        (found, populations), (expected, others) = both(pair, training)
        agree(found, expected, 1e-8)  # any batch, near singular ones too
        compare(populations, others, tolerance=1e-9)


def test_a_long_sequence_of_many_rows():
    """More steps than a chunk of the way back holds, more than one block of units, and windows that outlast it."""
    for cell, window in itertools.product(("lstm", "gru"), ("4", "100", "cumulative")):
        check(a_pair(cell, "batch", window, 40, 70, 20, 66, ragged=True, before=3))


@pytest.mark.parametrize("cell", CELLS)
def test_rows_end_until_one_and_then_none_is_left(cell):
    """A step of one row has no deviation; behind the last row nothing happens, whatever is in the padding."""
    pair, lengths = a_pair(cell, window="1", batch=4, steps=7), torch.tensor([5, 1, 0, 2])
    dead = torch.arange(7)[:, None] >= lengths
    dirty = pair.xs().masked_fill(dead[..., None], float("nan"))
    results = [outcome(pair.layer(b), x, None, lengths) for b, x in (("native", dirty), ("reference", pair.xs()))]
    agree(results[0], results[1])
    assert (results[0].ys[dead] == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_no_row_is_alive(training):
    pair, none = a_pair(before=5), torch.zeros(5, dtype=torch.int64)
    layer = made(pair, "native", training)
    before = [buffer.clone() for buffer in layer.buffers()]
    agree(
        outcome(layer, pair.xs(), pair.state(), none),
        outcome(made(pair, "reference", training), pair.xs(), pair.state(), none),
        0,
    )
    compare(list(layer.buffers()), before, tolerance=0)


@pytest.mark.parametrize("norm", ["batch", "per step"])
@pytest.mark.parametrize("graph", [True, False])
def test_populations_are_what_the_reference_records(norm, graph):
    """Three training sequences, the last in a stream, then evaluation, of one row too."""
    pair, runs = a_pair(norm=norm, steps=6, hidden=9, options={"bidirectional": False}), []
    for backend in ("native", "reference"):
        layer, state = pair.layer(backend), None
        with torch.set_grad_enabled(graph):
            layer.unroll(pair.xs())
            _, state = layer.unroll(3 * pair.xs()[:3], None, torch.tensor([3, 1, 0, 2, 3]))
            _, state = layer.unroll(pair.xs()[2:] - 1, state)
        recorded = [buffer.clone() for buffer in layer.buffers()]
        layer.eval()
        whole, after = layer.unroll(pair.xs())
        alone, _ = layer.unroll(pair.xs()[:, 2:3])
        compare(alone, whole[:, 2:3], tolerance=EXACT)
        compare(list(layer.buffers()), recorded, tolerance=0)
        runs.append((recorded, whole, leaves(after)))
    for found, expected in zip(*runs, strict=True):
        compare(found, expected, tolerance=EXACT)
    tracked = next(b for name, b in layer.named_buffers() if name.endswith("tracked"))
    assert tracked.flatten()[0] == (2 if norm == "per step" else 3)  # a stream's later steps have later indices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("window", ["1", "4", "cumulative", "exponential"])
@pytest.mark.parametrize("cell", CELLS)
def test_segments_on_either_backend_are_the_whole(cell, window, training):
    pair = a_pair(cell, "per step", window, 5, 4, 9)
    results = []
    for backends in (["native", "reference"] * 4 + ["native"], ["reference"]):
        layers = [made(pair, backend, training) for backend in backends]
        xs, state, parts = pair.xs().requires_grad_(), None, []
        for layer, x in zip(layers, xs.chunk(len(layers)), strict=True):
            ys, state = layer.unroll(x, state)
            parts.append(ys)
        ends = [torch.cat(parts), *(leaf for leaf in leaves(state) if leaf.is_floating_point())]
        weights = [p for layer in layers for p in layer.parameters()]
        found = torch.autograd.grad(functional(ends), [xs, *weights])
        many = len(list(layers[0].parameters()))
        shared = [torch.stack(found[1 + i :: many]).sum(0) for i in range(many)]
        results.append((torch.cat(parts), leaves(state), [found[0], *shared]))
    for found, expected in zip(*results, strict=True):
        compare(found, expected, tolerance=10 * EXACT, scale=max(1.0, level(*results[1][2])))


def test_copies_of_a_state_are_taken_once():
    pair, order = a_pair(before=4, window="4"), torch.tensor([2, 0, 4, 4, 1])
    for state in (an.reorder(pair.state(), order), pair.state()):
        results = [pair.layer(backend).unroll(pair.xs(), state) for backend in ("native", "reference")]
        compare(*[[ys, *leaves(after)] for ys, after in results], tolerance=EXACT)
    rows = torch.zeros(5, dtype=torch.int64)
    carried, norms = pair.state()[0][0]
    carried, norms = (
        tuple(c[:1] for c in carried),
        an.reorder(norms, rows),
    )  # of a batch of one row: every leaf has five
    wide = (((an.reorder(carried, rows), norms),),)
    assert norms[0][0].shape == (5,)
    results = [pair.layer(backend).unroll(pair.xs(), wide) for backend in ("native", "reference")]
    compare(*[[ys, *leaves(after)] for ys, after in results], tolerance=EXACT)


@pytest.mark.parametrize("change", [lambda leaf: leaf[:, :1], lambda leaf: leaf[..., :2], lambda leaf: leaf.long()])
def test_a_state_that_does_not_fit_is_refused(change):
    pair = a_pair(before=5, window="4")
    (((carried, ((index, (weights, statistic)), *others)),),) = pair.state()
    for place in range(3):
        spoiled = tuple(change(leaf) if i == place else leaf for i, leaf in enumerate(statistic))
        if all(
            leaf.shape == old.shape and leaf.dtype == old.dtype for leaf, old in zip(spoiled, statistic, strict=True)
        ):
            continue
        with pytest.raises(ValueError, match="state: "):
            pair.layer("native").unroll(pair.xs(), (((carried, ((index, (weights, spoiled)), *others)),),))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("window", ["1", "4", "cumulative"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_from_each_result_alone(cell, window, training):
    pair = a_pair(cell, window=window, batch=4, ragged=True, before=2, seed=5)
    runs = []
    for backend in ("native", "reference"):
        layer, xs = made(pair, backend, training), pair.xs().requires_grad_()
        ys, after = layer.unroll(xs, pair.state(), pair.lengths())
        carried, norms = after[0][0]
        ends = [ys, *carried, *(leaf for _, (_, (*moments, _)) in norms for leaf in moments if leaf.numel())]
        runs.append((ends, [xs, *layer.parameters()]))
    for place in range(len(runs[0][0])):
        found, expected = (
            [
                torch.zeros_like(w) if g is None else g
                for g, w in zip(
                    torch.autograd.grad(functional([ends[place]]), wanted, retain_graph=True, allow_unused=True),
                    wanted,
                    strict=True,
                )
            ]
            for ends, wanted in runs
        )
        compare(found, expected, tolerance=10 * EXACT, scale=level(*expected), what=f"result {place}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("cell", "norm", "window"), [("lstm", "per step", "4"), ("gru", "batch", "cumulative"), ("tanh", "hh", "1")]
)
def test_gradients_of_gradients(cell, norm, window, training):
    pair, results = a_pair(cell, norm, window, 3, 5, 4, before=3, ragged=True), []
    for backend in ("native", "reference"):
        layer = made(pair, backend, training)
        once = outcome(layer, pair.xs(), pair.state(), pair.lengths(), retain=True)
        penalty = functional([g for g in once.gradients if g.requires_grad])
        again = torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True)
        results.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(again, layer.parameters(), strict=True)]
            + list(layer.buffers())
        )
    compare(results[0], results[1], tolerance=1e-8, scale=level(*results[1]))


@pytest.mark.parametrize("hidden", [9, 70, 130])
@pytest.mark.parametrize("cell", ["lstm", "gru", "relu"])
def test_the_number_of_threads_changes_no_bit(cell, hidden):
    pair = a_pair(cell, "batch", "4", hidden, 40, 12, 5, before=3, dtype=torch.float32)
    given = pair.xs(), pair.state()
    results: list[tuple[Outcome, list[torch.Tensor]]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer = pair.layer("native")
            results.append((outcome(layer, *given), list(layer.buffers())))
    finally:
        torch.set_num_threads(1)
    for found, buffers in results[1:]:
        agree(found, results[0][0], 0)
        compare(buffers, results[0][1], tolerance=0)


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(limit, dtype):
    kernels = library.load()
    assert isinstance(kernels, library.Library)
    try:
        kernels.level(limit)
        for cell in ("lstm", "gru", "relu"):
            pair = a_pair(cell, "batch", "4", 35, 9, 6, 5, before=2, ragged=True, dtype=dtype)
            found = outcome(pair.layer("native"), pair.xs(), pair.state(), pair.lengths())
            exact = replace(pair, dtype=torch.float32)
            expected = outcome(
                exact.layer("reference", torch.float64), pair.xs().double(), pair.state(torch.float64), pair.lengths()
            )
            if dtype == torch.float64:
                expected = outcome(pair.layer("reference"), pair.xs(), pair.state(), pair.lengths())
            tolerance = 10 * EXACT if dtype == torch.float64 else 2e-4
            compare(found.ys.double(), expected.ys, tolerance=tolerance)
            compare(
                [g.double() for g in found.gradients],
                expected.gradients,
                tolerance=tolerance,
                scale=level(*expected.gradients),
            )
    finally:
        kernels.level(2)


@pytest.mark.parametrize("window", ["1", "4", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalization_keeps_its_digits_in_every_regime(dtype, regime, window):
    """1e4 with deviations of 1e-2, spikes, constants, 1e-20, 1e30, drift; given identical pre-activations."""
    pair = a_pair("relu", "ih", window, WIDTH, 6, 24, WIDTH, dtype=dtype)
    xs = sequence(regime, 7, (24, 6, WIDTH)).to(dtype)
    for sign in (1, -1):
        results = []
        for backend, kind in (("native", dtype), ("reference", torch.float64)):
            layer = pair.layer(backend, kind)
            with torch.no_grad():
                normalization_alone(sign)(layer)
            ys, after = layer.unroll(xs.to(kind))
            results.append((ys.detach().double(), leaves(after)[2:], [b.double() for b in layer.buffers()]))
        (ys, state, populations), (expected, final, others) = results
        if dtype == torch.float32:
            tolerance = ULPS
        else:  # both sides round: centring costs |x| / sqrt(v + eps)
            smallest = xs.var(1, correction=0).min()
            tolerance = 64 * torch.finfo(dtype).eps * max(1.0, float(xs.abs().max()) / float(smallest + 1e-5) ** 0.5)
        compare(ys, expected, tolerance=tolerance)
        for mine, theirs in zip(state, final, strict=True):
            compare(mine, theirs, tolerance=1e-12, scale=level(theirs))
        for mine, theirs in zip(populations, others, strict=True):
            stored = theirs.to(dtype).double()  # infinite where float32 ends
            compare(mine, stored, tolerance=2 * torch.finfo(dtype).eps + 1e-12, scale=level(theirs))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_keep_their_digits(cell):
    """In float32, required where well conditioned: 1e-5 of each gradient's norm."""
    pair = a_pair(cell, "batch", "4", 64, 32, 20, 10, seed=1, before=5, dtype=torch.float32)
    found = outcome(pair.layer("native"), pair.xs(), pair.state())
    expected = outcome(pair.layer("reference", torch.float64), pair.xs().double(), pair.state(torch.float64))
    for place, (mine, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        # biases before a norm over the batch have no gradient at all but through the given state
        floor = 1e-3 * level(*expected.gradients)
        error = float((mine.double() - theirs).norm() / theirs.norm().clamp(min=floor))
        assert error <= 1e-5, f"gradient {place}: {error:.2g} of its norm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_in_evaluation_a_nan_stays_in_its_row(cell, dtype):
    pair = a_pair(cell, "per step", "4", 35, 5, 6, 3, dtype=dtype)
    layer, others, runs = made(pair, "native", training=False), [0, 2, 3, 4], []
    for value in (0.5, float("nan")):
        xs = pair.xs()
        xs[2, 1, 0] = value
        xs.requires_grad_()
        ys, _ = layer.unroll(xs)
        runs.append((ys, torch.autograd.grad(functional([ys]), xs)[0]))
    (ys, gradient), (poisoned_ys, reached) = runs
    compare(poisoned_ys[:, others], ys[:, others], tolerance=0)
    assert poisoned_ys[2:, 1].isnan().all() and not poisoned_ys[:2].isnan().any()
    compare(reached[:, others], gradient[:, others], tolerance=0)


@pytest.mark.parametrize("cell", CELLS)
def test_in_training_a_nan_is_in_its_feature_for_all(cell):
    layer, xs = a_pair(cell, "ih", "1", 5, 4, 1).layer("native"), torch.ones(1, 4, 2).double()
    xs[0, 1, 0] = float("nan")
    assert layer(xs)[0].isnan().all()


PAIRS = [
    a_pair("lstm", "batch", "4", batch=4, ragged=True, before=2),
    a_pair("gru", "per step", "cumulative", per_gate=True, dtype=torch.float32),
    a_pair("tanh", "hh", "exponential", before=3, options={"bias": False}),
    a_pair("relu", "ih", "1", inputs=66, hidden=35, dtype=torch.float32),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.cell}-{pair.window}")
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(pair, training):
    with Recorded() as recorded:
        ys, _ = made(pair, "native", training).unroll(pair.xs(), pair.state(), pair.lengths())
        ys.square().sum().backward()
    assert [func.overloadpacket for func, _ in recorded.calls] == [
        torch.ops.atn_norms.recurrent,
        torch.ops.atn_norms.recurrent_backward,
    ]
    for func, args in recorded.calls:
        differentiable = func.overloadpacket is torch.ops.atn_norms.recurrent

        def fresh(arg, differentiable=differentiable):
            if isinstance(arg, (list, tuple)):
                return [fresh(each) for each in arg]
            if not isinstance(arg, torch.Tensor):
                return arg
            return arg.detach().clone().requires_grad_(differentiable and arg.is_floating_point())

        found = torch.library.opcheck(func, tuple(fresh(arg) for arg in args))
        assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("norm", ["batch", "per step"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiled_without_a_graph_break(cell, norm):
    """Training, which records a population, and evaluation with it."""
    torch._dynamo.reset()
    pair = a_pair(cell, norm, "4", 7, 4, 6, dtype=torch.float32)
    layers = pair.layer("native"), pair.layer("native")
    compiled = torch.compile(layers[0], fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        results = []
        for run, layer in ((compiled, layers[0]), (layers[1], layers[1])):
            layer.train(training)
            ys, last = run(pair.xs())
            found = torch.autograd.grad(functional([ys, *leaves(last)]), list(layer.parameters()))
            results.append(([ys, *leaves(last)], found, [b.clone() for b in layer.buffers()]))
        compare(results[0][0], results[1][0], tolerance=1e-6)
        compare(results[0][1], results[1][1], tolerance=1e-6, scale=level(*results[1][1]))
        compare(results[0][2], results[1][2], tolerance=1e-6)


@pytest.mark.parametrize("window", ["1", "4", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_reads_what_nobody_wrote(window, training, poisoned):
    for cell, ragged, before, inputs in (("lstm", True, 2, 66), ("gru", False, None, 3), ("tanh", True, None, 3)):
        pair = a_pair(cell, "batch", window, 37, 5, 6, inputs, ragged=ragged, before=before, dtype=torch.float32)
        layer = made(pair, "native", training)
        found = outcome(layer, pair.xs(), pair.state(), pair.lengths())
        tensors = (found.ys, *found.state, *found.gradients, *layer.buffers())
        assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())


def test_without_a_graph_the_numbers_are_those_of_training():
    for pair, training in itertools.product(PAIRS, (True, False)):
        layers = [made(pair, "native", training) for _ in range(2)]
        ys, after = layers[0].unroll(pair.xs(), pair.state(), pair.lengths())
        with torch.no_grad():
            quiet, state = layers[1].unroll(pair.xs(), pair.state(), pair.lengths())
        assert ys.requires_grad and not any(leaf.requires_grad for leaf in [quiet, *leaves(state)])
        compare([quiet, *leaves(state)], [ys, *leaves(after)], tolerance=0)
        compare(list(layers[1].buffers()), list(layers[0].buffers()), tolerance=0)


def test_one_row_is_refused_in_training_as_it_always_was():
    pair = a_pair(batch=1)
    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            pair.layer(backend).unroll(pair.xs())
    check(pair, training=False)


class Doubled(an.BatchNorm):
    """A subclass that normalizes otherwise than the base class declares."""

    def normalize(self, x, pooled):
        return 2 * super().normalize(x, pooled)


def test_what_couples_rows_differently_is_refused():
    layer = an.LSTM(2, 3, norm={"sites": {"ih": "batch", "hh": "layer"}})
    assert "native: refuses: norms over the batch and norms of single rows are at different sites" in an.explain(layer)
    layer: Any = an.LSTM(2, 3, norm="batch")
    assert "backend 'native'" in an.explain(layer)
    layer.norm_ih_l0.__class__ = Doubled
    assert "the norm at ih (Doubled) is not declared as moments over features or over the batch" in an.explain(layer)
    gates: Any = an.LSTM(2, 3, norm="batch", placement={"gates": "per_gate"})
    assert "backend 'native'" in an.explain(gates)
    gates.norm_hh_l0.gates[1].eval()  # one gate with a population, the others with the batch
    assert "the norm at hh (PerGate) is not declared" in an.explain(gates)


def test_the_gates_keep_their_digits():
    """One step after exact products: float32 values within 4 ulp of the reference in float64."""
    for cell in CELLS:
        gates = {"lstm": 4, "gru": 3}.get(cell, 1)
        pair = a_pair(cell, "ih", "4", WIDTH, 8, 1, gates * WIDTH, dtype=torch.float32)
        results = []
        for backend, kind in (("native", torch.float32), ("reference", torch.float64)):
            layer = pair.layer(backend, kind)
            with torch.no_grad():
                exact_products(layer)
                layer.weight_hh_l0.zero_()
            results.append(layer.unroll(5 * pair.xs().to(kind))[0].double())
        compare(*results, tolerance=ULPS, what=cell)
