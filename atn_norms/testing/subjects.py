"""Subjects: a spec (or a backend) with all that the laws need to put it to work in float64."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.assorted_time import AssortedTime
from atn_norms.normalizers import Normalizer, NormSpec
from atn_norms.pytree import Tree, tree_leaves
from atn_norms.statistics import Average, Moments, Statistic
from atn_norms.testing.comparing import demand
from atn_norms.testing.law import Case, label_of
from atn_norms.windows import CumulativeSpec, ExponentialSpec, SlidingSpec, Window, WindowSpec

SEEDS = tuple(range(200))
MOST_FEATURES = 64
WINDOWS: tuple[WindowSpec, ...] = (
    SlidingSpec(steps=1),
    SlidingSpec(steps=2),
    SlidingSpec(steps=3),
    CumulativeSpec(),
    ExponentialSpec(half_life=1.5),
)


def noise(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64 that depend on the seed and the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module: nn.Module, seed: int) -> nn.Module:
    """Move every parameter away from where it starts, so that a gain of 1 and a shift of 0 hide nothing."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            if parameter.is_floating_point():
                away = 0.3 * noise(seed + 1000 + number, *parameter.shape).clamp(-2, 2)
                parameter.add_(away.to(parameter.dtype))
    return module


def importable(kind: type) -> bool:
    """Whether pickle would find a class again under its module and name."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


class Subject:
    """What is judged: `family`, a `label`, the `axes` its cases are drawn from, and how to put it to work.

    `make` builds what runs for a case, `inputs` draws what it is given (floating tensors), `run` gives every tensor
    that comes out. `broken` says why it cannot be put to work at all, and `told_by` which law finds that; no law but
    that one and `it_builds` is then asked.
    """

    family: str
    label: str
    axes: dict[str, Sequence[Any]]
    broken: str = ""
    told_by: str = "it_builds"

    @property
    def unbuilt(self) -> str:
        """Why the other laws are not asked of what cannot be put to work; empty where it can."""
        return f"it cannot be put to work; {self.told_by} says why" if self.broken else ""

    def make(self, case: Case) -> Any:
        """What runs, fresh."""
        raise NotImplementedError(f"{type(self).__name__} is not asked laws that make one")

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        """What it is given."""
        raise NotImplementedError(f"{type(self).__name__} is not asked laws that draw inputs")

    def run(self, made: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every tensor that comes out."""
        raise NotImplementedError(f"{type(self).__name__} is not asked laws that run one")

    def sample(self) -> Case:
        """One case of middling size."""
        return Case({name: values[len(values) // 2] for name, values in self.axes.items()})


class SpecSubject(Subject):
    """A subject that is an options model."""

    spec: Any

    def answer(self, spec: Any) -> Any:
        """What a spec of this family makes of one fixed example, to compare two specs by."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a spec answers")

    def built(self, spec: Any) -> Any:
        """What a spec builds, for pickling."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a spec builds")

    def fault(self) -> str:
        """What is wrong with the very building of it; empty where nothing is."""
        return self.broken if self.told_by == "it_builds" else ""


class NormalizerSubject(SpecSubject):
    """A normalizer: its spec, the numbers of features it takes, the windows it takes."""

    family = "normalizer"

    def __init__(self, spec: NormSpec) -> None:
        self.spec, self.label = spec, label_of(spec)
        self.sizes: tuple[int, ...] = ()
        self.axes = {}
        refusal = ""
        for features in range(1, MOST_FEATURES + 1):
            try:
                built = spec.build(features)
            except ValueError as error:
                refusal = str(error)
                continue
            except Exception as error:  # noqa: BLE001  whatever a plugin raises
                self.broken = f"build({features}) raises {type(error).__name__}: {error}"
                return
            if not isinstance(built, Normalizer):
                self.broken = f"build({features}) returns {type(built).__name__}; allowed: a Normalizer"
                return
            self.sizes = (*self.sizes, features)
            if len(self.sizes) == 8:
                break
        if not self.sizes:
            self.broken = f"build takes no number of features from 1 to {MOST_FEATURES}: {refusal}"
            return
        self.declared = spec.build(self.sizes[0])
        self.couples: bool = bool(self.declares("uses_batch_statistics"))
        self.axes = {
            "seed": SEEDS,
            "steps": (1, 2, 3, 4, 5),
            "batch": (2, 3, 4) if self.couples else (1, 2, 3),
            "features": self.sizes,
            "window": [window.build() for window in WINDOWS if self._takes(window.build())],
        }
        try:
            self.check_statement()
        except Exception as error:  # noqa: BLE001  the law tells of it, with its place
            self.broken, self.told_by = f"{type(error).__name__}: {error}", "a_statement_is_a_tuple_of_tensors"

    def check_statement(self) -> None:
        """Raise unless `measure` returns what a window can pool: a tuple of tensors that has `pool`."""
        features = self.sizes[0]
        said: Any = self.spec.build(features).double().measure(noise(0, 3, 2, features))
        kind, allowed = type(said).__name__, "allowed: a named tuple of tensors with `pool`, such as Moments"
        demand(isinstance(said, tuple) and callable(getattr(said, "pool", None)), f"measure returns {kind}; {allowed}")
        if self.declares("stateless"):
            demand(len(said) == 0, f"measure: got {kind}, which has leaves; expected none, as it is `stateless`")
            return
        demand(len(said) > 0, f"measure returns {kind}, which is empty; {allowed}; or declare `stateless = True`")
        names = getattr(said, "_fields", range(len(said)))
        others = [
            f"{n} is {type(leaf).__name__}" for n, leaf in zip(names, said, strict=True) if not isinstance(leaf, Tensor)
        ]
        again = "several averages are one Average(torch.cat([one, other], -1))"
        demand(not others, f"measure returns {kind}, of which {', '.join(others)}; {allowed}; {again}")
        try:
            type(said)(*said)
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
            raise AssertionError(f"{kind} cannot be made again of its tensors, {kind}(*tensors): {refused}") from error
        doubled: Any = type(said)(*(torch.stack([leaf, leaf], 1) for leaf in said))
        pooled = doubled.pool(torch.ones(3, 2).to(said[0]), 1)
        demand(type(pooled) is type(said), f"{kind}.pool: got {type(pooled).__name__}; expected {kind}")

    def declares(self, capability: str) -> bool:
        """Whether the normalizer declares a capability."""
        return bool(getattr(self.declared, capability, False))

    def _takes(self, window: Window[Any]) -> bool:
        try:
            AssortedTime(self.declared, window)
        except ValueError:  # a normalizer may refuse a window, and then no law asks it to
            return False
        return True

    def normalizer(self, case: Case, stir: bool = True) -> Any:
        """A fresh normalizer in float64, its parameters stirred."""
        built = self.spec.build(case.features).double()
        return stirred(built, case.seed) if stir else built

    def make(self, case: Case) -> AssortedTime:
        return AssortedTime(self.normalizer(case), case.window)

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        return (noise(case.seed + seed, case.steps, case.batch, case.features),)

    def run(self, made: AssortedTime, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ys, state = made.scan(inputs[0])
        return ys, *tree_leaves(state)

    def answer(self, spec: NormSpec) -> Any:
        case = self.sample()
        torch.manual_seed(0)
        norm = stirred(AssortedTime(spec.build(case.features).double(), case.window), 0)
        return self.run(norm, self.inputs(case))[0].detach()  # type: ignore[arg-type]

    def built(self, spec: NormSpec) -> Any:
        return spec.build(self.sample().features)


class WindowSubject(SpecSubject):
    """A window: its spec, over the moments or the average of something."""

    family = "window"

    def __init__(self, spec: WindowSpec) -> None:
        self.spec, self.label = spec, label_of(spec)
        self.axes = {"seed": SEEDS, "steps": tuple(range(1, 9)), "batch": (1, 2, 3), "statistic": (Average, Moments)}
        try:
            built = spec.build()
        except Exception as error:  # noqa: BLE001  whatever a plugin raises
            self.broken = f"build() raises {type(error).__name__}: {error}"
            return
        if not isinstance(built, Window):
            self.broken = f"build() returns {type(built).__name__}; allowed: a Window"

    def make(self, case: Case) -> Window[Any]:
        window = self.spec.build()
        return window.double() if isinstance(window, nn.Module) else window  # type: ignore[return-value]

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        mean = noise(case.seed + seed, case.steps, case.batch, 1)
        return (mean,) if case.statistic is Average else (mean, 0.1 + noise(case.seed + seed + 1, *mean.shape).square())

    def run(self, made: Window[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        steps = self.steps(inputs)
        weights = torch.ones(steps.mean.shape[:2], dtype=torch.float64)
        scanned, _ = made.scan(steps, weights, self.fresh(made, steps))
        return *scanned, *pushed(made, steps, weights, self.fresh(made, steps))[0]

    @staticmethod
    def steps(inputs: Sequence[Tensor]) -> Any:
        """The statements of a sequence, from their leaves."""
        return (Average if len(inputs) == 1 else Moments)(*inputs)

    def statements(self, case: Case, seed: int = 0) -> Any:
        """The statements of a drawn sequence, leaves [T, N, 1]."""
        return self.steps(self.inputs(case, seed))

    def weights(self, case: Case) -> Tensor:
        """Numbers of samples from 0 to 3, some steps of some rows dead."""
        source = torch.Generator().manual_seed(case.seed)
        return torch.randint(0, 4, (case.steps, case.batch), generator=source).double()

    @staticmethod
    def fresh(window: Window[Any], steps: Any) -> Tree:
        """The state before the first of these steps."""
        return window.initial(at(steps, 0))

    def answer(self, spec: WindowSpec) -> Any:
        case = Case({"seed": 0, "steps": 8, "batch": 2, "statistic": Moments})
        return self.run(WindowSubject(spec).make(case), self.inputs(case))

    def built(self, spec: WindowSpec) -> Any:
        return spec.build()


def at(steps: Any, index: Any) -> Any:
    """The statements at some place of the leading axes."""
    return type(steps)(*(leaf[index] for leaf in steps))


def pushed(window: Window[Any], steps: Any, weights: Tensor, state: Tree) -> tuple[Any, Tree]:
    """A window's pushes over a sequence, one by one, by nobody's `scan`."""
    pooled = []
    for t in range(weights.shape[0]):
        now, state = window.push(at(steps, t), weights[t], state)
        pooled.append(now)
    return type(steps)(*(torch.stack(leaves) for leaves in zip(*pooled, strict=True))), state


def used(normalizer: Normalizer, probe: Tensor, pooled: Statistic) -> Tensor:
    """What a statement does to a probe: two statements that do the same are the same."""
    return normalizer.normalize(probe, pooled)
