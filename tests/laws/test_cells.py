"""Every cell, normalizer and window equals the textbook form in outputs, states and all gradients."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from atn_norms.cells import Cell, Placement, RNNEquations, SiteStates, refuse
from atn_norms.testing import check_cell
from tests.compare import compare
from tests.laws.strategies import (
    BASES,
    CELLS,
    GATES,
    KINDS,
    LayerCase,
    layer_cases,
    lengths,
    level,
    seeds,
    textbook,
    window,
)

# Float64, sums of at most 30 terms, at most 6 steps; a norm over few features may magnify by 1 / sqrt(1e-5) = 316.
EXACT = 1e-10


def gradients(layer, ys, final, wanted, seed):
    """Return the gradients of a random functional of all outputs and states."""
    source = torch.Generator().manual_seed(seed)
    parts = [ys, *(final if isinstance(final, tuple) else [final])]
    weights = [torch.randn(part.shape, generator=source, dtype=part.dtype) for part in parts]
    found = torch.autograd.grad(parts, wanted, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def agrees(layer: Any, case: LayerCase, limit=None, groups=1, tolerance=EXACT, **placement):
    xs, hx = case.xs().requires_grad_(), case.hx(layer)
    starts = list(hx) if isinstance(hx, tuple) else [hx]
    for start in starts:
        start.requires_grad_()
    dirty = xs
    if limit is not None:
        mask = torch.arange(case.steps)[:, None] < limit
        dirty = torch.where(mask[..., None], xs, float("nan"))
    ys, state = layer.unroll(dirty, layer.initial(case.batch, hx), lengths=limit)
    final = layer.hidden(state)
    expected, last = textbook(layer, case, xs, hx, limit, groups=groups, **placement)
    compare(ys, expected, tolerance=tolerance, what="outputs")
    compare(final, last, tolerance=tolerance, what="final state")
    named = dict(layer.named_parameters())
    wanted = [xs, *starts, *named.values()]
    mine = gradients(layer, ys, final, wanted, case.seed)
    theirs = gradients(layer, expected, last, wanted, case.seed)
    # A gradient that is mathematically 0 (a bias under batch norm) is compared at the scale of the largest gradient.
    largest = level(*theirs)
    labels = ["x", "h", "c"][: 1 + len(starts)] + list(named)
    for label, a, b in zip(labels, mine, theirs, strict=True):
        compare(a, b, tolerance=tolerance, scale=largest, what=f"gradient of {label}")


@given(layer_cases())
def test_a_layer_is_the_textbook_form_in_values_and_all_gradients(case: LayerCase):
    agrees(case.layer(), case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_with_every_norm_over_every_kind_of_window(cell, base, kind):
    case = LayerCase(7, cell, base, kind, steps=7, batch=3, inputs=2, hidden=4)
    agrees(case.layer(), case)


@given(layer_cases(batch=(2, 4)))
def test_ragged_layers_are_the_textbook_form_over_unmasked_steps(case: LayerCase):
    agrees(case.layer(), case, lengths(case))


@given(layer_cases(cells=["LSTM"]))
def test_a_carried_normed_cell_is_the_textbook_form(case: LayerCase):
    agrees(case.layer(placement={"carry": "normed"}), case, normed=True)


@given(layer_cases(cells=["LSTM", "RNN"]))
def test_a_joint_norm_of_the_sum_is_the_textbook_form(case: LayerCase):
    agrees(case.layer(placement={"sum": "joint"}), case, joint=True)


@given(layer_cases())
def test_statistics_gate_by_gate_are_the_textbook_form(case: LayerCase):
    agrees(case.layer(placement={"gates": "per_gate"}), case, groups=GATES[case.cell])


@given(layer_cases(cells=["LSTM"], batch=(2, 4)))
def test_all_placements_combined_and_ragged(case: LayerCase):
    placement = {"sum": "joint", "gates": "per_gate", "carry": "normed"}
    agrees(case.layer(placement=placement), case, lengths(case), groups=4, joint=True, normed=True)


@given(layer_cases(cells=["LSTM"], hidden=(2, 4)))
def test_a_projected_lstm_is_the_textbook_form(case: LayerCase):
    agrees(case.layer(proj_size=1), case)


@given(layer_cases(cells=["RNN"]))
def test_a_rectified_rnn_is_the_textbook_form(case: LayerCase):
    agrees(case.layer(nonlinearity="relu"), case, nonlinearity="relu")


@given(layer_cases())
def test_a_layer_without_biases_keeps_norms_and_shifts(case: LayerCase):
    layer = case.layer(bias=False)
    assert not any(name.startswith("bias_") for name, _ in layer.named_parameters())
    agrees(layer, case)


def test_placements_differ():
    case = LayerCase(3, "LSTM", "layer", ("sliding", 2), steps=6, batch=3, inputs=2, hidden=4)
    layers = [case.layer(placement=p) for p in ({}, {"sum": "joint"}, {"gates": "per_gate"}, {"carry": "normed"})]
    outputs = [layer(case.xs())[0] for layer in layers]
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("sites", [{"ih": "layer"}, {"hh": "layer"}, {"c": "layer"}, {"ih": "layer", "hh": "layer"}])
def test_only_the_named_sites_carry_a_norm(sites):
    case = LayerCase(3, "LSTM", "layer", ("sliding", 3), steps=6, batch=3, inputs=2, hidden=4)
    layer = case.layer(norm={"sites": sites})
    assert {name for name, _ in layer.named_modules() if name.startswith("norm_")} == {
        f"norm_{site}_l0" for site in sites
    }
    agrees(layer, case)


@given(layer_cases(cells=["LSTM"], bases=["layer"]))
def test_sites_may_differ(case: LayerCase):
    layer = case.layer(norm={"sites": {"ih": {"kind": "rms"}, "hh": {"kind": "layer", "eps": 1e-3}}})
    assert isinstance(layer.norm_ih_l0, an.RMSNorm)
    assert isinstance(layer.norm_hh_l0, an.LayerNorm)
    assert layer.norm_hh_l0.eps == 1e-3
    assert getattr(layer, "norm_c_l0", None) is None


@given(layer_cases(batch=(1, 3)))
def test_the_module_of_one_step_is_a_step_of_the_layer(case: LayerCase):
    layer, xs = case.layer(), case.xs()
    cell = getattr(an, case.cell + "Cell")(
        case.inputs, case.hidden, norm={"kind": case.base}, window=window(case.window), dtype=torch.float64
    )
    theirs = {name.replace("_l0", ""): value for name, value in layer.state_dict().items()}
    mine = cell.state_dict()
    assert {name.replace("_l0", "") for name in mine} == set(theirs)
    cell.load_state_dict({name: theirs[name.replace("_l0", "")] for name in mine})
    ys, state = layer(xs)[0], None
    for x, expected in zip(xs, ys, strict=True):
        y, state = cell(x, state)
        compare(y, expected, tolerance=EXACT)


@given(layer_cases(bases=["layer", "rms"]))
def test_float32_layers_stay_near_float64(case: LayerCase):
    """Six steps of products of 4 values at 6e-8 each, magnified up to 316 times by a norm of few features."""
    double = case.layer()
    single = case.layer().float()
    ys, _ = single(case.xs().float())
    assert ys.dtype == torch.float32
    assert torch.isfinite(ys).all()
    if case.hidden >= 4 and case.base == "rms":
        compare(ys.double(), double(case.xs())[0], tolerance=6 * 4 * 6e-8 * 316)


@pytest.mark.parametrize("cell", CELLS)
@given(
    seed=seeds, depth=st.integers(1, 3), kind=st.sampled_from(KINDS), base=st.sampled_from(BASES), ragged=st.booleans()
)
def test_stacked_layers_in_both_directions_are_single_ones_chained(cell, seed, depth, kind, base, ragged):
    """The reverse direction starts at the end of each row, with a separate window."""
    case = LayerCase(seed, cell, base, kind, steps=5, batch=3, inputs=2, hidden=3)
    layer, xs = case.layer(num_layers=depth, bidirectional=True), case.xs()
    limit = lengths(case) if ragged else torch.full((3,), 5)
    hx = case.hx(layer)
    expected, finals = xs, []
    for floor in range(depth):
        sides = []
        for way, suffix in enumerate((f"_l{floor}", f"_l{floor}_reverse")):
            place = 2 * floor + way
            start = tuple(s[place : place + 1] for s in hx) if isinstance(hx, tuple) else hx[place : place + 1]
            turned = flipped(expected, limit) if way else expected
            ys, last = textbook(layer, case, turned, start, limit, suffix)
            sides.append(flipped(ys, limit) if way else ys)
            finals.append(last)
        expected = torch.cat(sides, -1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(xs, limit, enforce_sorted=False)
    ys, final = layer(packed, hx)
    ys, _ = torch.nn.utils.rnn.pad_packed_sequence(ys, total_length=5)
    last = tuple(torch.cat(part) for part in zip(*finals, strict=True)) if cell == "LSTM" else torch.cat(finals)
    compare(ys, expected, tolerance=EXACT)
    compare(final, last, tolerance=EXACT)


def flipped(xs, limit):
    """Reverse the valid steps of each row."""
    out = torch.zeros_like(xs)
    for row, n in enumerate(limit.tolist()):
        out[:n, row] = xs[:n, row].flip(0)
    return out


@dataclass(frozen=True)
class MinimalEquations(Cell):
    """Gated average of the inputs: no weight multiplies the state, so there is no weight_hh."""

    gates: ClassVar[tuple[str, ...]] = ("z", "h")

    @property
    def sites(self) -> dict[str, int]:
        return {"ih": self.pre_activations}

    def shapes(self, input_size: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        wide = self.pre_activations
        return {"weight_ih": (wide, input_size)} | ({"bias_ih": (wide,)} if bias else {})

    def step(self, weights: Any, u: Any, state: Any, mask: Any = None) -> Any:
        (h,), states = state
        z, new = u.chunk(2, -1)
        h = (1 - z.sigmoid()) * h + z.sigmoid() * new
        return self.ended(h, (h,), SiteStates(self, weights, states, mask), state, mask)


class MinimalSpec(an.CellSpec):
    kind: Literal["minimal"] = "minimal"

    def build(self, hidden_size: int, placement: Placement) -> MinimalEquations:
        refuse(placement, "minimal", sum="It has one product.", carry="It carries its output alone.")
        return MinimalEquations(hidden_size, placement)


def test_a_cell_without_a_recurrent_product_runs():
    options = {"cell": MinimalSpec(), "input_size": 2, "hidden_size": 3, "norm": "layer", "window": 3}
    layer: Any = an.build(options, dtype=torch.float64)
    xs = torch.randn(7, 4, 2, dtype=torch.float64)
    u, _ = an.AssortedTime(layer.norm_ih_l0, window=3).scan(xs @ layer.weight_ih_l0.T + layer.bias_ih_l0)
    h, expected = torch.zeros(4, 3, dtype=torch.float64), []
    for z, new in (step.chunk(2, -1) for step in u):
        h = h + z.sigmoid() * (new - h)
        expected.append(h)
    ys, state = layer.unroll(xs)
    compare(ys, torch.stack(expected), tolerance=EXACT)
    first, middle = layer.unroll(xs[:3])
    second, after = layer.unroll(xs[3:], middle)
    compare(torch.cat([first, second]), ys, tolerance=EXACT)
    compare(layer.hidden(after), layer.hidden(state), tolerance=EXACT)
    ys.sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == set(layer.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(xs.float())[0].dtype == torch.float64
    assert "it has no kernel for MinimalEquations" in an.explain(layer)
    assert [result for result in check_cell(MinimalSpec()) if result.status == "failed"] == []


def test_a_site_is_normalized_once_in_a_step():
    @dataclass(frozen=True)
    class Twice(RNNEquations):
        torch_name: ClassVar[str | None] = None

        def step(self, weights, u, state, mask=None):
            (h,), states = state
            norms = SiteStates(self, weights, states, mask)
            h = torch.tanh(u + norms("hh", norms("hh", self.recur(weights, h))))
            return self.ended(h, (h,), norms, state, mask)

    class TwiceSpec(an.CellSpec):
        kind: Literal["twice"] = "twice"

        def build(self, hidden_size: int, placement: Placement) -> Twice:
            return Twice(hidden_size, placement)

    layer = an.build({"cell": TwiceSpec(), "input_size": 2, "hidden_size": 3, "norm": "layer"})
    with pytest.raises(
        ValueError, match=r"^site: got 'hh' twice in one step; expected each site once, or another site$"
    ):
        layer(torch.randn(4, 2, 2))
