"""The native backend: whole sequences in C on the CPU, for the cells, norms and windows the kernels know."""

from __future__ import annotations

import torch
from torch import Tensor

from atn_norms.backends.native.library import unavailable
from atn_norms.backends.native.plan import planned, refusal
from atn_norms.cells import Cell, CellWeights
from atn_norms.trees import Tree, tree_leaves


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

        plan, moments = planned(cell, weights)
        carried, norms = state
        names = list(cell.sites)
        places = [names.index(site.site) for site in plan.sites]
        if lengths is not None:
            xs = torch.where((torch.arange(xs.shape[0]).unsqueeze(1) < lengths).unsqueeze(-1), xs, 0.0)
        memories = [norms[place] for place in places]
        flat = [] if None in memories else [leaf for memory in memories for leaf in tree_leaves(memory[1])]
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
