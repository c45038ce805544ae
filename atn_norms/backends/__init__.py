"""Ways to run a cell over a sequence: a backend prepares a program, or returns the reason why it has none."""

from atn_norms.backends.base import Backend, choose, known, prepared, select
from atn_norms.backends.description import describe
from atn_norms.backends.program import CellInputs, Program, Unsupported
from atn_norms.backends.reference import Reference
from atn_norms.backends.torch_nn import TorchNN

__all__ = [
    "Backend",
    "CellInputs",
    "Program",
    "Reference",
    "TorchNN",
    "Unsupported",
    "choose",
    "describe",
    "known",
    "prepared",
    "select",
]
