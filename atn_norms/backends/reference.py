"""The definition of the result: a loop over `cell.step` in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.assorted_time import steps_mask
from atn_norms.backends.program import CellInputs, Program, Unsupported
from atn_norms.cells import Cell
from atn_norms.normalizers import scanning
from atn_norms.pytree import Tree


class ReferenceProgram(Program):
    """The reference for one cell."""

    name = "reference"

    def run(self, inputs: CellInputs, state: Tree, lengths: Tensor | None = None) -> tuple[Tensor, Tree]:
        cell, xs, weights = self.cell, inputs.xs, inputs.weights
        mask = [None] * xs.shape[0] if lengths is None else steps_mask(lengths, xs).unbind(0)
        ys = []
        with scanning([norm.normalizer for norm in weights.norms.values()]):
            us, state = cell.project(weights, xs, state, lengths)
            for u, living in zip(us.unbind(0), mask, strict=True):
                y, state = cell.step(weights, u, state, living)
                ys.append(y)
        return torch.stack(ys), state


class Reference:
    """Run every cell, norm, window and plugin, in any dtype, twice differentiable; unoptimized, for correctness."""

    name = ReferenceProgram.name

    def prepare(self, cell: Cell, description: Any) -> Program | Unsupported:
        return ReferenceProgram(cell)
