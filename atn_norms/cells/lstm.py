"""The long short-term memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from atn_norms.cells.base import Cell, CellSpec, CellWeights, Placement, SiteStates
from atn_norms.errors import SpecError
from atn_norms.pytree import Tree


@dataclass(frozen=True)
class LSTMEquations(Cell):
    r"""Long short-term memory with a norm on each product and on the cell state before the output.

    $$\begin{aligned}
    (i, f, g, o) &= N_{hh}(U h + b_{hh}) + N_{ih}(W x + b_{ih}) \\
    c' &= \sigma(f) \odot c + \sigma(i) \odot \tanh(g) \\
    h' &= P\,[\sigma(o) \odot \tanh(N_c(c'))]
    \end{aligned}$$

    Source: Hochreiter, Schmidhuber, Neural Computation 9(8), 1997; places of the norms: Pospisil, Zadorozhnyy, Ye,
    arXiv 2209.14439; projection P: Sak, Senior, Beaufays, arXiv 1402.1128, absent if `proj_size` is 0. The order of
    gates is torch's: i, f, g, o.

    | symbol | meaning | shape |
    |---|---|---|
    | `carried` | `(h, c)` | `[B, R]`, `[B, H]` |
    | sites | `ih`, `hh` (or `sum`), `c` | `4H`, `4H`, `H` features |
    | `weight_hr` | P, with `proj_size` R > 0 | `[R, H]` |
    """

    proj_size: int = 0

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")
    carried: ClassVar[tuple[str, ...]] = ("h", "c")
    torch_name: ClassVar[str | None] = "LSTM"

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    @cached_property
    def sites(self) -> dict[str, int]:
        return self.product_sites() | {"c": self.hidden_size}

    def carried_sizes(self) -> tuple[int, ...]:
        return self.output_size, self.hidden_size

    def autocast_types(
        self, half: torch.dtype, carried: Sequence[torch.dtype], packed: bool
    ) -> tuple[torch.dtype, ...]:
        if not (packed or self.proj_size):  # torch runs these cases with oneDNN
            return super().autocast_types(half, carried, packed)
        c = torch.promote_types(half, carried[1])  # the new c is a sum with the old c; the projection is a product
        return (half if self.proj_size else c), c

    def shapes(self, input_size: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        projection = {"weight_hr": (self.proj_size, self.hidden_size)} if self.proj_size else {}
        return super().shapes(input_size, bias) | projection

    def step(self, weights: CellWeights, u: Tensor, state: Tree, mask: Tensor | None = None) -> tuple[Tensor, Tree]:
        (h, c), states = state
        norm = SiteStates(self, weights, states, mask)
        i, f, g, o = norm("sum", u + norm("hh", self.recur(weights, h))).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = norm("c", c)
        h = torch.sigmoid(o) * torch.tanh(normed)
        if self.proj_size:
            h = F.linear(h, weights["weight_hr"])
        return self.ended(h, (h, normed if self.placement.carry == "normed" else c), norm, state, mask)


class LSTMSpec(CellSpec):
    """Options of the LSTM."""

    kind: Literal["lstm"] = "lstm"
    proj_size: int = Field(default=0, ge=0, description="features of the projected output; 0: no projection")

    def build(self, hidden_size: int, placement: Placement) -> LSTMEquations:
        if self.proj_size >= hidden_size:
            raise SpecError("cell.proj_size", str(self.proj_size), f"less than hidden_size, {hidden_size}")
        return LSTMEquations(hidden_size, placement, self.proj_size)
