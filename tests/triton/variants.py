"""Cases that together take every branch of the kernels."""

import torch

from tests.native.strategies import CELLS, NORMS, Pair

RECURRENT = {"recurrent_forward", "recurrent_backward"}
ROWS = {"measure_rows", "pool_steps", "pooled_grads", "sum_steps", "row_grads", "sum_affine"}


def a_pair(cell: str, norm: str, window: str, **fields) -> Pair:
    sizes = {"hidden": 60, "batch": 50, "steps": 2, "inputs": 2, "dtype": torch.float32}
    return Pair(cell, norm, window, **(sizes | fields))


# Case -> the kernels to compile; empty: all kernels.
VARIANTS: dict[str, tuple[Pair, set[str]]] = {
    "lstm": (a_pair("lstm", "layer", "4"), RECURRENT),
    "gru": (a_pair("gru", "rms", "exponential", ragged=True, before=2), RECURRENT),
    "rows": (a_pair("tanh", "ih", "4", ragged=True, before=2), ROWS),
    "step": (a_pair("relu", "hh", "1", hidden=512), RECURRENT),
}
USUAL = list(VARIANTS)
for cell in CELLS:
    for norm in NORMS:
        for window in ("1", "4", "exponential"):
            if norm != "c" or cell == "lstm":
                states = {"ragged": True, "before": 2}
                VARIANTS[f"{cell} {norm} {window}"] = a_pair(cell, norm, window), set()
                VARIANTS[f"{cell} {norm} {window} with states"] = a_pair(cell, norm, window, **states), set()
    for hidden in (16, 128, 200, 512):
        VARIANTS[f"{cell} of {hidden} units"] = a_pair(cell, "layer", "4", hidden=hidden), set()
    VARIANTS[f"{cell} in float64"] = a_pair(cell, "layer", "4", dtype=torch.float64), set()
