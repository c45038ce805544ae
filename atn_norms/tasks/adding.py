"""The adding problem: remember and add two marked numbers of a long sequence."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from atn_norms.pytree import Tree
from atn_norms.registry import SpecError
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, generator, kaiming_linear

EVALUATION_ROWS = 500  # sequences per batch; fixed, so that a score does not depend on the training batch size
MOST_NUMBERS = 2**31  # of a split, which is drawn at once: 8 GiB


class AddingSpec(TaskSpec):
    """Options of the adding problem; the defaults are those of arXiv 2209.14439's authors.

    | option | meaning | unit |
    |---|---|---|
    | `length` | T, steps of a sequence | steps |
    | `train`, `validation`, `test` | size of each split, drawn from the seed | sequences |

    >>> task = AddingSpec(length=50, train=1000).build(seed=0)
    >>> task.batch(0, 20).inputs.shape
    torch.Size([50, 20, 2])
    """

    recommended: ClassVar[Mapping[str, Any]] = {"steps": 20_000, "optimizer": {"kind": "rmsprop", "lr": 1e-3}}
    kind: Literal["adding"] = "adding"
    length: int = Field(default=100, ge=2, le=1_000_000)
    train: int = Field(default=100_000, ge=1)
    validation: int = Field(default=1_000, ge=1)
    test: int = Field(default=10_000, ge=1)

    @field_validator("train", "validation", "test")
    @classmethod
    def _fits(cls, count: int, info: ValidationInfo) -> int:
        length = info.data.get("length", 1)
        if count * length > MOST_NUMBERS:
            raise ValueError(
                f"{count} sequences of {length} steps do not fit in memory; at most {MOST_NUMBERS // length}"
            )
        return count

    def build(self, seed: int) -> Adding:
        return Adding(self, seed)


class Adding(Task):
    r"""Sum the two marked values of a sequence: squared error at the last step.

    $$x_t = (u_t, m_t), \quad u_t \sim U[0, 1), \quad y = \sum_t m_t u_t$$

    Two steps are marked (m_t = 1): one drawn uniformly from the first T/2 - 1 steps, and one from the others. The best
    constant prediction, 1, has the error Var(u) + Var(u') = 2/12 = 1/6 at every length (derived: E[y] = 1, and the
    values are independent).
    """

    input_size = 2
    batch_size = 50
    metric = "mean squared error"
    spread = "multiplicative"

    def __init__(self, spec: AddingSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.baselines = {"always 1": 1 / 6}

    def encoder(self) -> nn.Module:
        return nn.Identity()

    def readout(self, output_size: int) -> nn.Module:
        return kaiming_linear(output_size, 1)

    def batch(self, step: int, size: int) -> Batch:
        if size > self.spec.train:
            raise SpecError("train.batch_size", str(size), f"1 to {self.spec.train}, the training sequences")
        values, marks = self._train
        epoch, index = divmod(step, len(values) // size)  # rows that do not fill a batch are skipped
        rows = self._order(epoch)[index * size : (index + 1) * size]
        return Batch(*sequences(values[rows], marks[rows]))

    def loss(self, model: Model, batch: Batch, carry: Tree | None) -> tuple[Tensor, Tree | None]:
        return nn.functional.mse_loss(predict(model, batch.inputs), batch.targets), None

    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        values, marks = self._draw(split, getattr(self.spec, split))
        total = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(len(values)).split(EVALUATION_ROWS):
            inputs, targets = sequences(values[rows], marks[rows])
            total += (predict(model, inputs) - targets).double().square().sum()
        return {self.metric: total.item() / len(values)}

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        return self._draw("train", self.spec.train)

    def _draw(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Return the values [count, T] and the two marked steps [count, 2] of a split."""
        random = generator(self.seed, "adding", split)
        length = self.spec.length
        half = max(1, length // 2 - 1)
        values = torch.rand(count, length, generator=random)
        first = torch.randint(0, half, (count,), generator=random)
        second = torch.randint(half, length, (count,), generator=random)
        return values, torch.stack((first, second), 1)

    def _order(self, epoch: int) -> Tensor:
        if epoch != self._epoch[0]:
            order = torch.randperm(self.spec.train, generator=generator(self.seed, "adding", "order", epoch))
            self._epoch = (epoch, order)
        return self._epoch[1]

    _epoch: tuple[int, Tensor] = (-1, torch.empty(0))


def sequences(values: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs [T, B, 2] and targets [B] for values [B, T] with marked steps `marks` [B, 2]."""
    marked = torch.zeros_like(values).scatter_(1, marks, 1.0)
    return torch.stack((values, marked), -1).transpose(0, 1).contiguous(), values.gather(1, marks).sum(1)


def predict(model: Model, inputs: Tensor) -> Tensor:
    """Return the prediction [B] at the last step."""
    y, _ = model.features(inputs)
    return model.readout(y[-1])[:, 0]
