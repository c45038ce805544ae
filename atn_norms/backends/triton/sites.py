"""A norm site of one call: the buffers of the kernels, the state before and after, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atn_norms.backends.fused.plan import DOUBLE, SitePlan
from atn_norms.backends.triton import pooling
from atn_norms.backends.triton.pooling import Site


class SiteCall:
    """A norm site of one call, with the buffers of the kernels."""

    def __init__(
        self, plan: SitePlan, sizes: tuple[int, int], affine: list[Tensor], states: list[Tensor], kept: Tensor
    ) -> None:
        self.plan, self.states = plan, states
        self.steps, self.batch = sizes
        self.past = past(plan, bool(states))
        self.gain, self.shift = affine
        self.norm = pooling.LAYER.value if plan.centred else pooling.RMS.value
        self.window = (
            pooling.SINGLE.value if plan.steps == 1 else pooling.SLIDING.value if plan.steps else pooling.DECAYING.value
        )
        line = self.past + self.steps
        parts = kept.split([line, line, self.steps, self.steps, self.steps, self.past])
        self.mean, self.var, self.total, self.pooled_mean, self.pooled_var, self.weight = parts
        self.kept = kept
        self.back: dict[str, Tensor] = {}
        self.ahead: dict[str, Tensor] = {}

    def start(self) -> None:
        """Allocate the buffers of the forward pass, and copy the state into them."""
        running = self.kept.new_zeros(3, self.batch)
        if self.window == pooling.SLIDING.value:
            self.ahead["ends"] = self.kept.new_empty(3, self.past + self.steps, self.batch)
        if self.states:
            weight, *leaves = (state.reshape(self.batch, -1).t() for state in self.states)
            mean, var = leaves if self.plan.centred else (torch.zeros_like(leaves[0]), leaves[0])
            if self.window == pooling.DECAYING.value:
                running = torch.cat([weight, mean, var])
            elif self.past:
                self.weight.copy_(weight)
                self.mean[: self.past].copy_(mean)
                self.var[: self.past].copy_(var)
                running = torch.stack(merged(weight, mean, var))
        self.ahead["running"] = running

    def turn(self, extra: Tensor | None) -> None:
        """Allocate the gradients of the backward pass."""
        lines = (3, self.steps, self.batch)
        self.back = {
            "slopes": self.kept.new_empty(lines),
            "later": self.kept.new_empty(lines),
            "carried": self.kept.new_zeros(3, self.batch),
        }
        if extra is not None:
            self.back["extra"] = extra

    def site(self) -> Site:
        """Return all tensors of the site for a kernel."""
        both = self.ahead | self.back
        kept = {name: both.get(name) for name in ("ends", "running", "slopes", "later", "carried", "extra")}
        return Site(
            gain=self.gain,
            shift=self.shift,
            weight=self.weight,
            mean=self.mean,
            var=self.var,
            total=self.total,
            pooled_mean=self.pooled_mean,
            pooled_var=self.pooled_var,
            steps=self.plan.steps,
            past=self.past,
            **kept,
        )

    def following(self, lengths: Tensor | None) -> list[Tensor]:
        """Return the leaves of the state after each row's last step."""
        shapes = self.plan.shapes(self.batch)
        if not self.plan.steps:
            leaves = [line.clone() for line in self.ahead["running"]]  # results must not share memory
        else:
            lines = [self._timeline(self.weight, 1.0), self._timeline(self.mean), self._timeline(self.var)]
            leaves = [line.gather(0, self._last(lengths)).t() for line in lines]
        leaves = leaves if self.plan.centred else [leaves[0], leaves[2]]
        return [leaf.reshape(shape).contiguous() for leaf, shape in zip(leaves, shapes, strict=True)]

    def _timeline(self, line: Tensor, fill: float | None = None) -> Tensor:
        """Return the timeline: k - 1 entries before the first step, from the state or empty, and one for each step."""
        own = line if fill is None else torch.cat([line, line.new_full((self.steps, self.batch), fill)])
        return torch.cat([own.new_zeros(self.plan.prefix - self.past, self.batch), own])

    def _last(self, lengths: Tensor | None) -> Tensor:
        """Return the indices `[k - 1, B]` on the timeline of the statistics in each row's state."""
        lengths = self.kept.new_full((self.batch,), self.steps, dtype=torch.int64) if lengths is None else lengths
        return lengths + torch.arange(self.plan.prefix, device=lengths.device).unsqueeze(1)

    def state_grads(self, dnext: Sequence[Tensor | None], lengths: Tensor | None) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of the steps' statistics `[2, T, B]` and the old state's leaves from the new state's."""
        passed = [torch.zeros_like(state) for state in self.states]
        places = [1, 2] if self.plan.centred else [2]
        grads = [None if leaf is None else leaf.reshape(self.batch, -1).t() for leaf in dnext[1:]]
        if all(grad is None for grad in grads):
            return None, passed
        extra = self.kept.new_zeros(2, self.steps, self.batch)
        for number, (place, grad) in enumerate(zip(places, grads, strict=True)):
            if grad is None:
                continue
            if self.plan.steps:
                line = grad.new_zeros(self.plan.prefix + self.steps, self.batch)
                line.scatter_(0, self._last(lengths), grad)
                extra[place - 1] = line[self.plan.prefix :]
                before = line[: self.plan.prefix].t()
            else:
                extra[place - 1] = grad
                before = grad.t() if lengths is None else torch.where((lengths == 0).unsqueeze(1), grad.t(), 0.0)
                before = torch.zeros_like(before) if lengths is None else before
            if self.states:
                passed[1 + number] = before.reshape(self.states[1 + number].shape).contiguous()
        return extra, passed

    def before(self, passed: list[Tensor]) -> list[Tensor]:
        """Return the gradients of the initial state's leaves, through the windows and directly."""
        if not self.states or not self.plan.prefix:
            return passed
        alpha, beta, level = self.back["slopes"]
        weight, *leaves = (state.reshape(self.batch, -1).t() for state in self.states)
        mean = leaves[0] if self.plan.centred else torch.zeros_like(leaves[0])
        if self.plan.steps:  # entry i is in the windows of steps 0 to i
            place = torch.arange(self.past, device=alpha.device).clamp(max=self.steps - 1)
            alpha, beta, level = (line.cumsum(0)[place] for line in (alpha, beta, level))
        else:
            time = torch.arange(1, self.steps + 1, device=alpha.device, dtype=DOUBLE).unsqueeze(1)
            fading = self.plan.decay**time
            alpha, beta, level = ((line * fading).sum(0, keepdim=True) for line in (alpha, beta, level))
        found = [weight * (beta + (mean * alpha - level)), weight * alpha / 2]
        found = [torch.where(weight > 0, each, 0.0) for each in found]
        found = found if self.plan.centred else found[1:]
        return [
            passed[0],
            *(old + new.t().reshape(old.shape) for old, new in zip(passed[1:], found, strict=True)),
        ]


def past(plan: SitePlan, carried_on: bool) -> int:
    """Number of statistics in the state that the kernels read one by one."""
    return plan.prefix if carried_on and plan.steps else 0


def merged(weight: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge all statistics along axis 0; statistics of weight 0 are masked."""
    there = weight > 0
    mean, var = (torch.where(there, leaf, 0.0) for leaf in (mean, var))
    total = weight.sum(0)
    share = weight / torch.where(total > 0, total, 1.0)
    middle = (share * mean).sum(0)
    return total, middle, (share * (var + (mean - middle).square())).sum(0)
