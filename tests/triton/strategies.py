"""Pairs of layers as in the tests of the native backend, on a GPU if there is one; results are compared on the CPU."""

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

# Kernels that exist but cannot be imported must fail, not skip.
needs_triton = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def place(backend: str) -> str:
    """Return the device of a backend."""
    return DEVICE if backend == "triton" else "cpu"


def moved(tree: Any, device: str) -> Any:
    """Return a state, a tensor or None on another device."""
    return None if tree is None else tree_map(lambda leaf: leaf.to(device), tree)


def made(pair: Pair, backend: str = "triton", dtype: torch.dtype | None = None) -> Any:
    """Return the layer on the device of its backend, with the same parameters on every device."""
    layer = replace(pair, options=pair.options | {"device": place(backend)}).layer(backend, dtype)
    layer.load_state_dict(pair.layer("reference", dtype).state_dict())
    return layer


def outcome(layer: Any, xs: Tensor, state: Any = None, lengths: Tensor | None = None, retain: bool = False) -> Outcome:
    """Return a layer's results, moved to the CPU."""
    device = next(layer.parameters()).device.type
    found = strategies.outcome(layer, *(moved(tree, device) for tree in (xs, state, lengths)), retain=retain)
    return Outcome(found.ys.cpu(), [leaf.cpu() for leaf in found.state], [g.cpu() for g in found.gradients])


def both(pair: Pair) -> tuple[Outcome, Outcome]:
    """Return the outcomes of Triton and of the reference."""
    given = pair.xs(), pair.state(), pair.lengths()
    return outcome(made(pair), *given), outcome(made(pair, "reference"), *given)


def check(pair: Pair, tolerance: float = EXACT) -> None:
    """Check that Triton equals the reference in values, states and every gradient."""
    agree(*both(pair), tolerance)
