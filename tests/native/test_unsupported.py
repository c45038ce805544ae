"""Cases that the native backend does not support; `auto` selects it for all other cases."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

import atn_norms as an
from atn_norms.backends import choose, costs
from atn_norms.cells import CellWeights, GRUEquations
from tests.native.strategies import CELLS, NORMS, RMS_SHIFTED, WINDOWS, needs_kernels

pytestmark = needs_kernels


class Halved(an.LayerNorm):
    """A subclass that differs from its base class by an operation without a kernel."""

    def normalize(self, x: Any, pooled: Any) -> Any:
        return super().normalize(x, pooled).sort(-1).values / 2


class HalvedSpec(an.NormSpec):
    kind: Literal["halved"] = "halved"

    def build(self, features: int) -> an.Normalizer:
        return Halved(features)


class Foreign(an.Normalizer):
    """A normalizer without a declaration, with an operation without a kernel."""

    def measure(self, x: Any) -> Any:
        return an.Average(x.double().median(-1, keepdim=True).values)

    def normalize(self, x: Any, pooled: Any) -> Any:
        return x - pooled.mean


class ForeignSpec(an.NormSpec):
    kind: Literal["foreign"] = "foreign"

    def build(self, features: int) -> an.Normalizer:
        return Foreign()


class Lately(an.Sliding):
    """A subclass of a window, whose weights may be different."""


class LatelySpec(an.WindowSpec):
    kind: Literal["lately"] = "lately"

    def build(self) -> an.Window:
        return Lately(3)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a normalizer that declares nothing": (
        lambda: an.GRU(2, 3, norm=ForeignSpec()),
        "the norm at ih (Foreign): median has no native instruction (test_unsupported.py, line 35: "
        "return an.Average(x.double().median(-1, keepdim=True).values))",
    ),
    "a subclass that normalizes otherwise": (
        lambda: an.RNN(2, 3, norm={"sites": {"hh": HalvedSpec()}}),
        "the norm at hh (Halved): sort has no native instruction (test_unsupported.py, line 21: "
        "return super().normalize(x, pooled).sort(-1).values / 2)",
    ),
    "a window of another class": (
        lambda: an.GRU(2, 3, norm="layer", window=LatelySpec()),
        "it has no kernel for the window Lately(steps=3) at ih",
    ),
    "another device": (
        lambda: an.LSTM(2, 3, norm="layer", device="meta"),
        "it runs on the CPU, and the layer is on meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_case_has_a_reason(case):
    make, sentence = REFUSED[case]
    layer = make()
    text = an.explain(layer)
    assert f"  native: unsupported: {sentence}" in text.splitlines()
    if "backend 'reference'" in text:
        assert f"  cost: {costs.cost_of_reference()}" in text.splitlines()
        assert any(line.startswith("  change: ") and len(line.split()) > 2 for line in text.splitlines())
    weights = layer.cell_weights(layer._suffixes[0])
    with pytest.raises(ValueError, match="'native' cannot run this layer") as caught:
        choose("native", layer.cell, weights)
    assert str(caught.value) == f"backend: 'native' cannot run this layer: {sentence}"
    assert choose("auto", layer.cell, weights).name in ("reference", "torch")


def test_an_unsupported_layer_fails_when_it_is_built():
    with pytest.raises(ValueError, match=r"'native' cannot run this layer: it has no kernel for the window Lately"):
        an.LSTM(2, 3, norm="layer", window=LatelySpec(), backend="native")


def test_batch_statistics_run_or_have_a_reason():
    layer = an.GRU(2, 3, norm="batch")
    weights = layer.cell_weights("_l0")
    chosen = choose("auto", layer.cell, weights).name
    if chosen != "native":
        assert "the norm at ih (BatchNorm): " in an.explain(layer)


def test_a_subclass_of_a_cell_is_unsupported():
    class Other(GRUEquations):
        """A third-party cell."""

    layer = an.GRU(2, 3, norm="layer")
    weights = layer.cell_weights("_l0")
    with pytest.raises(ValueError, match="'native' cannot run this layer: it has no kernel for Other"):
        choose("native", Other(3, layer.cell.placement), CellWeights(weights.tensors, weights.norms))


def test_more_groups_than_the_kernels_support_are_rejected():
    class Grouped(an.LayerNorm):
        """One statistic for each feature."""

        def measure(self, x: Any) -> Any:
            return an.Moments(x.double(), torch.zeros_like(x.double()))

        def feature_moments(self) -> Any:
            groups = self.features
            return type(super().feature_moments())(groups, True, self.eps, self.weight, self.bias)

    class GroupedSpec(an.NormSpec):
        kind: Literal["grouped"] = "grouped"

        def build(self, features: int) -> an.Normalizer:
            return Grouped(features)

    assert "supported" in an.explain(an.RNN(2, 64, norm=GroupedSpec(), backend="reference"))
    layer = an.RNN(2, 65, norm=GroupedSpec())
    assert "the norm at ih has 65 groups, and it takes at most 64" in an.explain(layer)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("norm", [name for name in NORMS if NORMS[name]])
@pytest.mark.parametrize("cell", CELLS)
def test_auto_selects_every_supported_case(cell, norm, window):
    if norm == "c" and cell != "lstm":
        return
    make, own = CELLS[cell]
    layer = make(2, 3, num_layers=2, bidirectional=True, norm=NORMS[norm], window=WINDOWS[window], **own)
    assert an.explain(layer).count("backend 'native'") == 4
    assert "reference: supported" in an.explain(layer)


def test_auto_selects_it_per_gate_and_after_a_change_of_dtype():
    layer = an.LSTM(2, 3, norm=RMS_SHIFTED, placement={"gates": "per_gate"})
    assert "backend 'native'" in an.explain(layer)
    layer.to(torch.float16)
    assert "backend 'native'" in an.explain(layer)
    layer.to(torch.float64)
    assert "backend 'native'" in an.explain(layer)


def test_a_norm_of_another_dtype_is_unsupported():
    layer = an.LSTM(2, 3, norm="layer")
    layer.norm_hh_l0.double()
    assert "the norm at hh is of another type than the layer, torch.float32" in an.explain(layer)
    assert "backend 'reference'" in an.explain(layer)


def altered(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the state of one cell with every statistic of its first site changed."""
    (((carried, ((index, (weights, statistic)), *others)),),) = state
    return (((carried, ((index, (weights, tuple(change(leaf) for leaf in statistic))), *others)),),)


def test_incompatible_tensors_are_never_read():
    """The kernels use addresses: another dtype or shape would read other memory."""
    layer, xs = an.LSTM(2, 3, norm="layer", window=4, backend="native"), torch.randn(5, 2, 2)
    wide = torch.zeros(1, 2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="hx: got torch.float64; expected the type of the layer, torch.float32"):
        layer(xs, (wide, wide))
    _, state = layer.unroll(xs)
    _, longer = an.LSTM(2, 3, norm="layer", window=7).unroll(xs)
    with pytest.raises(ValueError, match="state: got .*; expected "):
        layer.unroll(xs, longer)
    with pytest.raises(ValueError, match="state: got .*; expected "):
        layer.unroll(xs, altered(state, lambda leaf: leaf[:1]))
    found, _ = layer.unroll(xs, altered(state, torch.Tensor.float))
    expected, _ = layer.unroll(xs, state)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["measure", "normalize"])
def test_a_method_that_is_replaced_on_a_norm_is_called(method):
    def doubled(*arguments: Any) -> Any:
        return original(2 * arguments[0], *arguments[1:])

    outputs, xs = [], torch.randn(5, 2, 2, dtype=torch.float64)
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        layer: Any = an.GRU(2, 3, norm="layer", window=2, backend=backend, dtype=torch.float64)
        before = layer(xs)[0]
        original = getattr(layer.norm_hh_l0, method)
        setattr(layer.norm_hh_l0, method, doubled)
        outputs.append(layer(xs)[0])
        assert (outputs[-1] - before).abs().max() > 1e-3
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
