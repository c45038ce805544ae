"""The Triton backend: whole sequences on a GPU, for the cells, norms and windows the kernels know. Experimental."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from atn_norms.backends.fused.fused_backend import Fused
from atn_norms.backends.fused.plan import Plan
from atn_norms.backends.program import Unsupported
from atn_norms.backends.triton.available import interpreted, unavailable

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

    def unsupported_plan(self, plan: Plan, description: Description) -> Unsupported | None:
        if plan.joint or plan.normed_carry:
            return Unsupported("placement", f"it runs the default placement only, and the cell is {plan.cell}")
        if plan.coupled:
            return Unsupported("norm", "it has no kernel for norms over the rows of a batch")
        traced = [site.site for site in plan.sites if site.traced is not None]
        if traced:
            text = f"it has no kernel for traced normalizers, and there is one at {', '.join(traced)}"
            return Unsupported("norm", text)
        grouped = [site for site in plan.sites if site.groups > 1]
        if grouped:
            text = f"it has no kernel for a norm of groups, and the one at {grouped[0].site} has {grouped[0].groups}"
            return Unsupported("norm", text)
        detached = [site.site for site in plan.sites if site.detached]
        if detached:
            text = f"it has no kernel for detached windows, and there is one at {', '.join(detached)}"
            return Unsupported("window", text)
        other = [site.site for site in plan.sites if site.taps or site.past]
        if other:
            text = f"it has no kernel for windows of plugins, and there is one at {', '.join(other)}"
            return Unsupported("window", text)
        return None

    def missing(self) -> Unsupported | None:
        reason = unavailable()
        return None if reason is None else Unsupported("kernels", reason)

    @staticmethod
    def operators() -> Operators:
        from atn_norms.backends.triton.call import OPERATORS  # not before it is needed: it imports Triton

        return OPERATORS
