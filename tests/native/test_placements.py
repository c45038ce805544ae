"""Joint sums, a normed carry and projections on the native backend: results equal those of the reference."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import atn_norms as an
from atn_norms.backends.fused.plan import Plan, SitePlan
from tests.compare import compare
from tests.laws.strategies import level
from tests.native.batched import check as check_batch
from tests.native.strategies import EXACT, Pair, agree, check, functional, needs_kernels, outcome
from tests.traced.gallery import GallerySpec

pytestmark = needs_kernels

PLACEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm joint": ("lstm", {"sum": "joint"}),
    "lstm normed": ("lstm", {"carry": "normed"}),
    "lstm joint normed": ("lstm", {"sum": "joint", "carry": "normed"}),
    "tanh joint": ("tanh", {"sum": "joint"}),
    "relu joint": ("relu", {"sum": "joint"}),
    "lstm projected": ("lstm", {}),
    "lstm joint normed projected": ("lstm", {"sum": "joint", "carry": "normed"}),
}
PROJECTED = [name for name in PLACEMENTS if "projected" in name]
NORMS: dict[str, Any] = {
    "layer": "layer",
    "rms": {"kind": "rms", "bias": True},
    "batch": "batch",
    "traced": GallerySpec(name="TwoSided"),
    "stateless": GallerySpec(name="DynamicTanh"),
    "c": {"sites": {"c": "layer"}},
    "sum": {"sites": {"sum": "layer"}},
    "mixed": {"sites": {"sum": "rms", "c": GallerySpec(name="TwoSided")}},
    "batch, layer": {"sites": {"sum": "batch", "c": "layer"}},
    "traced, batch": {"sites": {"sum": GallerySpec(name="TwoSided"), "c": "batch"}},
}
BATCH = ["batch", "batch, layer", "traced, batch"]


def pair_of(name: str, norm: str = "layer", gates: str = "joint", **fields: Any) -> Pair:
    """Return a pair of layers with a placement; a projection has half the hidden units, rounded up."""
    cell, placement = PLACEMENTS[name]
    own = {"placement": placement | {"gates": gates}, "norm": NORMS[norm]} | fields.pop("options", {})
    if name in PROJECTED:
        fields["hidden"] = max(2, fields.get("hidden", 3))
        own["proj_size"] = max(1, fields["hidden"] // 2)
    return Pair(cell, options=own, **fields)


def fits(name: str, norm: str) -> bool:
    """Return whether a placement has the sites of a norm."""
    sites = NORMS[norm]["sites"] if isinstance(NORMS[norm], dict) and "sites" in NORMS[norm] else {}
    missing = ("sum" in sites and "joint" not in name) or ("c" in sites and "lstm" not in name)
    return not missing


CASES = [(name, norm) for name in PLACEMENTS for norm in NORMS if fits(name, norm)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_norm_in_every_placement(name, norm, ragged):
    pair = pair_of(name, norm, batch=4, steps=6, hidden=5, ragged=ragged, before=3 if ragged else None)
    (check_batch if norm in BATCH else check)(pair)
    if norm in BATCH:
        check_batch(pair, training=False)


@pytest.mark.parametrize("window", ["1", "2", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("gates", ["joint", "per_gate"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_window_and_separate_gates(name, gates, window):
    check(pair_of(name, gates=gates, window=window, batch=3, steps=7, ragged=True, before=2, inputs=70))
    check_batch(pair_of(name, "batch", gates, window=window, batch=5, steps=7, ragged=True, before=2, inputs=70))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_layers_and_directions(name):
    check(pair_of(name, batch=3, steps=6, ragged=True, options={"num_layers": 2, "bidirectional": True}))
    check(pair_of(name, batch=3, steps=6, before=2, options={"num_layers": 2, "bias": False}))


@pytest.mark.parametrize("norm", ["layer", *BATCH])
@pytest.mark.parametrize("name", ["lstm joint normed", "tanh joint", *PROJECTED])
def test_more_rows_and_units_than_a_block(name, norm):
    if not fits(name, norm):
        return
    pair = pair_of(name, norm, batch=37, steps=31, hidden=37, ragged=True, before=2)  # more steps than a chunk
    (check_batch if norm in BATCH else check)(pair)


@pytest.mark.parametrize(("name", "hidden"), [("lstm joint normed", 184), ("lstm projected", 260)])
def test_threads_that_share_large_weights(name, hidden):
    """Above a megabyte of recurrent weights, the threads share the work of each step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(pair_of(name, batch=40, steps=4, hidden=hidden, ragged=True), tolerance=1e-9)
        check_batch(pair_of(name, "batch", batch=40, steps=4, hidden=hidden, ragged=True), tolerance=1e-9)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_second_derivatives_and_transforms(name):
    pair = pair_of(name, batch=2, steps=3)
    found = []
    for backend in ("native", "reference"):
        layer, xs = pair.layer(backend), pair.xs().requires_grad_()
        parameters = [xs, *layer.parameters()]
        first = torch.autograd.grad(functional([layer(xs)[0]]), parameters, create_graph=True)
        second = torch.autograd.grad(functional(first), parameters)
        rows = torch.func.vmap(lambda x, layer=layer: layer(x)[0], in_dims=1, out_dims=1)(xs.detach())
        slope = torch.func.grad(lambda x, layer=layer: layer(x)[0].square().sum())(xs.detach())
        found.append((first, second, rows, slope))
    compare(found[0], found[1], tolerance=EXACT, scale=level(*found[1][1]))


def test_a_compiled_layer_holds_the_operator():
    torch._dynamo.reset()
    pair = pair_of("lstm joint normed", batch=2, steps=4, dtype=torch.float32)
    layer = pair.layer("native")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compare(compiled(pair.xs()), layer(pair.xs()), tolerance=1e-6)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_float32_and_half_precision(name):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        pair = pair_of(name, batch=3, steps=5, dtype=dtype)
        ys = pair.layer("native")(pair.xs())[0]
        assert ys.dtype == dtype
        compare(ys.double(), pair.layer("reference", torch.float64)(pair.xs().double())[0], tolerance=tolerance)


@settings(max_examples=30)
@given(st.sampled_from(CASES), st.integers(1, 20), st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**20))
def test_any_size(case, hidden, batch, steps, seed):
    name, norm = case
    sizes = {"hidden": hidden, "batch": batch + 3 * (norm in BATCH), "steps": steps}
    pair = pair_of(name, norm, **sizes, seed=seed, ragged=True, before=[None, 0, 3][seed % 3])
    if norm in BATCH:
        check_batch(pair, training=seed % 2 == 0, tolerance=1e-8)  # includes nearly singular batches
    else:
        check(pair)


def test_two_backends_continue_each_other():
    pair = pair_of("lstm joint normed", batch=3, steps=8, ragged=False)
    native, reference = pair.layer("native"), pair.layer("reference")
    whole = outcome(reference, pair.xs())
    first, state = native.unroll(pair.xs()[:3])
    second, after = reference.unroll(pair.xs()[3:5], state)
    third, _ = native.unroll(pair.xs()[5:], after)
    compare(torch.cat([first, second, third]).detach(), whole.ys, tolerance=EXACT)
    agree(outcome(native, pair.xs()), whole)


def test_auto_selects_the_native_backend():
    for name in PLACEMENTS:
        assert "backend 'native'" in an.explain(pair_of(name).layer("auto"))


def test_a_stream_of_a_projected_layer_takes_few_rows_and_steps():
    """Weights are not packed for so few."""
    pair = pair_of("lstm projected", batch=2, steps=12, hidden=9)
    native = pair.layer("native")
    whole, state, parts = outcome(pair.layer("reference"), pair.xs()), None, []
    for xs in pair.xs().split(3):
        ys, state = native.unroll(xs, state)
        parts.append(ys)
    compare(torch.cat(parts).detach(), whole.ys, tolerance=EXACT)


def test_projected_layers_count_their_products():
    layer = an.LSTM(2, 6, norm="layer", proj_size=3)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, 4, 2))
    assert counter.get_total_flops() == 2 * 5 * 4 * (24 * 2 + 24 * 3 + 3 * 6)


def test_a_plan_has_the_blocks_of_features_that_its_kernels_expect():
    """Layers of batch norms alone run in blocks of hidden units; others have one group of features at a site."""
    site = SitePlan("ih", 24, 4, True, (1e-5,), 1, 1.0, True, True, (24,), coupled=1)
    single = site._replace(groups=1)
    rows = SitePlan("hh", 24, 1, True, (1e-5,), 1, 1.0, True, True, (1,))
    Plan("lstm", (site,)).check(6)
    Plan("lstm-projected", (single,)).check(6)
    Plan("lstm", (single, rows)).check(6)
    for cell, sites in (("lstm", (single,)), ("lstm-projected", (site,)), ("lstm", (site, rows))):
        with pytest.raises(ValueError, match="plan: got .*; expected a site of 24 features"):
            Plan(cell, sites).check(6)


@pytest.mark.parametrize("first", ["", "import importlib.util; importlib.util.find_spec('torch.utils.flop_counter')"])
def test_products_are_counted_if_torch_imports_its_counter_after_the_operators(first):
    code = f"""
import sys, torch
import atn_norms as an
layer = an.LSTM(2, 3, norm="layer", backend="native")
assert "torch.utils.flop_counter" not in sys.modules
{first}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, torch.no_grad():
    layer(torch.zeros(5, 4, 2))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 5 * 4 * 12 * (2 + 3)
