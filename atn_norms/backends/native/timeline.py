"""The statements of one norm site over a whole sequence, in the kernels' layout: time first, lanes side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atn_norms.backends.native.library import SiteArgs
from atn_norms.backends.native.plan import SitePlan

DOUBLE = torch.float64


@dataclass
class Timeline:
    """Arrays of one site; prefix statements come from the state, then one for each step.

    | array | meaning | shape |
    |---|---|---|
    | `weight` | weights of the prefix | `[prefix, B]` |
    | `mean`, `var` | own statements | `[prefix + T, B, G]` |
    | `mu`, `v`, `share` | pooled statement of each step, and 1 / the window's total weight | `[T, B, G]` |
    """

    plan: SitePlan
    weight: Tensor
    mean: Tensor
    var: Tensor
    mu: Tensor
    v: Tensor
    share: Tensor

    @classmethod
    def fresh(cls, plan: SitePlan, state: list[Tensor], steps: int, batch: int) -> Timeline:
        """Room for `steps` steps after what the state brings."""
        lanes = (batch, plan.groups)
        mean, var = (torch.empty(plan.prefix + steps, *lanes, dtype=DOUBLE) for _ in range(2))
        weight = torch.empty(plan.prefix, batch, dtype=DOUBLE)
        if plan.prefix:
            weight.copy_(_time_first(state[0], plan))
            for array, leaf in zip((mean, var) if plan.centred else (var,), state[1:], strict=True):
                array[: plan.prefix].copy_(_time_first(leaf, plan).reshape(plan.prefix, *lanes))
        if not plan.centred:
            mean.zero_()
        return cls(plan, weight, mean, var, *(torch.empty(steps, *lanes, dtype=DOUBLE) for _ in range(3)))

    def arrays(self) -> list[Tensor]:
        """Every array, in the order of the fields."""
        return [self.weight, self.mean, self.var, self.mu, self.v, self.share]

    def state(self, before: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
        """The state after each row's last live step, shaped like the one before."""
        plan, (steps, batch) = self.plan, self.mu.shape[:2]
        if plan.prefix == 0:
            return [leaf.clone() for leaf in before]
        rows = torch.arange(batch)
        if plan.steps == 0:
            last = torch.full((batch,), steps - 1) if lengths is None else lengths - 1
            at, alive = last.clamp(min=0), last >= 0
            pooled = [(1 / self.share)[at, rows][:, 0], *((self.mu, self.v) if plan.centred else (self.v,))]
            new = [pooled[0], *(array[at, rows] for array in pooled[1:])]
            return [
                torch.where(alive.reshape(-1, *[1] * (old.ndim - 1)), leaf.reshape(old.shape), old)
                for leaf, old in zip(new, before, strict=True)
            ]
        weights = torch.cat([self.weight, torch.ones(steps, batch, dtype=DOUBLE)])
        own = (self.mean, self.var) if plan.centred else (self.var,)
        first = torch.full((batch,), steps) if lengths is None else lengths
        kept = first.unsqueeze(1) + torch.arange(plan.prefix)  # [B, prefix]
        leaves = [array[kept, rows.unsqueeze(1)] for array in (weights, *own)]
        return [leaf.reshape(old.shape) for leaf, old in zip(leaves, before, strict=True)]

    def fill(self, site: SiteArgs, gain: Tensor, shift: Tensor) -> None:
        """Point the kernel's structure at the arrays."""
        plan = self.plan
        site.norm, site.window = (1 if plan.centred else 2), (0 if plan.steps else 1)
        site.features, site.groups, site.prefix = plan.features, plan.groups, plan.prefix
        site.decay, site.eps = plan.decay, plan.eps
        seen = (self.weight > 0).any(1).nonzero()
        site.hidden = int(seen[0]) if len(seen) else plan.prefix
        site.gain, site.shift = gain.data_ptr(), shift.data_ptr()
        for name, array in zip(("weight", "mean", "var", "mu", "v", "share"), self.arrays(), strict=True):
            setattr(site, name, array.data_ptr())


@dataclass
class Gradients:
    """What the kernel collects of one site on the way back; shapes as in `Timeline`."""

    dmean: Tensor
    dvar: Tensor
    dmu: Tensor
    dv: Tensor
    carry: Tensor
    dgain: Tensor
    dshift: Tensor

    @classmethod
    def of(cls, line: Timeline, asked: list[Tensor | None], lengths: Tensor | None, blocks: int) -> Gradients:
        """Zeros, and what is asked of the final state's statements (`asked`: the gradients of its leaves, or None)."""
        plan, (steps, batch) = line.plan, line.mu.shape[:2]
        new = cls(
            *(torch.zeros_like(line.mean) for _ in range(2)),
            *(torch.zeros_like(line.mu) for _ in range(2)),
            torch.zeros(2, batch, plan.groups, dtype=DOUBLE),
            *(torch.zeros(blocks, plan.features, dtype=DOUBLE) for _ in range(2)),
        )
        if plan.prefix == 0:
            return new
        rows = torch.arange(batch)
        own = (new.dmean, new.dvar) if plan.centred else (new.dvar,)
        pooled = (new.dmu, new.dv) if plan.centred else (new.dv,)
        for to_own, to_pooled, leaf in zip(own, pooled, asked[1:], strict=True):
            if leaf is None:
                continue
            if plan.steps:
                first = torch.full((batch,), steps) if lengths is None else lengths
                kept = first.unsqueeze(1) + torch.arange(plan.prefix)
                to_own[kept, rows.unsqueeze(1)] = leaf.reshape(batch, plan.prefix, plan.groups).to(DOUBLE)
            else:
                last = torch.full((batch,), steps - 1) if lengths is None else lengths - 1
                flat, alive = leaf.reshape(batch, plan.groups).to(DOUBLE), (last >= 0).unsqueeze(1)
                to_pooled[last.clamp(min=0), rows] = torch.where(alive, flat, 0.0)
                to_own[0] = torch.where(alive, 0.0, flat)  # no step happened: the given state is the final one
        return new

    def fill(self, site: SiteArgs) -> None:
        """Point the kernel's structure at the arrays."""
        for name, array in vars(self).items():
            setattr(site, name, array.data_ptr())

    def state(self, line: Timeline, before: list[Tensor]) -> list[Tensor | None]:
        """Gradients of the given state's leaves; its weights have none."""
        plan = line.plan
        own = (self.dmean, self.dvar) if plan.centred else (self.dvar,)
        if plan.prefix == 0:
            return [None] * len(before)
        leaves = [array[: plan.prefix].transpose(0, 1) for array in own]
        return [None, *(leaf.reshape(old.shape).contiguous() for leaf, old in zip(leaves, before[1:], strict=True))]


def _time_first(leaf: Tensor, plan: SitePlan) -> Tensor:
    return leaf.transpose(0, 1) if plan.steps else leaf.unsqueeze(0)

