"""The vanilla recurrent network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from atn_norms.cells.base import Cell, CellSpec, CellWeights, Placement, SiteStates, refuse
from atn_norms.pytree import Tree


@dataclass(frozen=True)
class RNNEquations(Cell):
    r"""Vanilla recurrent network with a norm on each product.

    $$h' = \phi\left(N_{ih}(W x + b_{ih}) + N_{hh}(U h + b_{hh})\right), \qquad \phi \in \{\tanh, \mathrm{relu}\}$$

    Source: Elman, Cognitive Science 14(2), 1990; norms derived from those of the LSTM.

    | symbol | meaning | shape |
    |---|---|---|
    | `carried` | `(h,)` | `[B, H]` |
    | sites | `ih`, `hh` (or `sum`) | `H` features each |
    """

    nonlinearity: Literal["tanh", "relu"] = "tanh"

    gates: ClassVar[tuple[str, ...]] = ("h",)
    torch_name: ClassVar[str | None] = "RNN"

    def step(self, weights: CellWeights, u: Tensor, state: Tree, mask: Tensor | None = None) -> tuple[Tensor, Tree]:
        (h,), states = state
        norm = SiteStates(self, weights, states, mask)
        activation = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        h = activation(norm("sum", u + norm("hh", self.recur(weights, h))))
        return self.ended(h, (h,), norm, state, mask)


class RNNSpec(CellSpec):
    """Options of the vanilla RNN."""

    kind: Literal["rnn"] = "rnn"
    nonlinearity: Literal["tanh", "relu"] = Field(default="tanh", description="the activation")

    def build(self, hidden_size: int, placement: Placement) -> RNNEquations:
        refuse(placement, "rnn", carry="An RNN carries its output alone.")
        return RNNEquations(hidden_size, placement, self.nonlinearity)
