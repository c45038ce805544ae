"""torch's own fused recurrences, for cells without a norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from atn_norms.backends.program import CellInputs, Program, Unsupported
from atn_norms.cells import Cell, CellWeights, RNNEquations
from atn_norms.pytree import Tree

if TYPE_CHECKING:
    from atn_norms.backends.description import Description


class TorchProgram(Program):
    """torch's kernels for one cell."""

    name = "torch"

    def run(self, inputs: CellInputs, state: Tree, lengths: Tensor | None = None) -> tuple[Tensor, Tree]:
        cell, xs, weights = self.cell, inputs.xs, inputs.weights
        carried, norms = state
        if lengths is None:
            ys, carried = _recur(cell, weights, xs, carried, None)
            return ys, (carried, norms)
        ys = xs.new_zeros(xs.shape[0], xs.shape[1], cell.output_size)
        rows = (lengths > 0).nonzero().squeeze(1).to(xs.device)  # torch does not pack rows of length 0
        if rows.numel() == 0:
            return ys, state
        packed = pack_padded_sequence(xs[:, rows], lengths.cpu()[rows.cpu()], enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None and back is not None  # both exist with enforce_sorted=False
        data, last = _recur(cell, weights, packed.data, tuple(c[rows][order] for c in carried), packed.batch_sizes)
        padded, _ = pad_packed_sequence(packed._replace(data=data), total_length=xs.shape[0])
        carried = tuple(old.index_copy(0, rows, new[back]) for old, new in zip(carried, last, strict=True))
        return ys.index_copy(1, rows, padded), (carried, norms)


class TorchNN:
    """Runs a cell of torch.nn without norms, with the kernels of torch."""

    name = TorchProgram.name

    def prepare(self, cell: Cell, description: Description) -> Program | Unsupported:
        if cell.torch_name is None:
            return Unsupported("cell", f"torch.nn has no {type(cell).__name__}")
        if description.normed:
            places = ", ".join(description.normed)
            return Unsupported("norm", f"torch.nn has no norm inside the cell, and the layer has one at {places}")
        return TorchProgram(cell)


def _recur(
    cell: Cell, weights: CellWeights, x: Tensor, carried: tuple[Tensor, ...], batch_sizes: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer and direction of torch's recurrence, over a padded sequence or packed data."""
    name = f"rnn_{cell.nonlinearity}" if isinstance(cell, RNNEquations) else str(cell.torch_name).lower()
    function = getattr(torch, name)
    tensors = list(weights.tensors.values())
    hx = [c.unsqueeze(0) for c in carried]
    states = hx if len(hx) > 1 else hx[0]
    has_bias = weights.get("bias_ih") is not None
    if batch_sizes is None:
        if name == "lstm" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            x = _differentiable(x, [*hx, *tensors])
        y, *last = function(x, states, tensors, has_bias, 1, 0.0, False, False, False)
    else:
        y, *last = function(x, batch_sizes, states, tensors, has_bias, 1, 0.0, False, False)
    return y, tuple(c.squeeze(0) for c in last)


def _differentiable(x: Tensor, others: list[Tensor]) -> Tensor:
    """Return the input, with a gradient if another tensor has one.

    For an input without a gradient, torch's compiler selects the LSTM of oneDNN, which it cannot differentiate.
    Exporters keep torch's operator, and need no change.
    """
    source = next((tensor for tensor in others if tensor.requires_grad), None)
    if x.requires_grad or source is None or not torch.is_grad_enabled():
        return x
    return x + source.flatten()[:0].sum()  # the sum of no elements is 0
