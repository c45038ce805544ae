"""The choice of a backend: programs by name, kept while the description of their layer is unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from atn_norms.backends.description import Declared, Description, describe
from atn_norms.backends.native import Native
from atn_norms.backends.native.library import warn_once
from atn_norms.backends.program import Backend, Code, Program, Unsupported
from atn_norms.backends.reference import Reference, ReferenceProgram
from atn_norms.backends.torch_nn import TorchNN
from atn_norms.backends.triton import Triton
from atn_norms.cells import Cell, CellWeights
from atn_norms.errors import SpecError, unknown

__all__ = ["Backend", "Selected", "UnsupportedBackend", "choose", "known", "prepared", "select"]


class UnsupportedBackend(ValueError):
    """Report that a backend, chosen by name, cannot run a layer; `reason` is the text of its `Unsupported`."""

    def __init__(self, name: str, reason: str, code: Code | None = None) -> None:
        self.name, self.reason, self.code = name, reason, code
        super().__init__(f"backend: {name!r} cannot run this layer: {reason}")

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.reason, self.code)


_TORCH, _NATIVE, _REFERENCE = TorchNN(), Native(), Reference()
_IN_ORDER: tuple[Backend, ...] = (_TORCH, _NATIVE, _REFERENCE)
_COMPILED: tuple[Backend, ...] = (_NATIVE, _TORCH, _REFERENCE)  # a compiler unrolls the steps of torch's recurrence
_BY_NAME: tuple[Backend, ...] = (Triton(),)  # experimental: used only by name


def known() -> Mapping[str, Backend]:
    """Return every backend by name, in the order of `auto`; backends that `auto` never tries come last."""
    return {backend.name: backend for backend in (*_IN_ORDER, *_BY_NAME)}


class Selected(NamedTuple):
    """A program with everything that it was selected by."""

    name: str
    cell: Cell
    description: Description | None
    program: Program


def select(
    name: str, cell: Cell, weights: CellWeights, kept: Selected | None = None
) -> tuple[Selected, tuple[Declared, ...]]:
    """Return the program for `backend=name`, and the declarations that its inputs need; `kept` if it still fits.

    With `"auto"` it is the program of the first backend that has one; in a compiled graph, `native` precedes `torch`.
    The reference has a program for every cell. If it is selected by name, no description is made, since a description
    may trace the normalizers.

    Errors: `SpecError` for an unknown name, and `UnsupportedBackend` for a backend without a program, with its reason.
    """
    if name == Reference.name:
        description, declared = None, ()
    else:
        description, declared = describe(cell, weights)
    if kept is not None and kept.cell is cell and kept.description == description and kept.name == name:
        return kept, declared
    program = ReferenceProgram(cell) if description is None else _prepare(name, cell, description)
    return Selected(name, cell, description, program), declared


def choose(name: str, cell: Cell, weights: CellWeights) -> Program:
    """Return the program for `backend=name`, as `select` does."""
    return select(name, cell, weights)[0].program


def prepared(cell: Cell, weights: CellWeights) -> dict[str, Program | Unsupported]:
    """Return the program of each backend, or the reason why there is none."""
    description, _ = describe(cell, weights)
    return {name: backend.prepare(cell, description) for name, backend in known().items()}


def _prepare(name: str, cell: Cell, description: Description) -> Program:
    """Return a program.

    One warning in a process reports a case that `native` would run if its kernels were compiled.
    """
    if name == "auto":
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        for backend in _COMPILED if compiled else _IN_ORDER:
            program = backend.prepare(cell, description)
            if not isinstance(program, Unsupported):
                return program
            if program.code == "kernels" and description.normed:
                warn_once()
    backends = known()
    if name not in backends:
        raise SpecError.of([unknown("backend", name, ["auto", *backends], path=("backend",))])
    program = backends[name].prepare(cell, description)
    if isinstance(program, Unsupported):
        raise UnsupportedBackend(name, program.text, program.code)
    return program
