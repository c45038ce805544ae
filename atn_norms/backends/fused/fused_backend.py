"""Programs of kernels: one call of an operator, and the conversion of the cell's state to its leaves and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atn_norms.backends.fused.batches import Batch
from atn_norms.backends.fused.inputs import Inputs
from atn_norms.backends.fused.plan import DOUBLE, HALF, JOINT, NORMED, PLACEMENTS, PROJECTED, Plan, SitePlan, kernel_of
from atn_norms.backends.program import CellInputs, Program, Unsupported
from atn_norms.backends.reference import ReferenceProgram
from atn_norms.cells import Cell
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
    if not description.normed:
        return Unsupported("no norm", "it runs normed cells only", "give the layer a norm")
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
        # Batch statistics of a single row raise an error; without rows the check does not apply.
        if batch == 0 or (batch == 1 and plan.measured):
            return ReferenceProgram(self.cell).run(inputs, state, lengths)
        carried, norms = state
        memories = [norms[place] for place in plan.indices]
        if lengths is not None:
            lengths = lengths.to(xs.device)
            xs = torch.where((torch.arange(steps, device=xs.device).unsqueeze(1) < lengths).unsqueeze(-1), xs, 0.0)
        whole = plan
        watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if all(memory is None for memory in memories) and not plan.coupled and not watched:
            plan = shortened(plan, steps)
        affine = [tensor for each in declared for tensor in (each.gain, each.shift) if tensor is not None]
        h0, c0 = carried if plan.is_lstm else (carried[0], carried[0].new_empty(0))
        tensors = weights.tensors
        single = [xs, *[tensors.get(name) for name in PARAMETERS], h0, c0, tensors.get("weight_hr")]
        dtype = tensors["weight_hh"].dtype
        if dtype in HALF:  # computed in float32, and rounded once at the end
            single = [None if tensor is None else tensor.float() for tensor in single]
            affine = [tensor.float() for tensor in affine]
        rows = Batch(plan, norms, steps, batch, lengths) if plan.coupled else None
        populations = [] if rows is None else rows.populations(weights)
        leaves = (
            _opened(memories, plan, batch, xs.device) if rows is None else _checked_leaves(memories, plan, xs, rows)
        )
        operators = self._operators
        if operators is None:
            operators = self._operators = self._load()
        results = None
        if leaves is not None:
            results = operators.eager(plan, Inputs._make([*single, affine, populations, leaves, lengths]))
        if results is None:
            leaves = _checked_leaves(memories, plan, xs, rows)
            needs_gradients = torch.is_grad_enabled() and any(
                tensor is not None and tensor.requires_grad for tensor in (*single, *affine, *leaves)
            )
            keep = needs_gradients or torch.jit.is_tracing()  # torch.jit checks a trace without gradients
            results = operators(plan, Inputs._make([*single, affine, populations, leaves, lengths]), keep)
        ys, hn, cn, *after = [*(result.to(dtype) for result in results[:3]), *results[3:]]
        carried = (hn, cn) if plan.is_lstm else (hn,)
        if not keep_state and rows is None:
            return ys, (carried, tuple([() for _ in norms]))
        happened = torch.full((batch,), steps, device=xs.device) if lengths is None else lengths
        following, known, start = list(norms), [], 0
        for place, (memory, site) in enumerate(zip(memories, whole.sites, strict=True)):
            end = start + site.tensors
            if rows is not None and site.coupled:
                following[plan.indices[place]] = rows.following(place, after[start:end])
                start = end
                continue
            index = None if memory is None else memory[0]
            counted = next((after for before, after in known if before is index), None)
            if counted is None:  # all sites count the same steps, usually in one shared tensor
                counted = happened if index is None else index + happened
                known.append((index, counted))
            tensors = [_lengthened(site, tensor) for tensor in after[start:end]]
            following[plan.indices[place]] = (counted, _rebuilt(site, tensors))
            start = end
        if rows is not None:
            rows.record(weights, after[start:])
        return ys, (carried, tuple(following))


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


def _split_leaves(site: SitePlan) -> list[tuple[int, ...]]:
    """Return the shapes of the statistic's leaves if the kernels concatenate them in one leaf; empty otherwise."""
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
        sizes = [math.prod(shape) // site.parts for shape in shapes]
        pieces = zip(leaves[0].split(sizes, -1), shapes, strict=True)
        leaves = [piece.reshape(*weights.shape, *shape) for piece, shape in pieces]
    return weights.detach(), tuple(leaves)  # weights count samples and have no gradient in any backend


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
    """Return the leaves of the sites' states, none if all are fresh; None if a state has another structure."""
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


def _checked_leaves(memories: list[Tree], plan: Plan, xs: Tensor, rows: Batch | None) -> list[Tensor]:
    """Return the leaves of the sites' states in float64, none if all are fresh; a state that does not fit raises."""
    leaves: list[Tensor] = []
    if all(memory is None for memory in memories):
        return leaves
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
            split = [Leaf((*weights.shape, *shape)) for shape in _split_leaves(site)]
            layout = (weights, tuple(split or statistic))
        checked_state(memory, (Leaf((), floating=False), layout), xs.shape[1], xs.device)
        leaves += [leaf.double() for leaf in _joined(site, memory[1])]
    return leaves
