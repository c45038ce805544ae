"""Batch statistics: values, states, gradients and populations, in training and in evaluation."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.batched import MIXED, NORMS, SIZES, STRUCTURES, a_pair, both, check, fits, made
from tests.native.strategies import CELLS, EXACT, WINDOWS, agree, functional, needs_kernels, outcome

pytestmark = needs_kernels


@pytest.mark.parametrize(
    "place", [pytest.param(at, marks=pytest.mark.deep if at % 7 > 3 else ()) for at in range(len(STRUCTURES))]
)
def test_every_structure(place):
    cell, norm, window, training = STRUCTURES[place]
    hidden, batch = SIZES[place % len(SIZES)]
    steps, before = [1, 3, 4, 5, 9][place % 5], [None, 2, 5][place % 3]
    # two or three rows may be almost equal in a feature, where one step of a norm magnifies roundings 300 times
    batch = max(batch, 4) if cell == "relu" or window == "1" else batch
    pair = a_pair(cell, norm, window, hidden, batch, steps, 3, place, ragged=place % 2 == 1, before=before)
    check(pair, training, 10 * EXACT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "per step", "batch, layer", "traced, batch"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_statistics_per_gate(cell, norm, training):
    """Same numbers, with states of another shape."""
    for window, before in (("4", 3), ("exponential", None)):
        check(a_pair(cell, norm, window, 35, per_gate=True, before=before, ragged=True), training)


@given(
    st.sampled_from(sorted(CELLS)),
    st.sampled_from([name for name in NORMS if fits("gru", name)]),
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
        agree(found, expected, 1e-8)  # includes nearly singular batches
        compare(populations, others, tolerance=1e-9)


def test_a_long_sequence_of_many_rows():
    """More steps than a chunk of the backward pass, several blocks of units, and windows longer than a chunk."""
    for cell, window in itertools.product(("lstm", "gru"), ("4", "100", "cumulative")):
        for norm in ("batch", "rms, per step"):
            check(a_pair(cell, norm, window, 40, 70, 20, 66, ragged=True, before=3))


@pytest.mark.parametrize("norm", MIXED)
def test_mixed_norms_in_layers_and_directions(norm):
    for options in (
        {"num_layers": 2, "bidirectional": True},
        {"bias": False},
        {"window": {"kind": "detached", "window": 3}},
    ):
        before = None if "bidirectional" in options else 2
        check(a_pair("lstm", norm, hidden=9, batch=6, ragged=True, before=before, options=options))


@pytest.mark.parametrize(("cell", "norm"), [(c, n) for c in CELLS for n in ("batch", *MIXED) if fits(c, n)])
def test_rows_end_until_one_and_then_none_remains(cell, norm):
    """A step with one row has no deviation; steps without rows have no effect, with any padding."""
    pair, lengths = a_pair(cell, norm, window="1", batch=4, steps=7), torch.tensor([5, 1, 0, 2])
    dead = torch.arange(7)[:, None] >= lengths
    dirty = pair.xs().masked_fill(dead[..., None], float("nan"))
    results = [outcome(pair.layer(b), x, None, lengths) for b, x in (("native", dirty), ("reference", pair.xs()))]
    agree(results[0], results[1])
    assert (results[0].ys[dead] == 0).all()


@pytest.mark.parametrize("norm", ["batch", *MIXED])
@pytest.mark.parametrize("training", [True, False])
def test_all_rows_are_masked(training, norm):
    pair, none = a_pair(norm=norm, before=5), torch.zeros(5, dtype=torch.int64)
    layer = made(pair, "native", training)
    before = [buffer.clone() for buffer in layer.buffers()]
    agree(
        outcome(layer, pair.xs(), pair.state(), none),
        outcome(made(pair, "reference", training), pair.xs(), pair.state(), none),
        0,
    )
    compare(list(layer.buffers()), before, tolerance=0)


@pytest.mark.parametrize("norm", ["batch", "per step", "batch, layer", "rms, per step"])
@pytest.mark.parametrize("graph", [True, False])
def test_populations_equal_those_of_the_reference(norm, graph):
    """Train on three sequences, the last as a stream; then evaluate, also with one row."""
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
    assert tracked.flatten()[0] == (2 if "per step" in norm else 3)  # later steps of a stream have later indices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("window", ["1", "4", "cumulative", "exponential"])
@pytest.mark.parametrize("norm", ["per step", "rms, per step"])
@pytest.mark.parametrize("cell", CELLS)
def test_segments_on_either_backend_equal_the_whole(cell, norm, window, training):
    pair = a_pair(cell, norm, window, 5, 4, 9)
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


def test_copies_of_a_shared_state_are_used_once():
    pair, order = a_pair(before=4, window="4"), torch.tensor([2, 0, 4, 4, 1])
    for state in (an.reorder(pair.state(), order), pair.state()):
        results = [pair.layer(backend).unroll(pair.xs(), state) for backend in ("native", "reference")]
        compare(*[[ys, *leaves(after)] for ys, after in results], tolerance=EXACT)
    rows = torch.zeros(5, dtype=torch.int64)
    carried, norms = pair.state()[0][0]
    carried, norms = (
        tuple(c[:1] for c in carried),
        an.reorder(norms, rows),
    )  # the state of one row: every leaf has five entries
    wide = (((an.reorder(carried, rows), norms),),)
    assert norms[0][0].shape == (5,)
    results = [pair.layer(backend).unroll(pair.xs(), wide) for backend in ("native", "reference")]
    compare(*[[ys, *leaves(after)] for ys, after in results], tolerance=EXACT)


@pytest.mark.parametrize("change", [lambda leaf: leaf[:, :1], lambda leaf: leaf[..., :2], lambda leaf: leaf.long()])
def test_an_incompatible_state_is_rejected(change):
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
@pytest.mark.parametrize("norm", ["batch", "batch, layer"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_from_each_result_alone(cell, norm, window, training):
    pair = a_pair(cell, norm, window, batch=4, ragged=True, before=2, seed=5)
    runs = []
    for backend in ("native", "reference"):
        layer, xs = made(pair, backend, training), pair.xs().requires_grad_()
        ys, after = layer.unroll(xs, pair.state(), pair.lengths())
        carried, norms = after[0][0]
        ends = [
            ys,
            *carried,
            *(leaf for _, (_, moments) in filter(None, norms) for leaf in moments[:2] if leaf.numel()),
        ]
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
    ("cell", "norm", "window"),
    [
        ("lstm", "per step", "4"),
        ("gru", "batch", "cumulative"),
        ("tanh", "hh", "1"),
        ("lstm", "batch, layer, batch", "4"),
        ("gru", "traced, batch", "1"),
    ],
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
