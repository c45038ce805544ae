"""The common part of copying and denoising: read symbols, wait for a marker, and write the symbols in order."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from atn_norms.pytree import Tree
from atn_norms.registry import SpecError
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, generator, kaiming_linear

EVALUATION_ROWS = 500  # sequences per batch; fixed, so that a score does not depend on the training batch size
MOST_NUMBERS = 2**28  # of a batch: 2 GiB of symbols
BLANK = 0


class Layout(NamedTuple):
    """Layout of a sequence: `reading` steps that may show symbols, the marker, and blanks up to `length`."""

    reading: int
    length: int


class RecallSpec(TaskSpec):
    """Common options of copying and denoising."""

    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 4000,
        "optimizer": {"kind": "rmsprop", "lr": 2e-4, "momentum": 0.9},
    }
    recall: int = Field(default=10, ge=1, le=100_000)
    alphabet: int = Field(default=8, ge=2, le=1_000_000)
    length: int = Field(default=100, ge=1, le=1_000_000)
    validation: int = Field(default=1_000, ge=1, le=100_000_000)
    test: int = Field(default=10_000, ge=1, le=100_000_000)


class Recall(Task):
    r"""Cross-entropy per step, in nats, of blanks followed by the shown symbols in order.

    $$L = -\frac{1}{T B} \sum_{b=1}^{B} \sum_{t=1}^{T} \log p_{t,b}(y_{t,b}), \qquad
    y_t = \begin{cases} 0 & t \le T - r \\ \text{symbol } t - (T - r) & \text{else} \end{cases}$$

    Symbols are 1 to `alphabet`; 0 is the blank, and the largest number the marker. Outputs are the blank and the
    symbols. A predictor that knows the task and remembers nothing writes blanks with certainty and then guesses. Its
    cost is `recall` ln(`alphabet`) / T (derived). The second score is the share of wrong symbols.

    Training batches are drawn new at every step; the splits are drawn from the seed.
    """

    batch_size = 128
    metric = "cross-entropy"
    wrong = "symbols wrong"
    purpose: ClassVar[str]

    def __init__(self, spec: RecallSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.input_size = spec.alphabet + 2  # the blank, the symbols, the marker
        self.layout = self.plan()
        self.baselines = {"no memory": spec.recall * math.log(spec.alphabet) / self.layout.length}

    @abstractmethod
    def plan(self) -> Layout:
        """Return the layout of a sequence."""

    @abstractmethod
    def places(self, count: int, random: torch.Generator) -> Tensor:
        """Return the steps [count, recall] of the symbols of each sequence, in increasing order."""

    def encoder(self) -> nn.Module:
        return OneHot(self.input_size)

    def readout(self, output_size: int) -> nn.Module:
        return kaiming_linear(output_size, self.spec.alphabet + 1)

    def batch(self, step: int, size: int) -> Batch:
        if size * self.layout.length > MOST_NUMBERS:
            most = MOST_NUMBERS // self.layout.length
            raise SpecError("train.batch_size", f"{size} sequences of {self.layout.length} steps", f"at most {most}")
        return self._draw(size, "train", step)

    def loss(self, model: Model, batch: Batch, carry: Tree | None) -> tuple[Tensor, Tree | None]:
        predictions, _ = model(batch.inputs)
        return nn.functional.cross_entropy(predictions.flatten(0, 1), batch.targets.flatten()), None

    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        count: int = getattr(self.spec, split)
        nats, wrong = torch.zeros((), dtype=torch.float64), 0
        for first in range(0, count, EVALUATION_ROWS):
            inputs, targets, *_ = self._draw(min(EVALUATION_ROWS, count - first), split, first)
            predictions, _ = model(inputs)
            losses = nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none")
            nats += losses.double().sum()
            written = predictions[-self.spec.recall :].argmax(-1)
            wrong += int((written != targets[-self.spec.recall :]).sum())
        return {
            self.metric: nats.item() / (count * self.layout.length),
            self.wrong: wrong / (count * self.spec.recall),
        }

    def _draw(self, count: int, *purpose: str | int) -> Batch:
        """Return inputs and targets [T, count] as symbol indices."""
        random = generator(self.seed, self.purpose, *purpose)
        reading, length = self.layout
        symbols = torch.randint(1, self.spec.alphabet + 1, (count, self.spec.recall), generator=random)
        inputs = torch.full((count, length), BLANK)
        inputs.scatter_(1, self.places(count, random), symbols)
        inputs[:, reading] = self.spec.alphabet + 1
        targets = torch.full((count, length), BLANK)
        targets[:, -self.spec.recall :] = symbols
        return Batch(inputs.T.contiguous(), targets.T.contiguous())


class OneHot(nn.Module):
    """Map indices [...] to unit vectors [..., size] in the dtype of the model."""

    rows: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.eye(size), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.rows[numbers]
