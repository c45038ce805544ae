"""The native backend: whole sequences in C on the CPU, for the cells, norms and windows that the kernels support."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from atn_norms.backends.fused.fused_backend import Fused
from atn_norms.backends.fused.plan import HALF
from atn_norms.backends.native.library import unavailable
from atn_norms.backends.program import Unsupported

if TYPE_CHECKING:
    from atn_norms.backends.description import Description
    from atn_norms.backends.fused.operators import Operators


class Native(Fused):
    """Runs the built-in cells with declared and traced normalizers, over the built-in windows, in C on the CPU."""

    name = "native"

    def unsupported_type(self, description: Description) -> Unsupported | None:
        if description.device != "cpu":
            return Unsupported(
                "device", f"it runs on the CPU, and the layer is on {description.device}", "move the layer to the CPU"
            )
        if description.dtype not in (torch.float32, torch.float64, *HALF):
            text = f"it runs float64, float32, bfloat16 and float16, and the layer is {description.dtype}"
            return Unsupported("dtype", text, "convert the layer to one of these types")
        return None

    def missing(self) -> Unsupported | None:
        reason = unavailable()
        return (
            None if reason is None else Unsupported("kernels", reason, "run `atn-norms doctor`, which prints the cure")
        )

    @staticmethod
    def operators() -> Operators:
        from atn_norms.backends.native.call import OPERATORS

        return OPERATORS
