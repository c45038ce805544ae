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

    def __init__(self, case: Case, name: str, window: int | str | None) -> None:
        self.case, self.name, self.window = case, name, window
        torch.manual_seed(0)
        self.module = module_of(case, name, window).train(case.mode == "training")
        dtype, size = getattr(torch, case.dtype), case.size
        self._xs = torch.randn(size.steps, size.batch, size.input, dtype=dtype)
        output = case.layer(None).equations().output_size
        self._upstream = torch.randn(size.steps, size.batch, output, dtype=dtype)

    def call(self, steps: int) -> Callable[[], object]:
        """Return a callable that does the work over the first `steps` steps."""
        return getattr(self, f"_{self.case.mode}")(self._xs[:steps], self._upstream[:steps])

    def _run(self, xs: Tensor, *state: Any) -> Any:
        """Call the module as the case does; a layer of this package is called by `unroll` where a state is given."""
        run: Any = self.module.unroll if state and isinstance(self.module, Recurrent) else self.module
        with autocast(self.case):
            return run(xs, *state)

    def _training(self, xs: Tensor, upstream: Tensor) -> Callable[[], object]:
        xs = xs.clone().requires_grad_(self.case.input_gradient)
        leaves = [xs, *self.module.parameters()]

        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            ys = self._run(xs)[0]
            ys.backward(upstream.to(ys.dtype))

        return step

    def _inference(self, xs: Tensor, upstream: Tensor) -> Callable[[], object]:
        @torch.no_grad()
        def infer() -> None:
            self._run(xs)

        return infer

    def _streaming(self, xs: Tensor, upstream: Tensor) -> Callable[[], object]:
        steps = self.window if isinstance(self.window, int) else 1
        with torch.no_grad():
            _, state = self._run(torch.randn(steps, *xs.shape[1:], dtype=xs.dtype), None)  # the window is full

        @torch.no_grad()
        def step() -> None:
            nonlocal state
            _, state = self._run(xs, state)

        return step


def autocast(case: Case) -> torch.autocast:
    """Return the autocast of a case, which may be none."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast)


def module_of(case: Case, name: str, window: int | str | None) -> nn.Module:
    """Build the module of a runner: torch's, the textbook's, or a layer on the named backend.

    Errors: `Refused`, with the reason.
    """
    dtype = getattr(torch, case.dtype)
    if name == TORCH:
        layer = case.layer(None).build(dtype=dtype)
        own = {name: getattr(layer.cell, name) for name in ("nonlinearity", "proj_size") if hasattr(layer.cell, name)}
        module = getattr(nn, str(layer.cell.torch_name))(case.size.input, case.size.hidden, dtype=dtype, **own)
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
