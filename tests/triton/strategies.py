"""The pairs of the native backend's tests, with the kernels' half on a GPU where there is one; compared on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from atn_norms.backends.triton.available import unavailable
from atn_norms.pytree import tree_map
from tests.native import strategies
from tests.native.strategies import EXACT, Outcome, Pair, agree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Kernels that are there but do not import must fail, not skip.
needs_triton = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def place(backend: str) -> str:
    """The device that a backend runs on."""
    return DEVICE if backend == "triton" else "cpu"


def moved(tree: Any, device: str) -> Any:
    """A state, a tensor or None, elsewhere."""
    return None if tree is None else tree_map(lambda leaf: leaf.to(device), tree)


def made(pair: Pair, backend: str = "triton", dtype: torch.dtype | None = None) -> Any:
    """The layer on the device of its backend; its numbers are the same everywhere."""
    layer = replace(pair, options=pair.options | {"device": place(backend)}).layer(backend, dtype)
    layer.load_state_dict(pair.layer("reference", dtype).state_dict())
    return layer


def outcome(layer: Any, xs: Tensor, state: Any = None, lengths: Tensor | None = None, retain: bool = False) -> Outcome:
    """Return a layer's results, moved to the CPU."""
    device = next(layer.parameters()).device.type
    found = strategies.outcome(layer, *(moved(tree, device) for tree in (xs, state, lengths)), retain=retain)
    return Outcome(found.ys.cpu(), [leaf.cpu() for leaf in found.state], [g.cpu() for g in found.gradients])


def both(pair: Pair) -> tuple[Outcome, Outcome]:
    """Triton's outcome, and the reference's."""
    given = pair.xs(), pair.state(), pair.lengths()
    return outcome(made(pair), *given), outcome(made(pair, "reference"), *given)


def check(pair: Pair, tolerance: float = EXACT) -> None:
    """Triton is the reference: values, states, every gradient."""
    agree(*both(pair), tolerance)
