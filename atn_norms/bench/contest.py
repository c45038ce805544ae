"""Runners: each does the work of one case on one implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.backends.base import UnsupportedBackend
from atn_norms.bench.spec import TEXTBOOK, TORCH, Case
from atn_norms.bench.textbook import Textbook
from atn_norms.layers import Recurrent


class Refused(Exception):
    """The runner does not support a case; the message is the reason."""


class Runner:
    """One module and the work of a case; `window` is None for torch.nn, which has no norm.

    Errors: `Refused` where it cannot do the case.
    """

    def __init__(self, case: Case, name: str, window: int | None) -> None:
        self.case, self.name, self.window = case, name, window
        torch.manual_seed(0)
        self.module = module_of(case, name, window).train(case.mode == "training")
        dtype, size = getattr(torch, case.dtype), case.size
        self._xs = torch.randn(size.steps, size.batch, size.input, dtype=dtype)
        self._upstream = torch.randn(size.steps, size.batch, size.hidden, dtype=dtype)

    def call(self, steps: int) -> Callable[[], object]:
        """Return a callable that does the work over the first `steps` steps."""
        return getattr(self, f"_{self.case.mode}")(self._xs[:steps], self._upstream[:steps])

    def _training(self, xs: Tensor, upstream: Tensor) -> Callable[[], object]:
        xs = xs.clone().requires_grad_(self.case.input_gradient)
        leaves = [xs, *self.module.parameters()]

        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            self.module(xs)[0].backward(upstream)

        return step

    def _inference(self, xs: Tensor, upstream: Tensor) -> Callable[[], object]:
        @torch.no_grad()
        def infer() -> None:
            self.module(xs)

        return infer

    def _streaming(self, xs: Tensor, upstream: Tensor) -> Callable[[], object]:
        run: Any = self.module.unroll if isinstance(self.module, Recurrent) else self.module
        with torch.no_grad():
            _, state = run(torch.randn(self.window or 1, *xs.shape[1:], dtype=xs.dtype))  # the window is full

        @torch.no_grad()
        def step() -> None:
            nonlocal state
            _, state = run(xs, state)

        return step


def module_of(case: Case, name: str, window: int | None) -> nn.Module:
    """Build the module of a runner: torch's, the textbook's, or a layer on the named backend.

    Errors: `Refused`, with the reason.
    """
    dtype = getattr(torch, case.dtype)
    if name == TORCH:
        layer = case.layer(None).build(dtype=dtype)
        module = getattr(nn, str(layer.cell.torch_name))(case.size.input, case.size.hidden, dtype=dtype)
        module.load_state_dict(layer.state_dict())
        return module
    assert window is not None
    try:
        layer = case.layer(window, "reference" if name == TEXTBOOK else name).build(dtype=dtype)
        return Textbook(layer, window) if name == TEXTBOOK else layer
    except UnsupportedBackend as error:
        raise Refused(error.reason) from None
    except ValueError as error:
        raise Refused(str(error)) from None
