"""Time windows: the weights of past steps in the pooled statistic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from atn_norms.deprecation import RenamedAttribute, adopt_renamed
from atn_norms.errors import mismatch, typed_repr
from atn_norms.options import Options, checked_count
from atn_norms.pytree import Leaf, Tree, detach, layout, where_mask
from atn_norms.registry import KindField
from atn_norms.statistics import Statistic

S = TypeVar("S", bound=Statistic)
AGES = 1024  # ages at which `uniform_weights` compares the declared weights


class Window(ABC, Generic[S]):
    """Pool the statistics of recent steps; the state is passed in and returned.

    State is a plain nested tuple of tensors with the batch on axis 0 of every leaf. It holds per-step statistics, not
    the aggregates of a particular algorithm, so two implementations of a window can alternate within a sequence.
    A window is a frozen value, or an `nn.Module` if it has parameters.

    | symbol | meaning | shape |
    |---|---|---|
    | `now` | the statistic of the current step | leaves `[N, ...]` |
    | `weight` | weight of the step: 1 for an unmasked row, 0 for padding, or a number of samples | `[N]` |
    | `pooled` | the statistic over the window that ends with this step, of the type of `now` | leaves `[N, ...]` |

    Steps of weight 0 are masked: they leave the state of their row unchanged, and their `pooled` is undefined.
    """

    counts_alike = RenamedAttribute("uniform_weights")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adopt_renamed(cls)

    @abstractmethod
    def initial(self, now: S) -> Tree:
        """Return the state before the first step, for statistics shaped like `now`."""

    @abstractmethod
    def push(self, now: S, weight: Tensor, state: Tree) -> tuple[S, Tree]:
        """Add one step; return the statistic pooled over the window that ends with this step, and the new state."""

    def scan(self, steps: S, weights: Tensor, state: Tree) -> tuple[S, Tree]:
        """Apply `push` along axis 0 of `steps` (leaves `[T, N, ...]`) with `weights` `[T, N]`; may be vectorized."""
        return scan_by_steps(self, steps, weights, state)

    def layout(self, now: S) -> Any:
        """Return the layout of a state for statistics shaped like `now`; a state of another layout is rejected."""
        return layout(self.initial(now))

    def weight_at(self, age: Tensor) -> Tensor | None:
        """Declare the weight of a step by its age in unmasked steps (0: the current step), or return None.

        The conformance suite (`atn_norms.testing`) tests the declaration: `pooled` must be the merge of all steps so
        far, each with the product of its `weight` and its weight by age.
        """
        return None

    @property
    def detaches_past(self) -> bool:
        """True if no gradient flows into the state; the conformance suite then expects none from past steps."""
        return False

    @property
    def uniform_weights(self) -> bool:
        """True if all steps in the window have equal weight, so that also a maximum can be pooled."""
        weights = self.weight_at(torch.arange(AGES, dtype=torch.float64, device="cpu"))
        return weights is not None and bool(((weights == 0) | (weights == weights.max())).all())

    def spec(self) -> WindowSpec:
        """Return the options that build this window; `TypeError` if the class defines none."""
        got = f"{type(self).__name__} without `spec`"
        raise TypeError(mismatch(repr(self), got, "a method that returns its WindowSpec"))


def scan_by_steps(window: Window[S], steps: S, weights: Tensor, state: Tree) -> tuple[S, Tree]:
    """Scan with one `push` per step, the definition of `Window.scan`."""
    statistic = type(steps)
    pooled = []
    for *now, weight in zip(*(leaf.unbind(0) for leaf in steps), weights.unbind(0), strict=True):
        pooled_at_step, state = window.push(statistic(*now), weight, state)
        pooled.append(pooled_at_step)
    return statistic(*(torch.stack(leaves) for leaves in zip(*pooled, strict=True))), state


class WindowSpec(Options, ABC):
    """Options of a window: a frozen model with a `kind` and a method that builds the window."""

    family: ClassVar[str | None] = "window"
    kind: str

    @abstractmethod
    def build(self) -> Window[Any]:
        """Build the window."""


def to_window_options(value: Any) -> Any:
    """Return the options of a window, or of an integer; any other value unchanged."""
    if isinstance(value, Window):
        return value.spec()
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return {"kind": "sliding", "steps": value} if is_count else value


AnyWindow = Annotated[WindowSpec, KindField("window", to_window_options, {"type": "integer", "minimum": 1})]


@dataclass(frozen=True)
class Sliding(Window[S]):
    r"""Equal weights for the last `steps` unmasked steps, the current step included.

    $$m_t = \min(t + 1, k), \qquad W_t = \{t - m_t + 1, \dots, t\}$$

    Source: Pospisil, Zadorozhnyy, Ye, arXiv 2209.14439. k = 1 uses the current step alone. Before step k the window
    is shorter.

    | symbol | meaning | |
    |---|---|---|
    | `steps` | k, in time steps | at least 1 |
    | state | `(weights [N, k-1], leaves [N, k-1, ...])`, oldest first | |

    Errors: `TypeError` if k is no integer, `ValueError` if k is below 1.

    >>> import torch
    >>> from atn_norms import Average, Sliding
    >>> window, steps = Sliding(2), torch.tensor([[[1.0]], [[3.0]], [[7.0]]])
    >>> state = window.initial(Average(steps[0]))
    >>> pooled, state = window.scan(Average(steps), torch.ones(3, 1), state)
    >>> pooled.mean.flatten()
    tensor([1., 2., 5.])
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_count("steps", self.steps))

    def initial(self, now: S) -> Tree:
        past = self.steps - 1
        leaves = tuple(leaf.new_zeros((leaf.shape[0], past, *leaf.shape[1:])) for leaf in now)
        return leaves[0].new_zeros((leaves[0].shape[0], past)), leaves

    def layout(self, now: S) -> Any:
        past = self.steps - 1
        return Leaf((past,)), tuple(Leaf((past, *leaf.shape[1:])) for leaf in now)

    def push(self, now: S, weight: Tensor, state: Tree) -> tuple[S, Tree]:
        if self.steps == 1:
            return now, state
        weights, leaves = state = _constant_weights(state)
        weights = torch.cat([weights, weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(leaves, now, strict=True))
        pooled = type(now)(*leaves).pool(weights, 1)
        return pooled, where_mask(weight > 0, (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves)), state)

    def scan(self, steps: S, weights: Tensor, state: Tree) -> tuple[S, Tree]:
        if self.steps == 1:
            return steps, state
        if weights.shape[0] == 1:
            return scan_by_steps(self, steps, weights, state)
        state = _constant_weights(state)
        row = torch.arange(weights.shape[1], device=weights.device)
        mask = weights > 0
        # A window counts unmasked steps, so each row's unmasked steps are moved to the front before windows are cut.
        # The stable sort is done by counting, because exporters support no sort.
        live_rank, masked_rank = mask.cumsum(0) - 1, mask.sum(0) + (~mask).cumsum(0) - 1
        time = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1).expand(mask.shape)
        order = torch.zeros_like(time).scatter(0, torch.where(mask, live_rank, masked_rank), time)
        timeline = [
            torch.cat([old, leaf[order, row].transpose(0, 1)], 1)
            for old, leaf in zip((state[0], *state[1]), (weights, *steps), strict=True)
        ]
        weight_windows, *windows = (line.unfold(1, self.steps, 1).movedim(-1, 2) for line in timeline)
        pooled = type(steps)(*windows).pool(weight_windows, 2)
        pooled = type(steps)(*(leaf[row, live_rank.clamp(min=0)] for leaf in pooled))
        last = mask.sum(0).unsqueeze(1) + torch.arange(self.steps - 1, device=weights.device)
        last_weights, *last_leaves = (line[row.unsqueeze(1), last] for line in timeline)
        return pooled, (last_weights, tuple(last_leaves))

    def weight_at(self, age: Tensor) -> Tensor:
        return (age < self.steps).to(age.dtype)

    def spec(self) -> SlidingSpec:
        return SlidingSpec(steps=self.steps)


class SlidingSpec(WindowSpec):
    """Options of `Sliding`."""

    kind: Literal["sliding"] = "sliding"
    steps: int = Field(ge=1, le=1_000_000, description="k: number of pooled steps, the current step included")

    def build(self) -> Sliding[Any]:
        return Sliding(self.steps)


def _constant_weights(state: Tree) -> Tree:
    """Detach the weights of a state: they count samples, and no backend has a gradient for them."""
    weights, leaves = state
    return weights.detach(), leaves


class _Running(Window[S]):
    """A window over all steps, whose state is the pooled past: `(total weight [N], pooled leaves [N, ...])`."""

    def initial(self, now: S) -> Tree:
        leaves = tuple(torch.zeros_like(leaf) for leaf in now)
        return leaves[0].new_zeros(leaves[0].shape[0]), leaves

    def layout(self, now: S) -> Any:
        return Leaf(()), tuple(Leaf(tuple(leaf.shape[1:])) for leaf in now)

    def push(self, now: S, weight: Tensor, state: Tree) -> tuple[S, Tree]:
        total, past = state = _constant_weights(state)
        total = self._decayed(total)
        both = (torch.stack(pair, 1) for pair in zip(past, now, strict=True))
        pooled = type(now)(*both).pool(torch.stack([total, weight], 1), 1)
        return pooled, where_mask(weight > 0, (total + weight, tuple(pooled)), state)

    @abstractmethod
    def _decayed(self, total: Tensor) -> Tensor:
        """Return the total weight of the past, one step later."""


@dataclass(frozen=True)
class Cumulative(_Running[S]):
    """Equal weights for every unmasked step since the initial state.

    | symbol | meaning | shape |
    |---|---|---|
    | state | `(total weight, pooled leaves)` | `([N], [N, ...])` |

    The state of an `Exponential` window has the same layout, so passing it to a `Cumulative` window raises no error.

    >>> import torch
    >>> from atn_norms import AssortedTime, Cumulative, LayerNorm
    >>> norm = AssortedTime(LayerNorm(4), Cumulative())
    >>> norm.scan(torch.randn(7, 2, 4))[0].shape
    torch.Size([7, 2, 4])
    """

    def _decayed(self, total: Tensor) -> Tensor:
        return total

    def weight_at(self, age: Tensor) -> Tensor:
        return torch.ones_like(age)

    def spec(self) -> CumulativeSpec:
        return CumulativeSpec()


class CumulativeSpec(WindowSpec):
    """Options of `Cumulative`: none but the kind."""

    kind: Literal["cumulative"] = "cumulative"

    def build(self) -> Cumulative[Any]:
        return Cumulative()


@dataclass(frozen=True)
class Exponential(_Running[S]):
    r"""Weights that halve every `half_life` unmasked steps.

    $$w_s = 2^{-(t - s) / h}$$

    Derived: an exponentially weighted average whose weights are normalized at every step, so the first steps are not
    biased towards zero. The age t - s counts unmasked steps.

    | symbol | meaning | shape or unit |
    |---|---|---|
    | `half_life` | h | time steps, positive and finite |
    | state | `(total decayed weight, pooled leaves)` | `([N], [N, ...])` |

    Errors: `TypeError` if h is no number, `ValueError` if h is not positive and finite.

    >>> import torch
    >>> from atn_norms import AssortedTime, Exponential, RMSNorm
    >>> norm = AssortedTime(RMSNorm(4), Exponential(half_life=5.0))
    >>> norm.scan(torch.randn(7, 2, 4))[0].shape
    torch.Size([7, 2, 4])
    """

    half_life: float

    def __post_init__(self) -> None:
        if isinstance(self.half_life, bool) or not isinstance(self.half_life, (int, float)):
            raise TypeError(mismatch("half_life", typed_repr(self.half_life), "a positive, finite number of steps"))
        if not 0 < self.half_life < float("inf"):
            raise ValueError(mismatch("half_life", str(self.half_life), "a positive, finite number of steps"))

    def _decayed(self, total: Tensor) -> Tensor:
        return total * 2.0 ** (-1.0 / self.half_life)

    def weight_at(self, age: Tensor) -> Tensor:
        return 2.0 ** (-age / self.half_life)

    def spec(self) -> ExponentialSpec:
        return ExponentialSpec(half_life=self.half_life)


class ExponentialSpec(WindowSpec):
    """Options of `Exponential`."""

    kind: Literal["exponential"] = "exponential"
    half_life: float = Field(gt=0, description="number of steps after which the weight of a step is halved")

    def build(self) -> Exponential[Any]:
        return Exponential(self.half_life)


@dataclass(frozen=True)
class Detached(Window[S]):
    r"""Another window without a gradient through its past: the values are the same, the gradient is not.

    $$\frac{\partial \mu_t}{\partial a_s} = \frac{\partial v_t}{\partial a_s} = 0 \quad \text{for} \quad s < t$$

    Derived: a control that separates the two effects of a window, the pooled scale and the direct paths of the gradient
    to the past. No gradient reaches the state that is passed in, and the returned state has none.

    | symbol | meaning | |
    |---|---|---|
    | `window` | the window, or an integer k (the last k steps) | without parameters |
    | state | as of `window` | |

    Errors: `TypeError` if `window` is no window, or has parameters.

    >>> import torch
    >>> from atn_norms import AssortedTime, Detached, LayerNorm
    >>> xs = torch.randn(3, 1, 4, requires_grad=True)
    >>> ys, _ = AssortedTime(LayerNorm(4), Detached(2)).scan(xs)
    >>> torch.autograd.grad((ys[2] * torch.randn(4)).sum(), xs)[0][:2].abs().max()
    tensor(0.)
    """

    window: Window[S]

    def __post_init__(self) -> None:
        window = self.window if isinstance(self.window, Window) else Sliding(self.window)
        if isinstance(window, nn.Module):
            got = f"{type(window).__name__}, a module"
            raise TypeError(mismatch("window", got, "a window without parameters"))
        object.__setattr__(self, "window", window)

    @property
    def detaches_past(self) -> bool:
        return True

    def initial(self, now: S) -> Tree:
        return self.window.initial(now)

    def layout(self, now: S) -> Any:
        return self.window.layout(now)

    def push(self, now: S, weight: Tensor, state: Tree) -> tuple[S, Tree]:
        pooled, after = self.window.push(now, weight, detach(state))
        return pooled, detach(after)

    def weight_at(self, age: Tensor) -> Tensor | None:
        return self.window.weight_at(age)

    def spec(self) -> DetachedSpec:
        return DetachedSpec(window=self.window.spec())


class DetachedSpec(WindowSpec):
    """Options of `Detached`."""

    kind: Literal["detached"] = "detached"
    window: AnyWindow = Field(description="the window whose past has no gradient")

    def build(self) -> Detached[Any]:
        return Detached(self.window.build())
