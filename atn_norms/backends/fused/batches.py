"""Batch statistics around a call of the kernels: states, which have one row, and populations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.fused.plan import BATCH, DOUBLE, Plan, SitePlan
from atn_norms.cells import CellWeights
from atn_norms.modes import constant
from atn_norms.normalizers import Normalizer, scanning
from atn_norms.pytree import Leaf, Tree, checked_state
from atn_norms.statistics import CountedMoments


class Batch:
    """One sequence with batch statistics: its unmasked steps, and the number of their rows.

    The kernels keep weights, means and variances of a state. This class keeps the number of samples of each statistic.
    """

    def __init__(self, plan: Plan, norms: Sequence[Tree], xs: Tensor, lengths: Tensor | None) -> None:
        steps, batch, _ = xs.shape
        self._plan, self._steps = plan, steps
        time = torch.arange(steps, device=xs.device)
        if lengths is None:
            self._live = torch.full((1,), steps, device=xs.device)
            self._counts = torch.full((steps,), batch, dtype=DOUBLE, device=xs.device)
        else:
            self._live = lengths.max().reshape(1)
            self._counts = (time.unsqueeze(1) < lengths).sum(1).to(DOUBLE)
        self._memories: list[Any] = [
            _checked(site, norms[at], batch, xs.device) if site.coupled else None
            for at, site in zip(plan.indices, plan.sites, strict=True)
        ]
        self._time = time

    def leaves(self, place: int) -> list[Tensor]:
        """Return the leaves of a site's state for the operator."""
        weights, (mean, var, _) = self._memories[place][1]
        return [weights.detach().double(), mean.double(), var.double()]

    def populations(self, weights: CellWeights) -> list[Tensor]:
        """Return the population statistics `[steps, 2 F]` of every site that normalizes with them."""
        found = []
        for place, site in enumerate(self._plan.sites):
            if site.coupled > BATCH:
                normalizer = weights.norms[site.site].normalizer
                step = self._index(place, normalizer)[: site.populations(self._steps)]
                many = step.shape[0]  # `len` would fix the length of an exported program
                nothing = torch.zeros(1, dtype=DOUBLE, device=step.device).expand(many, 1, *site.leaf)
                pooled = CountedMoments(nothing, nothing, nothing[..., :1])
                mean, var, *_ = normalizer.population(pooled, step)
                found.append(torch.cat([leaf.reshape(many, -1).double() for leaf in (mean, var)], 1))
        return found

    def record(self, weights: CellWeights, pooled: Sequence[Tensor]) -> None:
        """Record the pooled statistics `[T, 2 F + 1]` in the normalizers' populations, all or none."""
        remaining = iter(pooled)
        with scanning([weights.norms[site.site].normalizer for site in self._plan.measured]):
            for place, site in enumerate(self._plan.sites):
                if site.coupled == BATCH:
                    mean, var, count = next(remaining).split([site.features, site.features, 1], 1)
                    mean, var = (leaf.reshape(-1, 1, *site.leaf) for leaf in (mean, var))
                    count = count.reshape(-1, 1, *[1] * len(site.leaf)).expand(*mean.shape[:-1], 1)
                    normalizer = weights.norms[site.site].normalizer
                    normalizer.population(CountedMoments(mean, var, count), self._index(place, normalizer))

    def following(self, place: int, leaves: Sequence[Tensor]) -> Tree:
        """Return the state of a site after the sequence, from the operator's leaves."""
        site, memory, weights = self._plan.sites[place], self._memories[place], constant(leaves[0])
        counts = weights.new_zeros((*weights.shape, *site.leaf[:-1], 1)) if memory is None else memory[1][1][2].double()
        if site.steps:
            happened = self._counts.reshape(1, -1, *[1] * len(site.leaf)).expand(1, self._steps, *counts.shape[2:])
            kept = self._live + torch.arange(site.prefix, device=self._live.device)
            counts = torch.cat([counts, happened], 1)[:, kept]
        else:
            total = weights.reshape(1, *[1] * len(site.leaf)).expand(counts.shape)
            counts = torch.where(self._live > 0, total, counts)
        weights, mean, var, counts = without_gradients(site, [*leaves, counts])
        return (0 if memory is None else memory[0]) + self._live, (weights, (mean, var, counts))

    def _index(self, place: int, normalizer: Normalizer) -> Tensor:
        """Return the index of each step since the initial state of the site; -1 if the normalizer does not count it."""
        memory = self._memories[place]
        index = self._time if memory is None else self._time + memory[0]
        return torch.where(normalizer.counted_steps(self._counts), index, -1).unsqueeze(1)


def without_gradients(site: SitePlan, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of a new state, without the gradients that no backend has.

    Weights count samples, the past of a detached window has no gradient, and the leaves of window 1 have no elements.
    """
    if site.detached or not site.prefix:
        return [constant(leaf) for leaf in leaves]
    return [constant(leaves[0]), *leaves[1:]]


def _checked(site: SitePlan, memory: Tree, batch: int, device: torch.device) -> Tree:
    """Return the state of a site, with one row; `ValueError` if it does not fit."""
    if memory is None:
        return None
    weights, *moments = (Leaf(shape[1:]) for shape in site.shapes(1))
    wanted = (Leaf((), floating=False), (weights, (*moments, Leaf((*moments[0].shape[:-1], 1)))))
    return checked_state(memory, wanted, 1, device, shared=True)
