"""The copying problem: remember symbols over a long series of blanks, and write them down."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from atn_norms.tasks.recall import Layout, Recall, RecallSpec


class CopyingSpec(RecallSpec):
    """Options of the copying problem; the defaults are those of arXiv 2209.14439's authors.

    | option | meaning | unit |
    |---|---|---|
    | `recall` | symbols that are shown and recalled | symbols |
    | `alphabet` | number of different symbols | symbols |
    | `length` | blanks between the symbols and their recall | steps |
    | `validation`, `test` | size of each split, drawn from the seed | sequences |

    >>> task = CopyingSpec(recall=3, length=4).build(seed=0)
    >>> inputs, targets, *_ = task.batch(0, 1)
    >>> inputs[:, 0].tolist(), targets[:, 0].tolist()
    ([8, 8, 5, 0, 0, 0, 0, 9, 0, 0], [0, 0, 0, 0, 0, 0, 0, 8, 8, 5])
    """

    kind: Literal["copying"] = "copying"

    def build(self, seed: int) -> Copying:
        return Copying(self, seed)


class Copying(Recall):
    r"""`recall` symbols, `length` blanks, a marker and blanks: T = `length` + 2 `recall`; see `Recall` for the loss.

    At the defaults, T = 120, and a model without memory has the loss 10 ln 8 / 120 = 0.1733. Source: Hochreiter,
    Schmidhuber, Neural Computation 9(8), 1997, in the form of Arjovsky et al., arXiv 1511.06464.
    """

    purpose = "copying"

    def plan(self) -> Layout:
        return Layout(self.spec.recall + self.spec.length, self.spec.length + 2 * self.spec.recall)

    def places(self, count: int, random: torch.Generator) -> Tensor:
        return torch.arange(self.spec.recall).expand(count, -1)
