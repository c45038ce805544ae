"""Handwritten digits read as sequences: row by row, or pixel by pixel."""

import hashlib
from functools import cache
from typing import Any, Literal

import atn_norms as an
import torch
from atn_norms.registry import SpecError
from atn_norms.tasks import Batch, Model, Split, Task, generator
from pydantic import Field
from torch import Tensor, nn

SIDE, CLASSES, WHITE = 8, 10, 16.0
TEST, VALIDATION = 360, 180  # of 1797 images
EVALUATION_ROWS = 500  # sequences at a time: fixed, so that a score never depends on how training was batched


class DigitsSpec(an.TaskSpec):
    """Options of the digits."""

    kind: Literal["digits"] = "digits"
    steps: Literal[8, 64] = Field(default=8, description="8: a row of 8 pixels a step; 64: one pixel a step")

    def build(self, seed: int) -> "Digits":
        return Digits(self, seed)

    def data(self) -> dict[str, str]:
        images, labels = pictures()
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        return {"images": "sha256:" + hashlib.sha256(content).hexdigest()}


class Digits(Task):
    r"""Name the digit of an 8 x 8 image from the layer's output at the last step: cross-entropy, judged by accuracy.

    $$\mathrm{accuracy} = \frac{1}{N} \sum_{n=1}^{N} [\, \arg\max_c p_c(x_n) = c_n \,]$$

    Source of the images: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning
    Repository, the test part, as it comes with scikit-learn. Reading an image as a sequence of its pixels follows Le,
    Jaitly, Hinton, arXiv 1504.00941 (there with larger images).

    | symbol | meaning | shape |
    |---|---|---|
    | inputs | grey values from 0 to 1, by rows or by pixels | `[8, B, 8]` or `[64, B, 1]` |
    | targets | digits | `[B]`, int64 |

    1257 images train, 180 validate, 360 test; the parts are the same for every seed, which moves the order of training
    alone. Baseline: always the digit most frequent in training.

    >>> task = DigitsSpec(steps=64).build(seed=0)
    >>> task.batch(0, 20).inputs.shape
    torch.Size([64, 20, 1])
    """

    batch_size = 32
    metric = "accuracy"
    goal = "max"

    def __init__(self, spec: DigitsSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.input_size = SIDE * SIDE // spec.steps
        images, labels = pictures()
        order = torch.randperm(len(labels), generator=generator(0, "digits", "split"))
        test, validation, train = order.split([TEST, VALIDATION, len(labels) - TEST - VALIDATION])
        self.parts = {
            name: (images[rows], labels[rows])
            for name, rows in {"train": train, "validation": validation, "test": test}.items()
        }
        favourite = self.parts["train"][1].bincount(minlength=CLASSES).argmax()
        self.baselines = {"most frequent digit": (self.parts["test"][1] == favourite).double().mean().item()}

    def encoder(self) -> nn.Module:
        return nn.Identity()

    def readout(self, output_size: int) -> nn.Module:
        return nn.Linear(output_size, CLASSES)

    def batch(self, step: int, size: int) -> Batch:
        images, labels = self.parts["train"]
        if size > len(labels):
            raise SpecError(f"train.batch_size: {size} sequences of a training set of {len(labels)}")
        epoch, index = divmod(step, len(labels) // size)  # the odd rows of an epoch sit it out
        order = torch.randperm(len(labels), generator=generator(self.seed, "digits", "order", epoch))
        rows = order[index * size : (index + 1) * size]
        return Batch(self.sequences(images[rows]), labels[rows])

    def loss(self, model: Model, batch: Batch, carry: Any) -> tuple[Tensor, None]:
        return nn.functional.cross_entropy(self.scores(model, batch.inputs), batch.targets), None

    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        right, nats = 0, 0.0
        images, labels = self.parts[split]
        for some, wanted in zip(images.split(EVALUATION_ROWS), labels.split(EVALUATION_ROWS), strict=True):
            scores = self.scores(model, self.sequences(some))
            right += int((scores.argmax(-1) == wanted).sum())
            nats += nn.functional.cross_entropy(scores, wanted, reduction="sum").item()
        return {self.metric: right / len(labels), "cross-entropy": nats / len(labels)}

    def sequences(self, images: Tensor) -> Tensor:
        """Images `[B, 64]` as sequences, time first."""
        return images.unflatten(-1, (self.spec.steps, -1)).transpose(0, 1).contiguous()

    def scores(self, model: Model, inputs: Tensor) -> Tensor:
        """A score for each digit, from the last step."""
        y, _ = model.features(inputs)
        return model.readout(y[-1])


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """All images `[1797, 64]`, grey values from 0 to 1, and their digits `[1797]`."""
    from sklearn.datasets import load_digits  # takes a second to import, which no other kind should wait for

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / WHITE, torch.tensor(labels, dtype=torch.int64)


@an.hookimpl
def atn_norms_register(registry):
    registry.task(DigitsSpec)
