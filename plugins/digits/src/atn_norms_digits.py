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
EVALUATION_ROWS = 500  # sequences per batch; fixed, so that a score does not depend on the training batch size


class DigitsSpec(an.TaskSpec):
    """Options of the digits task."""

    kind: Literal["digits"] = "digits"
    steps: Literal[8, 64] = Field(default=8, description="8: a row of 8 pixels a step; 64: one pixel a step")

    def build(self, seed: int) -> "Digits":
        return Digits(self, seed)

    def data(self) -> dict[str, str]:
        images, labels = pictures()
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        return {"images": "sha256:" + hashlib.sha256(content).hexdigest()}


class Digits(Task):
    r"""Classify an 8 x 8 image from the layer's output at the last step: cross-entropy loss, scored by accuracy.

    $$\mathrm{accuracy} = \frac{1}{N} \sum_{n=1}^{N} [\, \arg\max_c p_c(x_n) = c_n \,]$$

    Source of the images: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning
    Repository, the test part, included in scikit-learn. Reading an image as a sequence of pixels follows Le, Jaitly,
    Hinton, arXiv 1504.00941, who use larger images.

    | symbol | meaning | shape |
    |---|---|---|
    | inputs | grey values from 0 to 1, by rows or by pixels | `[8, B, 8]` or `[64, B, 1]` |
    | targets | digits | `[B]`, int64 |

    The splits have 1257 training, 180 validation and 360 test images, the same for every seed. The seed changes only
    the order of training. Baseline: always predict the most frequent digit of the training split.

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
        most_frequent = self.parts["train"][1].bincount(minlength=CLASSES).argmax()
        self.baselines = {"most frequent digit": (self.parts["test"][1] == most_frequent).double().mean().item()}

    def encoder(self) -> nn.Module:
        return nn.Identity()

    def readout(self, output_size: int) -> nn.Module:
        return nn.Linear(output_size, CLASSES)

    def batch(self, step: int, size: int) -> Batch:
        images, labels = self.parts["train"]
        if size > len(labels):
            raise SpecError("train.batch_size", str(size), f"1 to {len(labels)}, the training sequences")
        epoch, index = divmod(step, len(labels) // size)  # rows that do not fill a batch are skipped
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
        """Return images `[B, 64]` as sequences `[T, B, F]`."""
        return images.unflatten(-1, (self.spec.steps, -1)).transpose(0, 1).contiguous()

    def scores(self, model: Model, inputs: Tensor) -> Tensor:
        """Return the scores of the digits, `[B, 10]`, at the last step."""
        y, _ = model.features(inputs)
        return model.readout(y[-1])


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """Return all images `[1797, 64]`, grey values from 0 to 1, and their digits `[1797]`."""
    from sklearn.datasets import load_digits  # imported late: takes a second, which other kinds do not need

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / WHITE, torch.tensor(labels, dtype=torch.int64)


@an.hookimpl
def atn_norms_register(registry):
    registry.task(DigitsSpec)
