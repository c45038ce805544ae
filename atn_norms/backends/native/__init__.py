"""The native backend: whole sequences in C on the CPU, for the cells, norms and windows the kernels know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.fused.fused_backend import Fused
from atn_norms.backends.fused.operators import transformed
from atn_norms.backends.fused.plan import HALF, Plan, planned
from atn_norms.backends.native.library import unavailable
from atn_norms.cells import Cell, CellWeights


class Native(Fused):
    """Runs the built-in cells with norms that are moments over features, over the built-in windows, in C on the CPU."""

    name = "native"

    def unsupported_reason(self, cell: Cell, weights: CellWeights) -> str | None:
        like = weights["weight_hh"]
        if like.device.type != "cpu":
            return f"it runs on the CPU, and the layer is on {like.device.type}"
        if like.dtype not in (torch.float32, torch.float64, *HALF):
            return f"it runs float64, float32, bfloat16 and float16, and the layer is {like.dtype}"
        if (reason := transformed()) is not None:
            return reason
        found = planned(cell, weights)
        if isinstance(found, str):  # the case first: compiling would not help it
            return found
        if found[0].coupled and like.dtype in HALF:
            return f"it runs norms over the batch in float32 and float64, and the layer is {like.dtype}"
        weights.plans[self.name] = cell, found
        return unavailable()

    def attempt(self, plan: Plan, *arguments: Any) -> list[Tensor] | None:
        from atn_norms.backends.native import eager  # not before it is needed: registering operators takes a while

        return eager.attempt(plan, *arguments)

    def operate(self, *arguments: Any) -> list[Tensor]:
        from atn_norms.backends.native import eager

        return eager.OPERATORS(*arguments)
