"""The native backend: whole sequences in C on the CPU, for the cells, norms and windows the kernels know."""

from __future__ import annotations

import torch
from torch import Tensor

from atn_norms.backends.native.library import unavailable
from atn_norms.backends.native.plan import Plan, planned, refusal
from atn_norms.backends.reference import Reference
from atn_norms.cells import Cell, CellWeights
from atn_norms.trees import Leaf, Tree, checked_state, tree_leaves


class Native:
    """Runs the built-in cells with norms that are moments over features, over the built-in windows, in C on the CPU."""

    name = "native"

    def refuses(self, cell: Cell, weights: CellWeights) -> str | None:
        like = weights["weight_hh"]
        if like.device.type != "cpu":
            return f"it runs on the CPU, and the layer is on {like.device.type}"
        if like.dtype not in (torch.float32, torch.float64):
            return f"it runs float32 and float64, and the layer is {like.dtype}"
        return refusal(cell, weights) or unavailable()  # the case first: compiling would not help it

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Tree, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tree]:
        from atn_norms.backends.native.ops import recurrent

        if xs.shape[1] == 0:  # the kernels share the rows out among threads, and there are none
            return Reference().run(cell, weights, xs, state, lengths)
        plan, moments = planned(cell, weights)
        carried, norms = state
        names = list(cell.sites)
        places = [names.index(site.site) for site in plan.sites]
        if lengths is not None:
            xs = torch.where((torch.arange(xs.shape[0]).unsqueeze(1) < lengths).unsqueeze(-1), xs, 0.0)
        memories = _checked_memories([norms[place] for place in places], plan, xs.shape[1])
        flat = [leaf.double() for memory in memories if memory is not None for leaf in tree_leaves(memory[1])]
        affine = [tensor for m in moments for tensor in (m.gain, m.shift) if tensor is not None]
        tensors = [xs, *weights.tensors.values(), *carried, *affine, *flat]
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        h0 = carried[0]
        ys, hn, cn, *after = recurrent(
            xs,
            weights["weight_ih"],
            weights["weight_hh"],
            weights.get("bias_ih"),
            weights.get("bias_hh"),
            h0,
            carried[1] if plan.is_lstm else h0.new_empty(0),
            affine,
            flat,
            lengths,
            plan.encode(),
            keep,
        )
        rest = iter(after)
        happened = torch.full((xs.shape[1],), xs.shape[0]) if lengths is None else lengths
        new = list(norms)
        for place, memory, site in zip(places, memories, plan.sites, strict=True):
            weights, *statistic = (next(rest) for _ in range(1 + site.leaves))
            new[place] = (happened if memory is None else memory[0] + happened, (weights, tuple(statistic)))
        return ys, ((hn, cn) if plan.is_lstm else (hn,), tuple(new))


def _checked_memories(memories: list[Tree], plan: Plan, batch: int) -> list[Tree]:
    """The sites' states, all fresh (None) or all of the very sizes that the kernels will read."""
    if all(memory is None for memory in memories):
        return memories
    checked = []
    for memory, site in zip(memories, plan.sites, strict=True):
        weights, *statistic = (Leaf(shape[1:]) for shape in site.shapes(batch))
        wanted = (Leaf((), floating=False), (weights, tuple(statistic)))
        checked.append(checked_state(memory, wanted, batch, torch.device("cpu")))
    return checked
