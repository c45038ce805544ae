"""The Triton backend: whole sequences on a GPU, for the cells, norms and windows the kernels know. Experimental."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.fused.fused_backend import Fused
from atn_norms.backends.fused.operators import transformed
from atn_norms.backends.fused.plan import planned
from atn_norms.backends.triton.available import interpreted, unavailable
from atn_norms.cells import Cell, CellWeights


class Triton(Fused):
    """Runs the built-in cells with layer and RMS norms, over the built-in windows, on a GPU."""

    name = "triton"

    def unsupported_reason(self, cell: Cell, weights: CellWeights) -> str | None:
        like = weights["weight_hh"]
        if like.device.type != "cuda" and not (like.device.type == "cpu" and interpreted()):
            return f"it runs on a GPU, and the layer is on {like.device.type}"
        if like.dtype not in (torch.float32, torch.float64):
            return f"it runs float32 and float64, and the layer is {like.dtype}"
        if (reason := transformed()) is not None:
            return reason
        found = planned(cell, weights)
        if isinstance(found, str):
            return found
        plan, _ = found
        if plan.coupled:
            return "it has no kernel for norms over the rows of a batch"
        traced = [site.site for site in plan.sites if site.traced is not None]
        if traced:
            return f"it has no kernel for traced normalizers, and there is one at {', '.join(traced)}"
        grouped = [site for site in plan.sites if site.groups > 1]
        if grouped:
            return f"it has no kernel for a norm of groups, and the one at {grouped[0].site} has {grouped[0].groups}"
        detached = [site.site for site in plan.sites if site.detached]
        if detached:
            return f"it has no kernel for detached windows, and there is one at {', '.join(detached)}"
        weights.plans[self.name] = cell, found
        return unavailable()

    def operate(self, *arguments: Any) -> list[Tensor]:
        from atn_norms.backends.triton.call import OPERATORS  # not before it is needed: it imports Triton

        return OPERATORS(*arguments)
