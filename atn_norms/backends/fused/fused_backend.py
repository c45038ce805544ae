"""One call of a backend's operator: the cell's state into leaves, and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.fused.batches import Batch
from atn_norms.backends.fused.plan import HALF, PLACES, Plan, SitePlan, planned
from atn_norms.backends.reference import Reference
from atn_norms.cells import Cell, CellWeights
from atn_norms.pytree import Leaf, Tree, checked_state


class Fused(ABC):
    """A backend that runs the cells, norms and windows of a `Plan`, a whole sequence at a time."""

    name: str

    def attempt(self, plan: Plan, *arguments: Any) -> list[Tensor] | None:
        """The operator's results without its operator; None where that must be called."""
        return None

    @abstractmethod
    def operate(self, *arguments: Any) -> list[Tensor]:
        """Call the operator."""

    def run(
        self,
        cell: Cell,
        weights: CellWeights,
        xs: Tensor,
        state: Tree,
        lengths: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, Tree]:
        steps, batch, _ = xs.shape
        planned_for, found = weights.plans.pop(self.name, (None, ""))
        found = found if planned_for is cell else planned(cell, weights)
        assert not isinstance(found, str), found  # refused otherwise
        plan, moments = found
        # Without rows there is nothing to share out, and one is refused where a batch is measured.
        if batch == 0 or (batch == 1 and plan.measured):
            return Reference().run(cell, weights, xs, state, lengths)
        carried, norms = state
        memories = [norms[PLACES[site.site]] for site in plan.sites]
        if lengths is not None:
            lengths = lengths.to(xs.device)
            xs = torch.where((torch.arange(steps, device=xs.device).unsqueeze(1) < lengths).unsqueeze(-1), xs, 0.0)
        whole = plan
        watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if all(memory is None for memory in memories) and not plan.coupled and not watched:
            plan = shortened(plan, steps)
        affine = [tensor for m in moments for tensor in (m.gain, m.shift) if tensor is not None]
        h0, c0 = carried if plan.is_lstm else (carried[0], carried[0].new_empty(0))
        parameters = [weights.get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        single: list[Tensor | None] = [xs, *parameters, h0, c0]
        dtype = weights["weight_hh"].dtype
        if dtype in HALF:  # computed in float32, and rounded once at the end
            single = [None if tensor is None else tensor.float() for tensor in single]
            affine = [tensor.float() for tensor in affine]
            xs = xs.float()
            single[0] = xs
        rows = Batch(plan, norms, steps, batch, lengths) if plan.coupled else None
        populations = [] if rows is None else rows.populations(weights)
        leaves = _opened(memories, plan, batch, xs.device) if rows is None else rows.leaves()
        results = None if leaves is None else self.attempt(plan, *single, affine, populations, leaves, lengths)
        if results is None:
            leaves = _checked_leaves(memories, plan, batch, xs.device) if rows is None else rows.leaves()
            needs_gradients = torch.is_grad_enabled() and any(
                tensor is not None and tensor.requires_grad for tensor in (*single, *affine, *leaves)
            )
            keep = needs_gradients or torch.jit.is_tracing()  # a trace is checked without gradients
            results = self.operate(*single, affine, populations, leaves, lengths, plan.encode(), keep)
        ys, hn, cn, *after = [*(result.to(dtype) for result in results[:3]), *results[3:]]
        carried = (hn, cn) if plan.is_lstm else (hn,)
        if not keep_state and rows is None:
            return ys, (carried, tuple(() for _ in norms))
        happened = torch.full((batch,), steps, device=xs.device) if lengths is None else lengths
        following, known, start = list(norms), [], 0
        for place, (memory, site) in enumerate(zip(memories, whole.sites, strict=True)):
            end = start + site.tensors
            if rows is not None:
                following[PLACES[site.site]] = rows.following(place, after[start:end])
                start = end
                continue
            index = None if memory is None else memory[0]
            counted = next((after for before, after in known if before is index), None)
            if counted is None:  # all sites count the same steps, mostly in one tensor
                counted = happened if index is None else index + happened
                known.append((index, counted))
            tensors = [_lengthened(site, tensor) for tensor in after[start:end]]
            following[PLACES[site.site]] = (counted, _rebuilt(site, tensors))
            start = end
        if rows is not None:
            rows.record(weights, after[start:])
        return ys, (carried, tuple(following))


@lru_cache(maxsize=256)
def shortened(plan: Plan, steps: int) -> Plan:
    """Return a plan whose windows are no longer than a whole sequence of so many steps with a fresh state needs."""
    if all(site.steps <= steps + 1 for site in plan.sites):
        return plan
    return Plan(plan.cell, tuple(replace(site, steps=min(site.steps, steps + 1)) for site in plan.sites))


def _lengthened(site: SitePlan, tensor: Tensor) -> Tensor:
    """Return a state tensor of a sliding window with empty steps before those that a shortened plan has."""
    if not site.steps or tensor.shape[1] == site.prefix:
        return tensor
    empty = tensor.new_zeros((tensor.shape[0], site.prefix - tensor.shape[1], *tensor.shape[2:]))
    return torch.cat([empty, tensor], 1)


def _split_leaves(site: SitePlan) -> list[tuple[int, ...]]:
    """Return the shapes of the statistic's leaves where they are several that the kernels have as one; else nothing."""
    traced = site.traced
    if traced is None or traced.centred or len(traced.leaves) < 2:
        return []
    return [(site.parts, *leaf) if site.parts > 1 else leaf for leaf in traced.leaves]


def _rebuilt(site: SitePlan, tensors: list[Tensor]) -> Tree:
    """Return a window's state from the operator's tensors of it."""
    if not tensors:
        return ()
    weights, *leaves = tensors
    shapes = _split_leaves(site)
    if shapes:
        parts = leaves[0].unflatten(-1, (-1,)) if site.parts == 1 else leaves[0]
        sizes = [math.prod(shape) // site.parts for shape in shapes]
        pieces = zip(parts.split(sizes, -1), shapes, strict=True)
        leaves = [piece.reshape(*weights.shape, *shape) for piece, shape in pieces]
    return weights.detach(), tuple(leaves)  # they count samples: no backend has a gradient for them


def _joined(site: SitePlan, memory: Tree) -> list[Tensor]:
    """Return a window's state as the operator's tensors of it."""
    if not site.leaves:
        return []
    weights, leaves = memory
    shapes = _split_leaves(site)
    if shapes:
        rows = (*weights.shape, site.parts) if site.parts > 1 else weights.shape
        pairs = zip(leaves, shapes, strict=True)
        leaves = (torch.cat([leaf.reshape(*rows, math.prod(shape) // site.parts) for leaf, shape in pairs], -1),)
    return [weights.detach(), *leaves]


def _opened(memories: list[Tree], plan: Plan, batch: int, device: torch.device) -> list[Tensor] | None:
    """The leaves of the sites' states, none where all are fresh; None where one is not what a site returns."""
    leaves: list[Tensor] = []
    if all(memory is None for memory in memories):
        return leaves
    for memory, site in zip(memories, plan.sites, strict=True):
        if _split_leaves(site) or not (isinstance(memory, tuple) and len(memory) == 2 and isinstance(memory[1], tuple)):
            return None
        index, window = memory
        if not isinstance(index, Tensor):
            return None
        if index.dtype != torch.int64 or index.shape != (batch,) or index.device != device:
            return None
        if len(window) != (2 if site.leaves else 0) or (site.leaves and not isinstance(window[1], tuple)):
            return None
        if site.leaves:
            weights, statistic = window
            if False in [isinstance(leaf, Tensor) for leaf in (weights, *statistic)]:
                return None
            leaves += (weights.detach(), *statistic)
    return leaves


def _checked_leaves(memories: list[Tree], plan: Plan, batch: int, device: torch.device) -> list[Tensor]:
    """The same in float64; `ValueError` where a state does not fit."""
    leaves: list[Tensor] = []
    if all(memory is None for memory in memories):
        return leaves
    for memory, site in zip(memories, plan.sites, strict=True):
        layout: Tree = ()
        if site.leaves:
            weights, *statistic = (Leaf(shape[1:]) for shape in site.shapes(batch))
            split = [Leaf((*weights.shape, *shape)) for shape in _split_leaves(site)]
            layout = (weights, tuple(split or statistic))
        checked_state(memory, (Leaf((), floating=False), layout), batch, device)
        leaves += [leaf.double() for leaf in _joined(site, memory[1])]
    return leaves
