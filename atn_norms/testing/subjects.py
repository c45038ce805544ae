"""Subjects of the laws: a spec or a backend, with the means to run it in float64."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.assorted_time import AssortedTime
from atn_norms.normalizers import Normalizer, NormSpec
from atn_norms.options import spec_label
from atn_norms.pytree import Tree, tree_leaves
from atn_norms.statistics import Average, Moments, Statistic
from atn_norms.testing.comparing import demand
from atn_norms.testing.law import Case
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
    """Return standard normal numbers in float64 that depend on the seed and the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module: nn.Module, seed: int) -> nn.Module:
    """Perturb every parameter, so that a gain of 1 or a shift of 0 cannot hide an error."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            if parameter.is_floating_point():
                change = 0.3 * noise(seed + 1000 + number, *parameter.shape).clamp(-2, 2)
                parameter.add_(change.to(parameter.dtype))
    return module


def importable(kind: type) -> bool:
    """Return True if pickle can find a class again by its module and name."""
    value: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        value = getattr(value, name, None)
    return value is kind


class Subject:
    """The object under test: `family`, a `label`, the `axes` from which cases are drawn, and methods to run it.

    `make` builds the object that runs for a case, `inputs` draws its floating inputs, `run` returns every output
    tensor. `broken` is the reason why the object cannot run at all, and `reported_by` is the law that reports this
    reason. The other laws except `it_builds` are then skipped.
    """

    family: str
    label: str
    axes: dict[str, Sequence[Any]]
    broken: str = ""
    reported_by: str = "it_builds"

    @property
    def unbuilt(self) -> str:
        """Reason why the other laws are skipped for an object that cannot run; empty if it can."""
        return f"it cannot run; see {self.reported_by}" if self.broken else ""

    def make(self, case: Case) -> Any:
        """Return a new object to run."""
        raise NotImplementedError(f"{type(self).__name__} does not support laws that build an object")

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        """Draw the inputs of a case."""
        raise NotImplementedError(f"{type(self).__name__} does not support laws that draw inputs")

    def run(self, made: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return every output tensor."""
        raise NotImplementedError(f"{type(self).__name__} does not support laws that run an object")

    def sample(self) -> Case:
        """Return one case of medium size."""
        return Case({name: values[len(values) // 2] for name, values in self.axes.items()})


class SpecSubject(Subject):
    """A subject that is an options model."""

    spec: Any

    def result_of(self, spec: Any) -> Any:
        """Return the outputs of a spec of this family on one fixed example, to compare two specs."""
        raise NotImplementedError(f"{type(self).__name__} does not define the outputs of a spec")

    def built(self, spec: Any) -> Any:
        """Return the object that a spec builds, for pickling."""
        raise NotImplementedError(f"{type(self).__name__} does not define what a spec builds")

    def fault(self) -> str:
        """Reason why the spec does not build; empty if it does."""
        return self.broken if self.reported_by == "it_builds" else ""


class NormalizerSubject(SpecSubject):
    """A normalizer: its spec, and the numbers of features and the windows that it accepts."""

    family = "normalizer"

    def __init__(self, spec: NormSpec) -> None:
        self.spec, self.label = spec, spec_label(spec)
        self.sizes: tuple[int, ...] = ()
        self.axes = {}
        refusal = ""
        for features in range(1, MOST_FEATURES + 1):
            try:
                built = spec.build(features)
            except ValueError as error:
                refusal = str(error)
                continue
            except Exception as error:  # noqa: BLE001  any error of a plugin
                self.broken = f"build({features}) raises {type(error).__name__}: {error}"
                return
            if not isinstance(built, Normalizer):
                self.broken = f"build({features}): got {type(built).__name__}; expected a Normalizer"
                return
            self.sizes = (*self.sizes, features)
            if len(self.sizes) == 8:
                break
        if not self.sizes:
            self.broken = f"build accepts no number of features from 1 to {MOST_FEATURES}: {refusal}"
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
            self.check_statistic()
        except Exception as error:  # noqa: BLE001  the law reports it with its position
            self.broken, self.reported_by = f"{type(error).__name__}: {error}", "a_statistic_is_a_tuple_of_tensors"

    def check_statistic(self) -> None:
        """Raise unless `measure` returns a statistic that a window can pool: a tuple of tensors with `pool`."""
        features = self.sizes[0]
        statistic: Any = self.spec.build(features).double().measure(noise(0, 3, features))
        kind, expected = type(statistic).__name__, "expected a named tuple of tensors with `pool`, such as Moments"
        demand(
            isinstance(statistic, tuple) and callable(getattr(statistic, "pool", None)),
            f"measure: got {kind}; {expected}",
        )
        if self.declares("stateless"):
            demand(
                len(statistic) == 0, f"measure: got {kind}, which has leaves; expected none, as `stateless` is declared"
            )
            return
        demand(len(statistic) > 0, f"measure: got {kind}, which is empty; {expected}. Or declare `stateless = True`")
        names = getattr(statistic, "_fields", range(len(statistic)))
        others = [
            f"{n} is {type(leaf).__name__}"
            for n, leaf in zip(names, statistic, strict=True)
            if not isinstance(leaf, Tensor)
        ]
        combined = "Combine averages: Average(torch.cat([one, other], -1))"
        demand(not others, f"measure: got {kind}, in which {', '.join(others)}; {expected}. {combined}")
        try:
            type(statistic)(*statistic)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise AssertionError(f"{kind} cannot be rebuilt from its tensors by {kind}(*tensors): {reason}") from error
        doubled: Any = type(statistic)(*(torch.stack([leaf, leaf], 1) for leaf in statistic))
        pooled = doubled.pool(torch.ones(3, 2).to(statistic[0]), 1)
        demand(type(pooled) is type(statistic), f"{kind}.pool: got {type(pooled).__name__}; expected {kind}")

    def declares(self, capability: str) -> bool:
        """Return True if the normalizer declares a capability."""
        return bool(getattr(self.declared, capability, False))

    def _takes(self, window: Window[Any]) -> bool:
        try:
            AssortedTime(self.declared, window)
        except ValueError:  # a normalizer may reject a window; no law then uses it
            return False
        return True

    def normalizer(self, case: Case, stir: bool = True) -> Any:
        """Return a new normalizer in float64 with perturbed parameters."""
        built = self.spec.build(case.features).double()
        return stirred(built, case.seed) if stir else built

    def make(self, case: Case) -> AssortedTime:
        return AssortedTime(self.normalizer(case), case.window)

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        return (noise(case.seed + seed, case.steps, case.batch, case.features),)

    def run(self, made: AssortedTime, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ys, state = made.scan(inputs[0])
        return ys, *tree_leaves(state)

    def result_of(self, spec: NormSpec) -> Any:
        case = self.sample()
        torch.manual_seed(0)
        norm = stirred(AssortedTime(spec.build(case.features).double(), case.window), 0)
        return self.run(norm, self.inputs(case))[0].detach()  # type: ignore[arg-type]

    def built(self, spec: NormSpec) -> Any:
        return spec.build(self.sample().features)


class WindowSubject(SpecSubject):
    """A window: its spec, over moments or averages."""

    family = "window"

    def __init__(self, spec: WindowSpec) -> None:
        self.spec, self.label = spec, spec_label(spec)
        self.axes = {"seed": SEEDS, "steps": tuple(range(1, 9)), "batch": (1, 2, 3), "statistic": (Average, Moments)}
        try:
            built = spec.build()
        except Exception as error:  # noqa: BLE001  any error of a plugin
            self.broken = f"build() raises {type(error).__name__}: {error}"
            return
        if not isinstance(built, Window):
            self.broken = f"build(): got {type(built).__name__}; expected a Window"

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
        """Return the statistics of a sequence from their leaves."""
        return (Average if len(inputs) == 1 else Moments)(*inputs)

    def statistics(self, case: Case, seed: int = 0) -> Any:
        """Return the statistics of a drawn sequence, leaves [T, N, 1]."""
        return self.steps(self.inputs(case, seed))

    def weights(self, case: Case) -> Tensor:
        """Return numbers of samples from 0 to 3: some steps of some rows are masked."""
        source = torch.Generator().manual_seed(case.seed)
        return torch.randint(0, 4, (case.steps, case.batch), generator=source).double()

    @staticmethod
    def fresh(window: Window[Any], steps: Any) -> Tree:
        """Return the state before the first of these steps."""
        return window.initial(at(steps, 0))

    def result_of(self, spec: WindowSpec) -> Any:
        case = Case({"seed": 0, "steps": 8, "batch": 2, "statistic": Moments})
        return self.run(WindowSubject(spec).make(case), self.inputs(case))

    def built(self, spec: WindowSpec) -> Any:
        return spec.build()


def at(steps: Any, index: Any) -> Any:
    """Index the leading axes of statistics."""
    return type(steps)(*(leaf[index] for leaf in steps))


def pushed(window: Window[Any], steps: Any, weights: Tensor, state: Tree) -> tuple[Any, Tree]:
    """Push a sequence step by step, without `scan`."""
    pooled = []
    for t in range(weights.shape[0]):
        now, state = window.push(at(steps, t), weights[t], state)
        pooled.append(now)
    return type(steps)(*(torch.stack(leaves) for leaves in zip(*pooled, strict=True))), state


def used(normalizer: Normalizer, probe: Tensor, pooled: Statistic) -> Tensor:
    """Normalize a probe with a statistic: two statistics with equal results are equal."""
    return normalizer.normalize(probe, pooled)
