"""Wrong windows."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

import atn_norms as an
from atn_norms.pytree import expand_mask, where_mask
from tests.testing.gallery.entry import wrong


class Three(an.Window):
    """Correct: the last three unmasked steps."""

    steps = 3

    def initial(self, now: Any) -> Any:
        leaves = tuple(leaf.new_zeros((leaf.shape[0], self.steps - 1, *leaf.shape[1:])) for leaf in now)
        return leaves[0].new_zeros(leaves[0].shape[0], self.steps - 1), leaves

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights = torch.cat([state[0], weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        pooled = type(now)(*leaves).pool(weights, 1)
        return pooled, where_mask(weight > 0, (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves)), state)

    def weight_at(self, age: Tensor) -> Any:
        return (age < 3).to(age.dtype)


class Decaying(an.Window):
    """Correct: every step counts half as much as the next."""

    factor = 0.5

    def initial(self, now: Any) -> Any:
        leaves = tuple(torch.zeros_like(leaf) for leaf in now)
        return leaves[0].new_zeros(leaves[0].shape[0]), leaves

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        total, past = state[0] * self.factor, state[1]
        both = type(now)(*(torch.stack(pair, 1) for pair in zip(past, now, strict=True)))
        pooled = both.pool(torch.stack([total, weight], 1), 1)
        return pooled, where_mask(weight > 0, (total + weight, tuple(pooled)), state)

    def weight_at(self, age: Tensor) -> Any:
        return 0.5**age


@wrong("it_builds")
class NeedsAnArgument(Three):
    """A window that its spec builds without a required argument."""

    def __init__(self, steps: int) -> None:
        self.steps = steps


@wrong("calls_are_pure")
class KeepsADeque(Three):
    """Stores the past in a deque on itself, which leaks into the next call."""

    def __init__(self) -> None:
        self.past: deque[Any] = deque(maxlen=2)

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        fitting = [past for past in self.past if past[0].shape == now[0].shape]
        leaves = [torch.stack([*(past[i] for past in fitting), leaf], 1) for i, leaf in enumerate(now)]
        pooled = type(now)(*leaves).pool(torch.ones(len(fitting) + 1, dtype=torch.float64), 1)
        self.past.append(tuple(leaf.detach() for leaf in now))
        return pooled, state


@wrong("inputs_are_not_modified")
class WeighsInPlace(Three):
    """Multiplies the statistic by its weight in place."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        with torch.no_grad():
            for leaf in now:
                leaf.mul_(expand_mask(weight, leaf) * 0.5)
        return super().push(now, weight, state)


@wrong("gradients_are_derivatives")
class DetachesThePast(Three):
    """Stores detached statistics, so the gradient reaches the current step alone."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled, (weights, leaves) = super().push(now, weight, state)
        return pooled, (weights, tuple(leaf.detach() for leaf in leaves))


@wrong("a_scan_is_its_pushes")
class ScansAroundTheStep(Three):
    """Scans with a window centred on each step, half of it in the future."""

    def scan(self, steps: Any, weights: Tensor, state: Any) -> Any:
        pooled, state = super().scan(steps, weights, state)
        return type(steps)(*(torch.cat([leaf[1:], leaf[-1:]]) for leaf in pooled)), state


@wrong("a_scan_is_its_pushes")
class ScansAfresh(Three):
    """Ignores the state passed to a scan and starts from an empty one."""

    def scan(self, steps: Any, weights: Tensor, state: Any) -> Any:
        first = type(steps)(*(leaf[0] for leaf in steps))
        return super().scan(steps, weights, self.initial(first))


@wrong("masked_steps_have_no_effect")
class CountsPadding(Three):
    """Removes an older step from the window at a step of weight 0."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights = torch.cat([state[0], weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        return type(now)(*leaves).pool(weights, 1), (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves))


@wrong("masked_steps_have_no_effect")
class DecaysThroughPadding(Decaying):
    """Decays during masked steps."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled, (total, leaves) = super().push(now, weight, state)
        return pooled, (torch.where(weight > 0, total, state[0] * self.factor), leaves)


@wrong("rows_have_separate_states")
class PutsTimeFirst(Three):
    """Stores its state with time first, so that reordering the batch reorders time."""

    def initial(self, now: Any) -> Any:
        weights, leaves = super().initial(now)
        return weights.transpose(0, 1), tuple(leaf.transpose(0, 1) for leaf in leaves)

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        turned = state[0].transpose(0, 1), tuple(leaf.transpose(0, 1) for leaf in state[1])
        pooled, (weights, leaves) = super().push(now, weight, turned)
        return pooled, (weights.transpose(0, 1), tuple(leaf.transpose(0, 1) for leaf in leaves))


@wrong("rows_have_separate_states")
class SharesOneMemory(Decaying):
    """Pools the rows of a batch into one state."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled, (total, leaves) = super().push(now, weight, state)
        return pooled, (total, tuple(leaf.mean(0, keepdim=True).expand_as(leaf) for leaf in leaves))


@wrong("a_state_may_be_used_twice")
class WritesIntoTheState(Three):
    """Writes the new step into the state passed in, as into a ring buffer."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled, after = super().push(now, weight, state)
        with torch.no_grad():
            for old, new in zip((state[0], *state[1]), (after[0], *after[1]), strict=True):
                old.copy_(new)
        return pooled, after


@wrong("a_state_may_be_used_twice")
class RemembersUntilAFreshState(Three):
    """Stores its state on itself and clears it with `initial`: wrong for two interleaved streams."""

    def __init__(self) -> None:
        self.memory: Any = None

    def initial(self, now: Any) -> Any:
        self.memory = super().initial(now)
        return self.memory

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        known = self.memory if self.memory[0].shape == state[0].shape else state
        pooled, self.memory = super().push(now, weight, known)
        return pooled, self.memory


@wrong("equal_statistics_pool_to_themselves")
class StartsFromZero(Decaying):
    """A running average that starts at 0 without a correction."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled = type(now)(*(0.5 * old + 0.5 * new for old, new in zip(state[1], now, strict=True)))
        return pooled, where_mask(weight > 0, (state[0] + weight, tuple(pooled)), state)

    def weight_at(self, age: Tensor) -> Any:
        return None


@wrong("steps_count_as_declared")
class ForgetsAStepLate(Three):
    """Off by one: k steps in addition to the current one."""

    steps = 4


@wrong("steps_count_as_declared")
class ForgetsAStepEarly(Three):
    """Off by one: k - 1 steps, the current one included."""

    steps = 2


@wrong("steps_count_as_declared")
class LeavesOutTheCurrentStep(Three):
    """Normalizes a step by the steps before it, if there are any."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights, leaves = state
        pooled = type(now)(*leaves).pool(weights, 1)
        known = weights.sum(1) > 0
        before = type(now)(*(torch.where(expand_mask(known, a), a, b) for a, b in zip(pooled, now, strict=True)))
        return before, super().push(now, weight, state)[1]


@wrong("steps_count_as_declared")
class DecaysByE(Decaying):
    """Declares a half-life and decays by the factor of a mean lifetime."""

    factor = 0.36787944117144233


@wrong("steps_count_as_declared")
class CountsStepsAlike(Three):
    """Merges steps of 30 samples and of 2 samples with equal weights."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        return super().push(now, (weight > 0).double(), state)


@wrong("a_spike_is_forgotten")
class ForgetsBySubtracting(Three):
    """Keeps running sums and subtracts the oldest step: wrong forever, but only after a spike."""

    def initial(self, now: Any) -> Any:
        sums = tuple(torch.zeros_like(leaf) for leaf in now)
        return *super().initial(now), sums

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights, leaves, sums = state
        added = [s + expand_mask(weight, new) * new for s, new in zip(sums, self._raw(now), strict=True)]
        total = expand_mask(weights.sum(1) + weight, now[0])
        pooled = self._from_raw(now, [each / total.clamp(min=1e-30) for each in added])
        oldest = type(now)(*(leaf[:, 0] for leaf in leaves))
        left = [
            each - expand_mask(weights[:, 0], old) * old for each, old in zip(added, self._raw(oldest), strict=True)
        ]
        after = (
            torch.cat([weights[:, 1:], weight.unsqueeze(1)], 1),
            tuple(torch.cat([old[:, 1:], new.unsqueeze(1)], 1) for old, new in zip(leaves, now, strict=True)),
            tuple(left),
        )
        return pooled, where_mask(weight > 0, after, state)

    @staticmethod
    def _raw(statistic: Any) -> list[Tensor]:
        return [statistic[0]] if len(statistic) == 1 else [statistic.mean, statistic.var + statistic.mean.square()]

    @staticmethod
    def _from_raw(now: Any, raw: list[Tensor]) -> Any:
        return type(now)(raw[0]) if len(raw) == 1 else type(now)(raw[0], raw[1] - raw[0].square())


@wrong("a_state_has_the_declared_layout")
class RemembersInFloat32(Three):
    """Allocates its state in torch's default type, which rounds statistics of float64."""

    def initial(self, now: Any) -> Any:
        weights, leaves = super().initial(now)
        return weights.float(), tuple(leaf.float() for leaf in leaves)

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled, (weights, leaves) = super().push(now, weight, state)
        return pooled, (weights.float(), tuple(leaf.float() for leaf in leaves))


@wrong("a_state_has_the_declared_layout")
class GrowsItsMemory(Three):
    """Appends every step to its state: no step is ever dropped, and the size differs from its layout."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights = torch.cat([state[0], weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        return type(now)(*(leaf[:, -3:] for leaf in leaves)).pool(weights[:, -3:], 1), (weights, leaves)


@wrong("no_gradient_reaches_the_past")
class DetachesItsPastInName(Three):
    """Declares that its past is detached, and keeps the gradient of every step."""

    @property
    def detaches_past(self) -> bool:
        return True


@wrong("no_gradient_reaches_the_past")
class DetachesTheStepAsWell(Three):
    """Detaches the statistic of the current step together with the past."""

    @property
    def detaches_past(self) -> bool:
        return True

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        return super().push(type(now)(*(leaf.detach() for leaf in now)), weight, state)


@wrong("trainable_tensors_are_parameters")
class HidesItsParameter(Three):
    """Weights steps by a trainable tensor in a plain attribute: it has gradients, and no optimizer updates it."""

    def __init__(self) -> None:
        self.level = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights = torch.cat([state[0] * torch.sigmoid(self.level).to(state[0]), weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        pooled = type(now)(*leaves).pool(weights, 1)
        _, state = super().push(now, weight, state)
        return pooled, state

    def weight_at(self, age: Tensor) -> Any:
        return None
