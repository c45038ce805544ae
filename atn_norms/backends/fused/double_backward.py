"""A differentiable backward pass: run the reference on the same tensors, and differentiate it with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import log2
from typing import Any

import torch
from torch import Tensor

from atn_norms.assorted_time import SiteNorm
from atn_norms.backends.fused.inputs import SINGLE, Inputs
from atn_norms.backends.fused.plan import BATCH, Plan, SitePlan
from atn_norms.backends.fused.plugin_windows import Past, Weighted
from atn_norms.backends.program import CellInputs
from atn_norms.backends.reference import ReferenceProgram
from atn_norms.backends.traced.normalizer import TracedNorm
from atn_norms.backends.traced.program import Program
from atn_norms.cells import Cell, CellWeights, GRUEquations, LSTMEquations, Placement, RNNEquations
from atn_norms.normalizers import Normalizer
from atn_norms.pytree import tree_leaves
from atn_norms.statistics import Average, Moments, NoStatistic, promoted
from atn_norms.windows import Cumulative, Detached, Exponential, Sliding, Window


def differentiable_backward(plan: Plan, gradients: tuple[Any, ...], inputs: Inputs) -> Inputs:
    """Return the gradients of the operator `recurrent`, with a graph for further derivatives.

    `gradients` are those of ys, hn, cn, and of every leaf of the final states (a list); None where absent.
    """
    create_graph = torch.is_grad_enabled()
    with torch.autocast(inputs.xs.device.type, enabled=False), torch.enable_grad():
        # A weight may itself depend on xs; views of the arguments make every gradient a partial one.
        flat = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs.flatten()]
        results = _run(plan, Inputs.unflatten(flat, inputs.counts))
        dys, dhn, dcn, dstates = gradients
        grad_outputs = [
            (result, gradient)
            for result, gradient in zip(results, (dys, dhn, dcn, *dstates), strict=True)
            if gradient is not None and result.requires_grad
        ]
        wanted = [tensor for tensor in flat if tensor is not None and tensor.requires_grad]
        if not grad_outputs or not wanted:
            found: Sequence[Tensor | None] = [None] * len(wanted)
        else:
            found = torch.autograd.grad(
                [result for result, _ in grad_outputs],
                wanted,
                [gradient for _, gradient in grad_outputs],
                create_graph=create_graph,
                allow_unused=True,
            )
    rest = iter(found)
    every = [next(rest) if tensor is not None and tensor.requires_grad else None for tensor in flat]
    return Inputs.unflatten(every, inputs.counts)


def vector_jacobian(plan: Plan, inputs: Inputs, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the results of the backward operator, also inside transforms of torch.func.

    `gradients` are those of ys, hn, cn, and of every leaf of the final states; None where absent.
    """
    flat, counts, places = inputs.flatten(), inputs.counts, inputs.places

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        tensors = list(flat)
        for place, tensor in zip(places, given, strict=True):
            tensors[place] = tensor
        full = Inputs.unflatten(tensors, counts)
        return tuple(_run(plan, full._replace(states=_constant_weights(plan, list(full.states)))))

    with torch.autocast(inputs.xs.device.type, enabled=False):
        pair: Any = torch.func.vjp(results, *(flat[place] for place in places))
        values, pull = pair
        pairs = zip(values, gradients, strict=True)
        found = pull(tuple(torch.zeros_like(value) if grad is None else grad for value, grad in pairs))
    by_place = dict(zip(places, found, strict=True))
    none = inputs.xs.new_zeros(0)  # where there is no bias
    single = [by_place.pop(place, none) for place in range(len(SINGLE) - 1)]
    return [*single, *by_place.values()]


def _constant_weights(plan: Plan, states: list[Tensor]) -> list[Tensor]:
    """Return the leaves of the states; their weights count samples and have no gradient."""
    if states:
        first = 0
        for site in plan.sites:
            if site.tensors:
                states[first] = states[first].detach()
                first += site.tensors
    return states


class _Moments(Normalizer):
    """The norm of a `SitePlan` in PyTorch; every leaf has one element for each group."""

    def __init__(self, plan: SitePlan, gain: Tensor | None, shift: Tensor | None, population: Tensor | None) -> None:
        super().__init__()
        self._plan, self._gain, self._shift, self._population = plan, gain, shift, population
        self.uses_batch_statistics = plan.coupled != 0

    def measure(self, x: Tensor) -> Any:
        if self._plan.coupled:
            rows = promoted(x)
            return Moments(rows, torch.zeros_like(rows))
        groups = x.unflatten(-1, (self._plan.groups, -1))
        statistic = Moments.of(groups) if self._plan.centred else Average.of(promoted(groups).square())
        return type(statistic)(*(leaf.squeeze(-1) for leaf in statistic))

    def population(self, pooled: Any, step: Tensor) -> Any:
        if self._population is None:
            return pooled
        last = len(self._population) - 1
        return Moments(*self._population[step.clamp(0, last)].chunk(2, -1))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        if self._plan.coupled:
            return self._scaled((x - pooled.mean) * self._factor(pooled.var))
        *mean, factor = (leaf.unsqueeze(-1) for leaf in (*pooled[:-1], self._factor(pooled[-1])))
        groups = x.unflatten(-1, (self._plan.groups, -1))
        return self._scaled(((groups - mean[0] if mean else groups) * factor).flatten(-2))

    def _factor(self, spread: Tensor) -> Tensor:
        eps = self._plan.eps
        if len(eps) == 1:
            return torch.rsqrt(spread + eps[0])
        return torch.rsqrt(spread + spread.new_tensor(eps).repeat_interleave(self._plan.width // len(eps)))

    def _scaled(self, y: Tensor) -> Tensor:
        y = y if self._gain is None else y * self._gain
        return y if self._shift is None else y + self._shift


class _Programs(Normalizer):
    """A `TracedNorm` in PyTorch; the weighted means of all parts are concatenated in one leaf."""

    def __init__(self, plan: SitePlan, traced: TracedNorm, parameters: Tensor | None) -> None:
        super().__init__()
        self._plan, self._traced, self._flat = plan, traced, parameters
        self.stateless = not traced.leaves

    def measure(self, x: Tensor) -> Any:
        if not self._traced.leaves:
            return NoStatistic()
        leaves = self._run(self._traced.measure, promoted(x), ())
        return Moments(*leaves) if self._traced.centred else Average(*leaves)

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return self._run(self._traced.normalize, promoted(x), tuple(pooled))[0].to(x.dtype)

    def _run(self, program: Program, x: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        """Run a program on rows `[..., F]` with leaves `[..., groups]`, part by part."""
        parts, rows = self._plan.parts, x.shape[:-1]
        own = x.new_zeros(parts, 0) if self._flat is None else promoted(self._flat).reshape(parts, -1)
        values = [leaf.expand(*rows, -1).reshape(-1, parts, self._traced.width) for leaf in leaves]
        found = []
        for part, features in enumerate(x.reshape(-1, parts, self._traced.features).unbind(1)):
            parameters = own[part].expand(len(features), -1)
            found.append(program.evaluate([features, *(value[:, part] for value in values), parameters]))
        return [torch.cat(pieces, -1).reshape(*rows, -1) for pieces in zip(*found, strict=True)]


@dataclass(frozen=True)
class _Site:
    """One norm site of the reference, and the conversion of its state from and to the operator's leaves."""

    plan: SitePlan
    norm: SiteNorm
    given: list[Tensor]

    def state(self) -> Any:
        """Return the reference's state: an unused index, weights and statistic; None for a fresh window."""
        if not self.given:
            return None
        weights, *leaves = self.given
        lanes = (*weights.shape, self.plan.features if self.plan.coupled else self.plan.groups)
        return weights.new_zeros(weights.shape[0], dtype=torch.int64), (
            weights,
            tuple(x.reshape(lanes) for x in leaves),
        )

    def leaves(self, state: Any) -> list[Tensor]:
        """Return the leaves of the reference's state, in the shapes of the operator."""
        index, memory = state
        shapes = self.plan.shapes(index.shape[0])
        return [leaf.reshape(shape) for leaf, shape in zip(tree_leaves(memory), shapes, strict=True)]


def _run(plan: Plan, inputs: Inputs) -> list[Tensor]:
    """Compute those results of the operator that have a gradient, with the reference."""
    cell = _cell(plan, inputs)
    factors, given, stand_ins = iter(inputs.affine), iter(inputs.states), iter(inputs.populations)
    sites = {}
    for site in plan.sites:
        gain, shift = (next(factors) if there else None for there in (site.gain, site.shift))
        population = next(stand_ins) if site.coupled not in (0, BATCH) else None
        moments = _Moments(site, gain, shift, population) if site.traced is None else _Programs(site, site.traced, gain)
        norm = SiteNorm(moments, _window(site))
        sites[site.site] = _Site(site, norm, list(islice(given, site.tensors)))
    tensors: Any = {
        name: getattr(inputs, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    }
    weights = CellWeights(tensors, {name: site.norm for name, site in sites.items()})
    norms = tuple(sites[name].state() if name in sites else () for name in cell.sites)
    carried = (inputs.h0, inputs.c0) if plan.is_lstm else (inputs.h0,)
    ys, (after, norms) = ReferenceProgram(cell).run(CellInputs(inputs.xs, weights), (carried, norms), inputs.lengths)
    of_site = dict(zip(cell.sites, norms, strict=True))
    leaves = [leaf for name, site in sites.items() for leaf in site.leaves(of_site[name])]
    return [ys, after[0], after[1] if plan.is_lstm else inputs.c0, *leaves]


def _cell(plan: Plan, inputs: Inputs) -> Cell:
    hidden = inputs.hidden
    joint: Any = "joint" if plan.joint else "separate"
    placement = Placement(sum=joint, carry="normed" if plan.normed_carry else "raw")
    if plan.is_lstm:
        return LSTMEquations(hidden, placement, 0 if inputs.weight_hr is None else inputs.weight_hr.shape[0])
    if plan.kind == "gru":
        return GRUEquations(hidden, placement)
    return RNNEquations(hidden, placement, "relu" if plan.kind == "rnn_relu" else "tanh")


ONE_STEP = 5e-4  # a half-life at which the weight of the step before is 0


def _window(plan: SitePlan) -> Window[Any]:
    window: Window[Any]
    if plan.steps:
        window = Weighted(plan.taps) if plan.taps else Sliding(plan.steps)
    elif plan.past:
        window = Past(plan.decay)
    elif plan.decay == 1.0:
        window = Cumulative()
    else:
        window = Exponential(-1.0 / log2(plan.decay) if plan.decay else ONE_STEP)
    return Detached(window) if plan.detached else window
