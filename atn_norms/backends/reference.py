"""The definition of truth: a loop over `cell.step` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from atn_norms.assorted_time import steps_mask
from atn_norms.cells import Cell, CellWeights
from atn_norms.normalizers import scanning
from atn_norms.pytree import Tree


class Reference:
    """Runs every cell, norm, window and plugin, in any dtype, twice differentiable; slow, and right by being short."""

    name = "reference"

    def unsupported_reason(self, cell: Cell, weights: CellWeights) -> str | None:
        return None

    def run(
        self,
        cell: Cell,
        weights: CellWeights,
        xs: Tensor,
        state: Tree,
        lengths: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, Tree]:
        mask = [None] * xs.shape[0] if lengths is None else steps_mask(lengths, xs).unbind(0)
        ys = []
        with scanning([norm.normalizer for norm in weights.norms.values()]):
            us, state = cell.project(weights, xs, state, lengths)
            for u, living in zip(us.unbind(0), mask, strict=True):
                y, state = cell.step(weights, u, state, living)
                ys.append(y)
        return torch.stack(ys), state
