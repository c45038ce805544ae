"""Window after online normalization: normalize each step with the exponentially weighted steps before it."""

from dataclasses import dataclass
from typing import Any, Literal

import atn_norms as an
import torch
from atn_norms.pytree import Tree, expand_mask, where_mask
from pydantic import Field
from torch import Tensor


@dataclass(frozen=True)
class Online(an.Window[Any]):
    r"""The unmasked steps before the current step, with weights that fall by `decay` per step back.

    The first step is normalized with its own statistics.

    $$w_s = \alpha^{t - 1 - s} \quad (s < t), \qquad W_0 = \{0\}$$

    For mean and variance this is the recursion of Chiley et al., *Online Normalization for Training Neural Networks*,
    arXiv 1905.05894, with weights divided by their sum, so that initial values have no effect:

    $$\mu_t = \mu_{t-1} + (1 - \alpha_t)(a_t - \mu_{t-1}), \qquad
    v_t = \alpha_t v_{t-1} + \alpha_t (1 - \alpha_t)(a_t - \mu_{t-1})^2, \qquad
    y_t = \mathrm{normalize}(a_t;\, \mu_{t-1}, v_{t-1}),$$

    where $1 - \alpha_t = 1 / \sum_{s \le t} \alpha^{t-s}$ tends to $1 - \alpha$. The README lists the
    differences from the paper: mainly time instead of training samples, and the exact gradient instead of a control
    process.

    | symbol | meaning | shape or unit |
    |---|---|---|
    | `decay` | alpha, above 0 and below 1 | per unmasked step |
    | state | `(total decayed weight, pooled leaves)` of the steps so far | `([N], [N, ...])` |

    >>> window, steps = Online(decay=0.5), torch.tensor([[[4.0]], [[1.0]], [[9.0]], [[9.0]]])
    >>> state = window.initial(an.Average(steps[0]))
    >>> window.scan(an.Average(steps), torch.ones(4, 1), state)[0].mean.flatten().round(decimals=3)
    tensor([4., 4., 2., 6.])
    """

    decay: float

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0 < self.decay < 1:
            raise ValueError(f"decay: got {self.decay!r}; expected a number above 0 and below 1")

    def initial(self, now: Any) -> Tree:
        leaves = tuple(torch.zeros_like(leaf) for leaf in now)
        return leaves[0].new_zeros(leaves[0].shape[0]), leaves

    def push(self, now: Any, weight: Tensor, state: Tree) -> tuple[Any, Tree]:
        total, past = state
        pooled = type(now)(
            *(torch.where(expand_mask(total > 0, new), old, new) for old, new in zip(past, now, strict=True))
        )
        both = type(now)(*(torch.stack(pair, 1) for pair in zip(past, now, strict=True)))
        after = both.pool(torch.stack([total * self.decay, weight], 1), 1)
        return pooled, where_mask(weight > 0, (total * self.decay + weight, tuple(after)), state)

    def spec(self) -> "OnlineSpec":
        return OnlineSpec(decay=self.decay)


class OnlineSpec(an.WindowSpec):
    """Options of `Online`."""

    kind: Literal["online"] = "online"
    decay: float = Field(default=0.95, gt=0, lt=1, description="alpha: weight of a step relative to the next step")

    def build(self) -> Online:
        return Online(self.decay)


@an.hookimpl
def atn_norms_register(registry):
    registry.window(OnlineSpec)
