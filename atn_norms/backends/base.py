"""The backend protocol, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from atn_norms.backends.native import Native
from atn_norms.backends.native.library import unavailable, warn_once
from atn_norms.backends.reference import Reference
from atn_norms.backends.torch_nn import TorchNN
from atn_norms.backends.triton import Triton
from atn_norms.cells import Cell, CellWeights
from atn_norms.errors import SpecError, unknown
from atn_norms.pytree import Tree


class Backend(Protocol):
    """Run a cell over a whole sequence.

    | symbol | meaning | shape |
    |---|---|---|
    | `xs` | inputs, time first | `[T, B, D]` |
    | `state` | the cell's state, as `Cell.initial` gives it; the same for every backend | axis 0: B |
    | `lengths` | live steps of each row; None means all | `[B]`, int |
    | `ys` | outputs, 0 beyond a row's length | `[T, B, R]` |
    """

    @property
    def name(self) -> str:
        """The name for `backend=`."""
        ...

    def unsupported_reason(self, cell: Cell, weights: CellWeights) -> str | None:
        """In one sentence why it cannot run this case, or None if it can."""
        ...

    def run(
        self,
        cell: Cell,
        weights: CellWeights,
        xs: Tensor,
        state: Tree,
        lengths: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, Tree]:
        """Return the outputs of all steps, and the state after each row's last step.

        Without `keep_state` the caller reads the carried tensors only, and a backend need not build the norms' states.
        """
        ...


class UnsupportedBackend(ValueError):
    """Report that a backend, chosen by name, cannot run a layer; `reason` is its sentence."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"backend: {name!r} cannot run this layer: {reason}")

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.reason)


_IN_ORDER: tuple[Backend, ...] = (TorchNN(), Native(), Reference())
_BY_NAME: tuple[Backend, ...] = (Triton(),)  # experimental: only by name


def known() -> Mapping[str, Backend]:
    """Every backend by name, the one `auto` tries first first, those it never tries last."""
    return {backend.name: backend for backend in (*_IN_ORDER, *_BY_NAME)}


def choose(name: str, cell: Cell, weights: CellWeights) -> Backend:
    """The backend of that name, or with `"auto"` the first that does not refuse.

    One warning in a process reports a case that `native` would run if its kernels were compiled.

    Errors: `ValueError` for an unknown name, and for one that refuses this case, with its reason.
    """
    if name == "auto":
        for backend in _IN_ORDER:
            reason = backend.unsupported_reason(cell, weights)
            if reason is None:
                return backend
            if reason == unavailable():
                warn_once()
    backends = known()
    if name not in backends:
        names = ["auto", *backends]
        raise SpecError.of([unknown("backend", name, names, path=("backend",))])
    reason = backends[name].unsupported_reason(cell, weights)
    if reason is not None:
        raise UnsupportedBackend(name, reason)
    return backends[name]


def refusals(cell: Cell, weights: CellWeights) -> dict[str, str | None]:
    """Return the reason why each backend does not support a case, or None."""
    return {name: backend.unsupported_reason(cell, weights) for name, backend in known().items()}
