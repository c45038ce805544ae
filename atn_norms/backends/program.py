"""The contract between layers and backends: programs, their inputs, and reasons why there is no program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from torch import Tensor

from atn_norms.cells import Cell, CellWeights
from atn_norms.pytree import Tree

if TYPE_CHECKING:
    from atn_norms.backends.description import Description

Code = Literal["device", "dtype", "transform", "cell", "placement", "no norm", "norm", "window", "kernels"]


class Unsupported(NamedTuple):
    """The reason why a backend has no program for a description: a `code` to compare, and a `text` to read.

    `change` is an instruction that makes the backend run the layer, if there is one.

    | code | the backend does not run |
    |---|---|
    | `device`, `dtype` | the device or the type of the layer |
    | `transform` | the transform of torch that is active, such as `torch.func.grad` |
    | `cell`, `placement` | the cell, or the places of its norms |
    | `no norm` | cells without a norm |
    | `norm`, `window` | the normalizer or the window of a site |
    | `kernels` | any layer: its kernels are missing |
    """

    code: Code
    text: str
    change: str = ""


class CellInputs(NamedTuple):
    """Inputs of a cell in one call, besides its state.

    | field | meaning | shape |
    |---|---|---|
    | `xs` | inputs, time first | `[T, B, D]` |
    | `weights` | tensors and norms of the cell | |
    | `declared` | the norms' tensors, which `describe` returned with the description | |
    | `keep_state` | False if the caller reads the carried tensors only; the norms' states may then be absent | |
    """

    xs: Tensor
    weights: CellWeights
    declared: tuple[Any, ...] = ()
    keep_state: bool = True


class Program(ABC):
    """An executable for one cell and description; it holds no tensors and may be used by several threads.

    | attribute | meaning |
    |---|---|
    | `name` | the name of its backend |
    | `cell` | the cell that it runs |
    """

    name: str

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """Return the program itself, since nothing changes it."""
        return self

    @abstractmethod
    def run(self, inputs: CellInputs, state: Tree, lengths: Tensor | None = None) -> tuple[Tensor, Tree]:
        """Return the outputs of all steps `[T, B, R]`, and the state after each row's last step.

        | symbol | meaning | shape |
        |---|---|---|
        | `state` | the cell's state, as `Cell.initial` returns it; the same for every backend | axis 0: B |
        | `lengths` | steps of each row; outputs beyond are 0; None means all | `[B]`, int |
        """


class Backend(Protocol):
    """Prepare programs that run a cell over a whole sequence."""

    @property
    def name(self) -> str:
        """The name for `backend=`."""
        ...

    def prepare(self, cell: Cell, description: Description) -> Program | Unsupported:
        """Return a program for every call that has this description, or the reason why there is none."""
        ...
