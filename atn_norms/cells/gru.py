"""The gated recurrent unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from atn_norms.cells.base import Cell, CellSpec, CellWeights, Placement, SiteStates, refuse
from atn_norms.pytree import Tree


@dataclass(frozen=True)
class GRUEquations(Cell):
    r"""Gated recurrent unit with a norm on each product; the reset gate is applied after the recurrent product.

    $$\begin{aligned}
    (x_r, x_z, x_n) &= N_{ih}(W x + b_{ih}), \qquad (h_r, h_z, h_n) = N_{hh}(U h + b_{hh}) \\
    r &= \sigma(x_r + h_r), \qquad z = \sigma(x_z + h_z), \qquad n = \tanh(x_n + r \odot h_n) \\
    h' &= (1 - z) \odot n + z \odot h
    \end{aligned}$$

    Source: Cho et al., arXiv 1406.1078, in torch.nn's convention; norms derived from those of the LSTM. The order of
    gates is torch's: r, z, n.

    | symbol | meaning | shape |
    |---|---|---|
    | `carried` | `(h,)` | `[B, H]` |
    | sites | `ih`, `hh` | `3H` features each |
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    torch_name: ClassVar[str | None] = "GRU"

    def autocast_type(self, half: torch.dtype, state: torch.dtype) -> torch.dtype:
        return torch.promote_types(half, state)  # as in torch.nn, the new state is a sum with the old one

    def step(self, weights: CellWeights, u: Tensor, state: Tree, mask: Tensor | None = None) -> tuple[Tensor, Tree]:
        (h,), states = state
        norm = SiteStates(self, weights, states, mask)
        x_r, x_z, x_n = u.chunk(3, -1)
        h_r, h_z, h_n = norm("hh", self.recur(weights, h)).chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        h = (1 - z) * n + z * h
        return self.ended(h, (h,), norm, state, mask)


class GRUSpec(CellSpec):
    """Options of the GRU: none but the kind."""

    kind: Literal["gru"] = "gru"

    def build(self, hidden_size: int, placement: Placement) -> GRUEquations:
        refuse(
            placement,
            "gru",
            sum="The reset gate is applied between the two products, so they have no sum to normalize.",
            carry="A GRU carries its output alone.",
        )
        return GRUEquations(hidden_size, placement)
