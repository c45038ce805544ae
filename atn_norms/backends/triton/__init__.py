"""The Triton backend: whole sequences on a GPU, for supported cells, norms and windows. Experimental."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from atn_norms.backends.fused.fused_backend import Fused
from atn_norms.backends.fused.plan import Plan
from atn_norms.backends.program import Unsupported
from atn_norms.backends.triton.available import interpreted, unavailable
from atn_norms.backends.triton.limits import unsupported

if TYPE_CHECKING:
    from atn_norms.backends.description import Description
    from atn_norms.backends.fused.operators import Operators


class Triton(Fused):
    """Runs the built-in cells with layer and RMS norms, over the built-in windows, on a GPU."""

    name = "triton"

    def unsupported_type(self, description: Description) -> Unsupported | None:
        if description.device != "cuda" and not (description.device == "cpu" and interpreted()):
            return Unsupported("device", f"it runs on a GPU, and the layer is on {description.device}")
        if description.dtype not in (torch.float32, torch.float64):
            return Unsupported("dtype", f"it runs float32 and float64, and the layer is {description.dtype}")
        return None

    def unsupported_plan(self, plan: Plan) -> Unsupported | None:
        return unsupported(plan)

    def missing(self) -> Unsupported | None:
        reason = unavailable()
        return None if reason is None else Unsupported("kernels", reason)

    @staticmethod
    def operators() -> Operators:
        from atn_norms.backends.triton.call import OPERATORS  # imported late, since it imports Triton

        return OPERATORS
