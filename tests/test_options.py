"""Options inside options, and computed defaults, in the text of a layer and in its file."""

from copy import deepcopy
from typing import Literal

import pytest
import torch
from pydantic import Field

import atn_norms as an
from atn_norms.options import Options, changed_options, spec_label
from atn_norms.registry import registry


class Scale(Options):
    """A group of options without a kind."""

    factor: float = 2.0


class Selection(Options):
    """A group of options with a name that the options of a layer have too."""

    sites: tuple[str, ...] = ()


class NestedSpec(an.NormSpec):
    """Options of a layer norm, with groups of options and computed defaults."""

    kind: Literal["nested-in-a-test"] = "nested-in-a-test"
    scale: Scale = Scale()
    selection: Selection = Selection()
    sizes: tuple[int, ...] = Field(default_factory=lambda: (3, 4))
    number: int = Field(default_factory=lambda options: len(options["sizes"]))

    def build(self, features: int) -> an.LayerNorm:
        return an.LayerNorm(features, eps=1e-5 * self.scale.factor)


@pytest.fixture
def registered(monkeypatch):
    registry.kinds("normalizer")
    monkeypatch.setattr(registry, "_claims", {family: deepcopy(kinds) for family, kinds in registry._claims.items()})
    registry.normalizer(NestedSpec)


def test_a_group_of_options_is_named_by_its_class():
    spec = NestedSpec(scale=Scale(factor=3.0), selection=Selection(sites=("a",)))
    label = "nested-in-a-test(scale=Scale(factor=3.0), selection=Selection(sites=('a',)))"
    layer = an.GRU(3, 4, norm=spec)
    assert repr(layer) == f"GRU(3, 4, norm={label}, window=1)"
    assert an.explain(layer).startswith(repr(layer))
    assert repr(an.GRU(3, 4, norm={"sites": {"ih": spec}})) == f"GRU(3, 4, norm={{ih: {label}}}, window=1)"
    assert spec_label(spec) == label


@pytest.mark.usefixtures("registered")
def test_a_layer_with_a_group_of_options_is_loaded_from_its_file(tmp_path):
    layer = an.GRU(3, 4, norm=NestedSpec(scale=Scale(factor=3.0)), window=2)
    same = an.load(an.save(layer, tmp_path / "model.safetensors"))
    x = torch.randn(5, 2, 3)
    assert repr(same) == repr(layer)
    assert torch.equal(same(x)[0], layer(x)[0])


def test_a_computed_default_is_no_change():
    assert changed_options(NestedSpec()) == {}
    assert repr(an.GRU(3, 4, norm=NestedSpec())) == "GRU(3, 4, norm=nested-in-a-test, window=1)"
    assert changed_options(NestedSpec(sizes=(3, 4))) == {}
    assert changed_options(NestedSpec(sizes=(1, 2, 3))) == {"sizes": (1, 2, 3)}
    assert changed_options(NestedSpec(sizes=(1, 2, 3), number=2)) == {"sizes": (1, 2, 3), "number": 2}
