"""Schedules: the learning rate of each step, as a factor of the optimizer's rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from atn_norms.ablation.grid.errors import Problem, invalid
from atn_norms.ablation.grid.renames import rename_schedule
from atn_norms.errors import did_you_mean, short_repr
from atn_norms.options import Options


class Improvement:
    """Track the best of a series of scores (smaller is better), and the number of scores since.

    >>> watch = Improvement()
    >>> [watch.see(score) for score in (3.0, 2.0, 2.0, 2.5)], watch.best, watch.since
    ([True, True, False, False], 2.0, 2)
    """

    def __init__(self) -> None:
        self.best, self.since = math.inf, 0

    def see(self, score: float) -> bool:
        """Record a score, and return whether it is better than all before it."""
        better = score < self.best
        self.best, self.since = (score, 0) if better else (self.best, self.since + 1)
        return better


class Schedule(Options):
    r"""The learning rate of step s = 0, 1, ... of S as a factor of the optimizer's `lr`, after a linear warm-up.

    $$f(s) = \frac{s + 1}{w} \text{ for } s < w, \qquad f(s) = g\left(s - w, S - w\right) \text{ after}$$

    | option | meaning | unit |
    |---|---|---|
    | `warmup` | w, training steps until the full rate | steps |
    """

    kind: str
    warmup: int = Field(default=0, ge=0)

    def factor(self, step: int, steps: int) -> float:
        """Compute the factor of one step, counted from 0, of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.shape(step - self.warmup, max(1, steps - self.warmup))

    def shape(self, step: int, steps: int) -> float:
        """Compute the factor of a step after the warm-up."""
        return 1.0


class Constant(Schedule):
    """The full rate at every step."""

    kind: Literal["constant"] = "constant"


class Linear(Schedule):
    """A linear decrease to `final` times the full rate.

    >>> [Linear(final=0.5).factor(step, 4) for step in range(5)]
    [1.0, 0.875, 0.75, 0.625, 0.5]
    """

    kind: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0, le=1)

    def shape(self, step: int, steps: int) -> float:
        return 1 - (1 - self.final) * step / steps


class Cosine(Schedule):
    """A decrease along half a cosine to `final` times the full rate (Loshchilov, Hutter, arXiv 1608.03983, one period).

    >>> [round(Cosine(warmup=2).factor(step, 6), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1)

    def shape(self, step: int, steps: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * step / steps)) / 2


class Step(Schedule):
    """A multiplication by `gamma` after every `every` steps.

    >>> [Step(every=2, gamma=0.5).factor(step, 6) for step in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    kind: Literal["step"] = "step"
    every: int = Field(ge=1)
    gamma: float = Field(default=0.1, gt=0, le=1)

    def shape(self, step: int, steps: int) -> float:
        return self.gamma ** (step // self.every)


class Plateau(Schedule):
    """A multiplication by `gamma` after `patience` consecutive validations without improvement."""

    kind: Literal["plateau"] = "plateau"
    patience: int = Field(default=3, ge=1)
    gamma: float = Field(default=0.5, gt=0, lt=1)


KINDS: dict[str, type[Schedule]] = {
    str(each.model_fields["kind"].default): each for each in (Constant, Linear, Cosine, Step, Plateau)
}


def resolve(value: Any) -> dict[str, Any]:
    """Fill in the options of a schedule given by name, or as a mapping with `kind` (by default constant).

    Errors: `pydantic.ValidationError` (a `ValueError`), located at the option.

    >>> resolve("cosine")
    {'kind': 'cosine', 'warmup': 0, 'final': 0.0}
    """
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise invalid("schedule", [Problem((), f"got {short_repr(value)}; expected a schedule's name or a mapping")])
    value = rename_schedule(value)
    kind = value.get("kind", "constant")
    if not isinstance(kind, str) or kind not in KINDS:
        known = f"expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        raise invalid("schedule", [Problem(("kind",), f"got unknown schedule {short_repr(kind)}; {known}")])
    return KINDS[kind].model_validate({**value, "kind": kind}).model_dump(mode="json")


class Rate:
    """Set an optimizer's learning rates by a schedule; `state` and `restore` complement those of the optimizer.

    >>> parameter = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
    >>> rate = Rate({"kind": "linear"}, 4, optimizer)
    >>> rate.set(2), optimizer.param_groups[0]["lr"]
    (0.5, 0.05)
    """

    def __init__(self, resolved: Mapping[str, Any], steps: int, optimizer: torch.optim.Optimizer) -> None:
        self.schedule = KINDS[resolved["kind"]].model_validate(dict(resolved))
        self.steps, self.optimizer = steps, optimizer
        self.full = [group["lr"] for group in optimizer.param_groups]
        self.scale, self.watch = 1.0, Improvement()

    def set(self, step: int, scale: float = 1.0) -> float:
        """Set the rates of step `step`, counted from 0, times the task's `scale`; return their factor."""
        factor = self.schedule.factor(step, self.steps) * self.scale * scale
        for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
            group["lr"] = full * factor
        return factor

    def see(self, score: float) -> None:
        """Record a validation score."""
        if isinstance(self.schedule, Plateau):
            self.watch.see(score)
            if self.watch.since >= self.schedule.patience:
                self.scale, self.watch.since = self.scale * self.schedule.gamma, 0

    def state(self) -> dict[str, float]:
        """Return the state for `restore`."""
        return {"scale": self.scale, "best": self.watch.best, "since": self.watch.since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a `state`."""
        self.scale, self.watch.best, self.watch.since = state["scale"], state["best"], state["since"]


def _schema() -> dict[str, Any]:
    models = [kind.model_json_schema() for kind in KINDS.values()]
    for model in models:
        model["description"] = model.get("description", "").split("\n")[0]  # absent under python -OO
    return {"anyOf": [{"enum": list(KINDS)}, *models]}


SCHEMA: dict[str, Any] = _schema()
