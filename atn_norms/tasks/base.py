"""The protocol of a task: inputs and targets, the loss, and the score."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from atn_norms.options import Options
from atn_norms.pytree import Tree

Split = Literal["validation", "test"]


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a separate random generator for each purpose of one seed, so that draws are independent.

    | symbol | meaning |
    |---|---|
    | `seed` | the trial's seed |
    | `purpose` | use of the numbers, such as `"train"` and an epoch |

    >>> a, b, c = (torch.rand(1, generator=generator(0, *p)).item() for p in [("train", 1), ("train", 1), ("test",)])
    >>> a == b, a == c
    (True, False)
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def kaiming_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a read-out initialized as in arXiv 2209.14439: Kaiming normal weight, zero bias."""
    linear = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Batch(NamedTuple):
    """The data of one training step: `inputs` [T, B, ...] and `targets`; `fresh` is True where sequences start.

    `lengths` [B] are the steps of each sequence if they differ; the inputs after them are padding.
    """

    inputs: Tensor
    targets: Tensor
    fresh: bool = True
    lengths: Tensor | None = None


class Model(nn.Module):
    """Encoder, recurrent layer and read-out: map inputs [T, B, ...] to outputs [T, B, ...] and the next state.

    `layer` is a `Recurrent` (time first); `state` is its nested tuple of tensors, None at the start of a sequence.
    """

    def __init__(self, encoder: nn.Module, layer: Any, readout: nn.Module) -> None:
        super().__init__()
        self.encoder, self.layer, self.readout = encoder, layer, readout

    def features(self, inputs: Tensor, state: Tree | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tree]:
        """Return the layer's outputs [T, B, output_size], before the read-out, and its next state.

        With `lengths` [B], the steps of a row after its length are padding, with outputs 0.
        """
        return self.layer.unroll(self.encoder(inputs), state, lengths)

    def forward(self, inputs: Tensor, state: Tree | None = None) -> tuple[Tensor, Tree]:
        """Return the predictions of the read-out, and the next state."""
        y, state = self.features(inputs, state)
        return self.readout(y), state


class Task(ABC):
    """A problem for one seed: training batches, and two splits for scores.

    | symbol | meaning |
    |---|---|
    | `input_size` | features of the encoder's output per step |
    | `batch_size` | sequences per training step unless the study names a number |
    | `metric` | name and unit of the score |
    | `goal` | `"min"` if a smaller score is better, such as a loss; `"max"` if a larger score is better |
    | `spread` | `"multiplicative"` if scores of different seeds differ by factors and are compared as logarithms; otherwise `"additive"` |
    | `metric_per_loss` | units of the metric per unit of `loss`, for `in_metric` |
    | `baselines` | scores of trivial predictors on the test split: name -> value of the metric |
    | `notes` | sentences about the data, such as the number of missing values |
    | `preprocessing` | what a program needs to use a trained model on new data, such as the scaling of columns, as JSON; saved with the model |

    Everything is a pure function of the options, the seed and the arguments: `batch(step, size)` gives the same batch
    at every call, so that a killed trial resumes bit for bit.
    """  # noqa: E501

    input_size: int
    batch_size: int
    metric: str
    goal: Literal["min", "max"] = "min"
    spread: Literal["additive", "multiplicative"] = "additive"
    metric_per_loss: float = 1.0
    baselines: dict[str, float]
    notes: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = {}

    def in_metric(self, loss: float) -> float:
        """Convert a mean training loss to units of the metric, for the training curve."""
        return loss * self.metric_per_loss

    @abstractmethod
    def encoder(self) -> nn.Module:
        """Return a new module from inputs [T, B, ...] to [T, B, input_size], drawn from torch's global generator."""

    @abstractmethod
    def readout(self, output_size: int) -> nn.Module:
        """Return a new module from the layer's outputs to predictions, drawn from torch's global generator."""

    def share(self, model: Model) -> None:
        """Share weights between parts of a new model; the default shares none."""
        return

    @abstractmethod
    def batch(self, step: int, size: int) -> Batch:
        """Return the batch of training step `step` = 0, 1, ... with `size` sequences."""

    def rate(self, step: int, size: int) -> float:
        """Return the factor of the learning rate at a training step with `size` sequences."""
        return 1.0

    @abstractmethod
    def loss(self, model: Model, batch: Batch, carry: Tree | None) -> tuple[Tensor, Tree | None]:
        """Return the loss of a batch, and the detached state for the next batch (None if no state is carried)."""

    @abstractmethod
    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        """Score a model, in evaluation mode and without gradients, on a whole split: `{metric: value, ...}`."""


class TaskSpec(Options, ABC):
    """Options of a task: a frozen pydantic model with a `kind`, which builds the task for a seed.

    `recommended` holds options of a study's `train` section that apply unless the study names them.
    """

    family: ClassVar[str | None] = "task"
    recommended: ClassVar[Mapping[str, Any]] = {}
    kind: str

    @abstractmethod
    def build(self, seed: int) -> Task:
        """Return the task of these options for one seed."""

    def data(self) -> dict[str, str]:
        """Return content hashes of the data: option -> `sha256:...`; empty for a synthetic task.

        The identity of a trial contains these hashes instead of the options, so a file may move.
        Errors: `SpecError` naming the option and the file that cannot be read.
        """
        return {}

    def unsupported_reason(self, layer: Any) -> str | None:
        """Return why this task cannot train a layer (a `LayerSpec`), in one sentence, or None."""
        return None
