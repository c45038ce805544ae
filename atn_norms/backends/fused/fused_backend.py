"""Programs of kernels: one call of an operator, and the conversion of the cell's state to its leaves and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atn_norms.backends.fused.batches import Batch, without_gradients
from atn_norms.backends.fused.inputs import Inputs
from atn_norms.backends.fused.plan import DOUBLE, HALF, JOINT, NORMED, PLACEMENTS, PROJECTED, Plan, SitePlan, kernel_of
from atn_norms.backends.program import CellInputs, Program, Unsupported
from atn_norms.backends.reference import ReferenceProgram
from atn_norms.cells import Cell
from atn_norms.modes import constant
from atn_norms.pytree import Leaf, Tree, checked_state

if TYPE_CHECKING:
    from atn_norms.backends.description import Description
    from atn_norms.backends.fused.operators import Operators


class Fused(ABC):
    """A backend that runs a `Plan`, a whole sequence in one call."""

    name: str

    def prepare(self, cell: Cell, description: Description) -> Program | Unsupported:
        """Return a program, or the first reason why there is none; missing kernels are the last reason."""
        unsupported = self.unsupported_type(description)
        if unsupported is None and description.transform is not None:
            unsupported = Unsupported("transform", description.transform, "call the layer outside the transform")
        plan = unsupported or plan_of(cell, description)
        if isinstance(plan, Unsupported):
            return plan
        unsupported = self.unsupported_plan(plan) or self.missing()
        return unsupported or FusedProgram(self.name, cell, plan, self.operators)

    @abstractmethod
    def unsupported_type(self, description: Description) -> Unsupported | None:
        """Return the reason why the backend does not run the device or the type of a layer, or None."""

    def unsupported_plan(self, plan: Plan) -> Unsupported | None:
        """Return the reason why the backend has no kernel for a plan, or None."""
        return None

    @abstractmethod
    def missing(self) -> Unsupported | None:
        """Return the reason why the kernels cannot run on this machine, or None."""

    @staticmethod
    @abstractmethod
    def operators() -> Operators:
        """Return the operators; the first call registers them, which takes a moment."""


def plan_of(cell: Cell, description: Description) -> Plan | Unsupported:
    """Return the plan of a cell, or the reason why there is none."""
    kernel = kernel_of(cell)
    if kernel is None:
        return Unsupported("cell", f"it has no kernel for {type(cell).__name__}", "use LSTM, GRU or RNN")
    projected = bool(getattr(cell, "proj_size", 0))
    placement = f"-{JOINT}" * (cell.placement.sum == "joint") + f"-{NORMED}" * (cell.placement.carry == "normed")
    placement += f"-{PROJECTED}" * projected
    if placement not in PLACEMENTS[kernel]:
        return Unsupported(
            "placement",
            f"it has no kernel for {type(cell).__name__} with {cell.placement!r}",
            "use the default placement",
        )
    sites: list[SitePlan] = []
    for site in description.sites:
        if isinstance(site, Unsupported):
            return site
        sites.append(site)
    if projected or not all(site.coupled for site in sites):
        sites = [site._replace(groups=1) if site.coupled else site for site in sites]
    # A compiler would guard the cache, and compile again for every new entry.
    return (Plan if torch.compiler.is_compiling() else _remembered_plan)(kernel + placement, tuple(sites))


_remembered_plan = lru_cache(maxsize=256)(Plan)


class FusedProgram(Program):
    """A plan with the operators that run it."""

    def __init__(self, name: str, cell: Cell, plan: Plan, operators: Callable[[], Operators]) -> None:
        super().__init__(cell)
        self.name, self.plan, self._load = name, plan, operators
        self._operators: Operators | None = None

    def run(self, inputs: CellInputs, state: Tree, lengths: Tensor | None = None) -> tuple[Tensor, Tree]:
        xs, weights, declared, keep_state = inputs
        plan, (steps, batch, _) = self.plan, xs.shape
        tensors = weights.tensors
        dtype = tensors["weight_hh"].dtype
        half = dtype in HALF  # computed in float32, and rounded once at the end
        several = half and any(each is not None and each.dtype != dtype for each in (xs, *tensors.values()))
        # Batch statistics of a single row raise an error, and so do several types; without rows no check applies.
        if batch == 0 or (batch == 1 and plan.measured) or several:
            return ReferenceProgram(self.cell).run(inputs, state, lengths)
        carried, norms = state
        memories = [norms[place] for place in plan.indices]
        fresh = not [memory for memory in memories if memory is not None]
        if lengths is not None:
            lengths = lengths.to(xs.device)
            xs = torch.where((torch.arange(steps, device=xs.device).unsqueeze(1) < lengths).unsqueeze(-1), xs, 0.0)
        if fresh and not plan.coupled and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            plan = shortened(plan, steps)
        affine = [tensor for each in declared for tensor in (each.gain, each.shift) if tensor is not None]
        h0, c0 = carried if plan.is_lstm else (carried[0], carried[0].new_empty(0))
        weight_ih, weight_hh, bias_ih, bias_hh = [tensors.get(name) for name in PARAMETERS]
        single = [xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, tensors.get("weight_hr")]
        if half:
            single = [None if tensor is None else tensor.float() for tensor in single]
            affine = [tensor.float() for tensor in affine]
        rows = Batch(plan, norms, xs, lengths) if plan.coupled else None
        populations = [] if rows is None else rows.populations(weights)
        leaves = (
            []
            if fresh
            else _opened(memories, plan, batch, xs.device)
            if rows is None
            else _checked_leaves(memories, plan, xs, rows)
        )
        operators = self._operators
        if operators is None:
            operators = self._operators = self._load()
        results, states = None, keep_state or plan.coupled
        if leaves is not None:
            results = operators.eager(plan, Inputs(*single, affine, populations, leaves, lengths), states)  # type: ignore[arg-type]
        if results is None:
            leaves = [] if fresh else _checked_leaves(memories, plan, xs, rows)
            flat = [*single, *affine, *leaves]
            needs_gradients = torch.is_grad_enabled() and any(
                tensor is not None and tensor.requires_grad for tensor in flat
            )
            keep = needs_gradients or torch.jit.is_tracing()  # torch.jit checks a trace without gradients
            results = operators(plan, Inputs(*single, affine, populations, leaves, lengths), keep)  # type: ignore[arg-type]
        ys, hn, cn = [result.to(dtype) for result in results[:3]] if half else results[:3]
        carried, after = (hn, cn) if plan.is_lstm else (hn,), results[3:]
        if rows is not None:
            rows.record(weights, after[plan.tensors :])
        if not keep_state:
            return ys, (carried, tuple([() for _ in norms]))
        following = self._following(plan, norms, after, steps if lengths is None else lengths, ys, rows)
        return ys, (carried, tuple(following))

    def _following(
        self,
        plan: Plan,
        norms: tuple[Tree, ...],
        after: list[Tensor],
        happened: int | Tensor,
        like: Tensor,
        rows: Batch | None,
    ) -> list[Tree]:
        """Return the states of the norms after the steps that happened, from the results of the operator."""
        if plan is not self.plan:  # its windows are shortened, and all states were fresh
            for site, (start, end) in zip(self.plan.sites, plan.slices, strict=True):
                after[start:end] = [_lengthened(site, tensor) for tensor in after[start:end]]
        following, known, counted = list(norms), None, None
        for place, (site, index, (start, end)) in enumerate(zip(plan.sites, plan.indices, plan.slices, strict=True)):
            if rows is not None and site.coupled:
                following[index] = rows.following(place, after[start:end])
                continue
            before = None if norms[index] is None else norms[index][0]
            if counted is None or before is not known:  # usually all sites share a count
                known = before
                fresh = like.new_zeros(like.shape[1], dtype=torch.int64) if before is None else before
                counted = fresh + happened
            if start == end:
                following[index] = (counted, ())
                continue
            weights, *leaves = without_gradients(site, after[start:end])
            if site.traced is not None and site.split:
                leaves = _divided(site, weights, leaves[0])
            following[index] = (counted, (weights, tuple(leaves)))
        return following


PARAMETERS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"  # of `Inputs`, by their names in `CellWeights`


@lru_cache(maxsize=256)
def shortened(plan: Plan, steps: int) -> Plan:
    """Return a plan whose windows are at most `steps` long, which gives equal results from a fresh state."""
    if all(site.steps <= steps + 1 for site in plan.sites):
        return plan
    return Plan(plan.cell, tuple([_shortened(site, steps + 1) for site in plan.sites]))


def _shortened(site: SitePlan, most: int) -> SitePlan:
    return site._replace(steps=most, taps=site.taps[:most]) if site.steps > most else site


def _lengthened(site: SitePlan, tensor: Tensor) -> Tensor:
    """Return a state tensor of a sliding window of a shortened plan, with empty steps added before its own."""
    if not site.steps or tensor.shape[1] == site.prefix:
        return tensor
    empty = tensor.new_zeros((tensor.shape[0], site.prefix - tensor.shape[1], *tensor.shape[2:]))
    return torch.cat([empty, tensor], 1)


def _divided(site: SitePlan, weights: Tensor, whole: Tensor) -> list[Tensor]:
    """Return the leaves of a statistic from their concatenation."""
    shapes = site.split
    sizes = [math.prod(shape) // site.parts for shape in shapes]
    pieces = zip(whole.split(sizes, -1), shapes, strict=True)
    return [piece.reshape(*weights.shape, *shape) for piece, shape in pieces]


def _joined(site: SitePlan, memory: Tree) -> list[Tensor]:
    """Return a window's state as the operator's tensors of it."""
    if not site.leaves:
        return []
    weights, leaves = memory
    shapes = site.split
    if shapes:
        rows = (*weights.shape, site.parts) if site.parts > 1 else weights.shape
        pairs = zip(leaves, shapes, strict=True)
        leaves = (torch.cat([leaf.reshape(*rows, math.prod(shape) // site.parts) for leaf, shape in pairs], -1),)
    return [weights.detach(), *leaves]


def _opened(memories: list[Tree], plan: Plan, batch: int, device: torch.device) -> list[Tensor] | None:
    """Return the leaves of the sites' states, unchecked; None if a state has another structure."""
    leaves: list[Tensor] = []
    known = None
    for memory, site, (start, end) in zip(memories, plan.sites, plan.slices, strict=True):
        if not (isinstance(memory, tuple) and len(memory) == 2) or (site.traced is not None and site.split):
            return None
        index, window = memory
        if index is not known:  # usually all sites share a count
            if not isinstance(index, Tensor) or index.dtype != torch.int64:
                return None
            if index.shape != (batch,) or index.device != device:
                return None
            known = index
        if not isinstance(window, tuple) or len(window) != (0 if start == end else 2):
            return None
        if window:
            weights, statistic = window
            if not (isinstance(weights, Tensor) and isinstance(statistic, tuple)):
                return None
            leaves += (constant(weights), *statistic)
    return leaves


def _checked_leaves(memories: list[Tree], plan: Plan, xs: Tensor, rows: Batch | None) -> list[Tensor]:
    """Return the leaves of the sites' states in float64, none if all are fresh; a state that does not fit raises."""
    leaves: list[Tensor] = []
    for place, (memory, site) in enumerate(zip(memories, plan.sites, strict=True)):
        if memory is None:
            leaves += [torch.zeros(shape, dtype=DOUBLE, device=xs.device) for shape in site.shapes(xs.shape[1])]
            continue
        if rows is not None and site.coupled:
            leaves += rows.leaves(place)
            continue
        layout: Tree = ()
        if site.leaves:
            weights, *statistic = (Leaf(shape[1:]) for shape in site.shapes(xs.shape[1]))
            split = [Leaf((*weights.shape, *shape)) for shape in site.split]
            layout = (weights, tuple(split or statistic))
        checked_state(memory, (Leaf((), floating=False), layout), xs.shape[1], xs.device)
        leaves += [leaf.double() for leaf in _joined(site, memory[1])]
    return leaves
