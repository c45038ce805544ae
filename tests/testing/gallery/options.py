"""Wrong specs: they do not build, hide options, or have no unique name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr, field_validator
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor

import atn_norms as an
from atn_norms.registry import Source, registry
from atn_norms.windows import Sliding
from tests.testing.gallery.entry import wrong


class Power(an.Normalizer):
    """Correct: divides by the pooled power mean."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def measure(self, x: Tensor) -> an.Average:
        return an.Average.of(x.double().abs().pow(self.p))

    def normalize(self, x: Tensor, pooled: an.Average) -> Tensor:
        return x / (pooled.mean + 1e-5).pow(1 / self.p)


class PowerSpec(an.NormSpec):
    kind: Literal["gallery"] = "gallery"
    p: float = Field(2.0, ge=1)

    def build(self, features: int) -> an.Normalizer:
        return Power(self.p)


@wrong("it_builds")
class BuildsTorchs(PowerSpec):
    """Builds torch's module, which has no separate measure and normalize."""

    def build(self, features: int) -> Any:
        return torch.nn.LayerNorm(features)


@wrong("it_builds")
class RefusesWithAnythingButValueError(PowerSpec):
    """Rejects unsupported numbers of features with an assertion."""

    def build(self, features: int) -> Any:
        assert features % 4 == 0, "features must be a multiple of 4"
        return Power(self.p)


@wrong("options_survive_a_dump")
class HidesAnOption(PowerSpec):
    """Excludes an option from the dump, so two different trials have one name."""

    p: float = Field(2.0, ge=1, exclude=True)


@wrong("options_survive_a_dump")
class KeepsAnOptionPrivate(PowerSpec):
    """Stores a parameter of the computation in an attribute that is not an option."""

    _p: float = PrivateAttr(2.0)

    @classmethod
    def wrong(cls) -> an.NormSpec:
        spec = cls(p=2.0)
        spec._p = 3.0
        return spec

    def build(self, features: int) -> an.Normalizer:
        return Power(self._p)


@wrong("options_survive_a_dump")
class ReadsAnOptionTwice(PowerSpec):
    """Changes an option at every validation: a percentage becomes a fraction, then a smaller one."""

    p: float = Field(0.5, gt=0)

    @classmethod
    def wrong(cls) -> an.NormSpec:
        return cls(p=300.0)

    @field_validator("p")
    @classmethod
    def _fraction(cls, p: float) -> float:
        return p / 100

    def build(self, features: int) -> an.Normalizer:
        return Power(self.p)


@wrong("options_survive_a_dump")
class DescribesAnotherWindow(an.WindowSpec):
    """A window that inherits `spec` and so describes its base class."""

    kind: Literal["gallery"] = "gallery"
    steps: int = 3

    def build(self) -> an.Window:
        return Sliding(self.steps)  # its `spec` describes a sliding window


class HoldsAFunction(Power):
    """Stores a lambda."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.root = lambda mean: (mean + 1e-5).pow(1 / p)

    def normalize(self, x: Tensor, pooled: an.Average) -> Tensor:
        return x / self.root(pooled.mean)


@wrong("it_survives_pickling")
class HoldsAFunctionSpec(PowerSpec):
    """Builds a normalizer that stores a lambda, which cannot be pickled."""

    def build(self, features: int) -> an.Normalizer:
        return HoldsAFunction(self.p)


@contextmanager
def registered() -> Iterator[None]:
    """Register the spec within the context."""

    class Enough(Exception):
        """Roll back the registration."""

    registry.load()  # otherwise the first look-up loads all plugins inside the transaction, which removes them again
    try:
        with registry.transaction(Source("gallery", "gallery", "")):
            registry.normalizer(HidesAnOptionFromEditors)
            yield
            raise Enough
    except Enough:
        return


@wrong("the_registry_builds_the_same", around=registered)
class HidesAnOptionFromEditors(PowerSpec):
    """Omits an option from the JSON schema: editors and `atn-norms list` cannot show it."""

    kind: Literal["gallery-hidden"] = "gallery-hidden"  # type: ignore[assignment]
    p: SkipJsonSchema[float] = Field(2.0, ge=1)
