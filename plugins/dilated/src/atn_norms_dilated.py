"""Dilated window: pool every d-th past step, a long reach with few statistics."""

from dataclasses import dataclass
from typing import Any, Literal

import atn_norms as an
import torch
from atn_norms.pytree import Tree, where_mask
from pydantic import Field
from torch import Tensor


@dataclass(frozen=True)
class Dilated(an.Window[Any]):
    r"""The current step and every d-th unmasked step before it, `steps` in total, with equal weights.

    $$W_t = \{t,\; t - d,\; t - 2d,\; \dots,\; t - (k - 1) d\} \cap \{0, 1, \dots\}$$

    Source: derived, after the dilated convolutions of van den Oord et al., arXiv 1609.03499. With d = 1 it is
    a sliding window. If d is the period of a signal, each step is normalized with steps of the same phase only.

    | symbol | meaning | |
    |---|---|---|
    | `steps` | k, in time steps | at least 1 |
    | `dilation` | d, in time steps | at least 1 |
    | state | `(weights [N, (k-1)d], leaves [N, (k-1)d, ...])`, oldest first, as in a sliding window | |

    >>> window, steps = Dilated(steps=2, dilation=2), torch.tensor([[[1.0]], [[2.0]], [[5.0]], [[8.0]]])
    >>> state = window.initial(an.Average(steps[0]))
    >>> window.scan(an.Average(steps), torch.ones(4, 1), state)[0].mean.flatten()
    tensor([1., 2., 3., 5.])
    """

    steps: int
    dilation: int

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("dilation", self.dilation)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}; expected an integer of at least 1")

    @property
    def reach(self) -> an.Sliding[Any]:
        """Sliding window from the oldest pooled step to the current step; it has the same state."""
        return an.Sliding((self.steps - 1) * self.dilation + 1)

    def initial(self, now: Any) -> Tree:
        return self.reach.initial(now)

    def layout(self, now: Any) -> Any:
        return self.reach.layout(now)

    def push(self, now: Any, weight: Tensor, state: Tree) -> tuple[Any, Tree]:
        if self.steps == 1:
            return now, state
        weights = torch.cat([state[0], weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        chosen = type(now)(*(leaf[:, :: self.dilation] for leaf in leaves))
        pooled = chosen.pool(weights[:, :: self.dilation], 1)
        return pooled, where_mask(weight > 0, (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves)), state)

    def weight_at(self, age: Tensor) -> Tensor:
        return ((age % self.dilation == 0) & (age < self.steps * self.dilation)).to(age.dtype)

    def spec(self) -> "DilatedSpec":
        return DilatedSpec(steps=self.steps, dilation=self.dilation)


class DilatedSpec(an.WindowSpec):
    """Options of `Dilated`."""

    kind: Literal["dilated"] = "dilated"
    steps: int = Field(default=5, ge=1, le=100_000, description="k: number of pooled steps, including the current step")
    dilation: int = Field(default=2, ge=1, le=10_000, description="d: distance between pooled steps")

    def build(self) -> Dilated:
        return Dilated(self.steps, self.dilation)


@an.hookimpl
def atn_norms_register(registry):
    registry.window(DilatedSpec)
