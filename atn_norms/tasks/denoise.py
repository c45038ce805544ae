"""The denoising problem: find symbols scattered in a long blank sequence, and write them down."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from atn_norms.tasks.recall import Layout, Recall, RecallSpec


class DenoiseSpec(RecallSpec):
    """Options of the denoising problem; the authors released no setting, and training is as in the copying problem.

    | option | meaning | unit |
    |---|---|---|
    | `recall` | symbols that are shown and recalled | symbols |
    | `alphabet` | number of different symbols | symbols |
    | `length` | T; symbols are in the first T + `recall` - 1 of T + 2 `recall` steps | steps |
    | `validation`, `test` | size of each split, drawn from the seed | sequences |

    >>> task = DenoiseSpec(recall=3, length=6).build(seed=0)
    >>> inputs, targets, *_ = task.batch(0, 1)
    >>> inputs[:, 0].tolist(), targets[:, 0].tolist()
    ([0, 0, 8, 9, 0, 0, 6, 0, 10, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 9, 6])
    """

    kind: Literal["denoise"] = "denoise"
    alphabet: int = Field(default=9, ge=2, le=1_000_000)

    def build(self, seed: int) -> Denoise:
        return Denoise(self, seed)


class Denoise(Recall):
    r"""`recall` symbols at random different steps of T' = `length` + `recall` - 1, a marker, and `recall` blanks.

    At the defaults a sequence has 120 steps, and a model without memory has the loss 10 ln 9 / 120 = 0.1831.
    The symbols' steps are drawn without replacement, so that there are always `recall` of them. The targets keep
    their order (Jing et al., arXiv 1706.02761). The authors of arXiv 2209.14439 released no
    settings; their NC-GRU study uses T = 200 and 400 and draws the steps with replacement.
    """

    purpose = "denoise"

    def plan(self) -> Layout:
        return Layout(self.spec.length + self.spec.recall - 1, self.spec.length + 2 * self.spec.recall)

    def places(self, count: int, random: torch.Generator) -> Tensor:
        shuffled = torch.rand(count, self.layout.reading, generator=random).argsort(1)
        return shuffled[:, : self.spec.recall].sort(1).values
