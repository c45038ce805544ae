"""Wrong tasks."""

from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.pytree import detach
from atn_norms.tasks import Batch, Model, Task, generator
from tests.testing.gallery.entry import wrong

STEPS = 5


class Sums(Task):
    """Correct: the sum of a short sequence, at its last step; state is passed from batch to batch."""

    input_size = 2
    batch_size = 8
    metric = "mean squared error"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.baselines = {"always 0": 1.0}

    def draw(self, *purpose: Any, size: int) -> Batch:
        inputs = torch.randn(STEPS, size, 2, generator=generator(self.seed, "sums", *purpose))
        return Batch(inputs, inputs.sum((0, 2)))

    def encoder(self) -> nn.Module:
        return nn.Linear(2, 2)

    def readout(self, output_size: int) -> nn.Module:
        return nn.Linear(output_size, 1)

    def batch(self, step: int, size: int) -> Batch:
        return self.draw("train", step, size=size)._replace(fresh=step % 4 == 0)

    def loss(self, model: Model, batch: Batch, carry: Any) -> tuple[Tensor, Any]:
        y, state = model(batch.inputs, None if batch.fresh else carry)
        return (y[-1, :, 0] - batch.targets).square().mean(), detach(state)

    def evaluate(self, model: Model, split: str) -> dict[str, float]:
        batch = self.draw(split, size=32)
        return {self.metric: self.loss(model, batch, None)[0].item()}


@wrong("it_builds")
class NeedsAFile(Sums):
    """Reads a missing file and raises the error of `open`."""

    def __init__(self, seed: int) -> None:
        raise FileNotFoundError("sums.txt")


@wrong("batches_are_pure")
class DrawsFromTheGlobalGenerator(Sums):
    """Draws its batches from torch's global generator."""

    def draw(self, *purpose: Any, size: int) -> Batch:
        inputs = torch.randn(STEPS, size, 2)
        return Batch(inputs, inputs.sum((0, 2)))


@wrong("batches_are_pure")
class CountsItsBatches(Sums):
    """Iterates over its data and ignores the requested step."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls = 0

    def batch(self, step: int, size: int) -> Batch:
        self.calls += 1
        return super().batch(self.calls, size)._replace(fresh=step == 0)


@wrong("a_seed_draws_its_own_data")
class IgnoresTheSeed(Sums):
    """Draws the same data for every seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(0)


@wrong("modules_are_fresh")
class SharesItsReadout(Sums):
    """Builds one readout and shares it among all models."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.made: nn.Module | None = None

    def readout(self, output_size: int) -> nn.Module:
        self.made = self.made or nn.Linear(output_size, 1)
        return self.made


@wrong("a_model_fits")
class EncodesToAnotherSize(Sums):
    """Declares a different size from that of its encoder, so the input does not fit the layer."""

    def encoder(self) -> nn.Module:
        return nn.Linear(2, 3)


@wrong("a_model_fits")
class HasNoBaselines(Sums):
    """Has no baseline of a trivial predictor."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.baselines = {}


@wrong("a_model_fits")
class DoesNotTrainItsEncoder(Sums):
    """Detaches the encoded input."""

    def loss(self, model: Model, batch: Batch, carry: Any) -> tuple[Tensor, Any]:
        y, state = model.layer.unroll(model.encoder(batch.inputs).detach())
        return (model.readout(y)[-1, :, 0] - batch.targets).square().mean(), detach(state)


@wrong("evaluation_repeats_itself")
class EvaluatesASample(Sums):
    """Scores a random part of the split."""

    def evaluate(self, model: Model, split: str) -> dict[str, float]:
        batch = self.draw(split, size=32)
        rows = torch.randperm(32)[:16]
        return {self.metric: self.loss(model, Batch(batch.inputs[:, rows], batch.targets[rows]), None)[0].item()}


@wrong("evaluation_repeats_itself")
class EvaluatesWithWhatTrainingLeft(Sums):
    """Scores in batches of the last training size, and averages them without weights."""

    size = 8

    def batch(self, step: int, size: int) -> Batch:
        self.size = size
        return super().batch(step, size)

    def evaluate(self, model: Model, split: str) -> dict[str, float]:
        batch = self.draw(split, size=31)
        parts = zip(batch.inputs.split(self.size, 1), batch.targets.split(self.size), strict=True)
        scores = [self.loss(model, Batch(*part), None)[0].item() for part in parts]
        return {self.metric: sum(scores) / len(scores)}


@wrong("evaluation_repeats_itself")
class TrainsWhileItEvaluates(Sums):
    """Adapts the shift of the readout to the evaluated split."""

    def evaluate(self, model: Model, split: str) -> dict[str, float]:
        scores = super().evaluate(model, split)
        with torch.no_grad():
            next(iter(model.readout.parameters())).mul_(0.99)
        return scores


@wrong("the_splits_differ")
class TestsOnValidation(Sums):
    """Uses the validation split as the test split."""

    def evaluate(self, model: Model, split: str) -> dict[str, float]:
        return super().evaluate(model, "validation")


@wrong("the_carried_state_is_detached")
class CarriesTheGraph(Sums):
    """Carries state that still belongs to the graph of the last batch."""

    def loss(self, model: Model, batch: Batch, carry: Any) -> tuple[Tensor, Any]:
        y, state = model(batch.inputs, None if batch.fresh else carry)
        return (y[-1, :, 0] - batch.targets).square().mean(), state


@wrong("a_step_downhill_lowers_the_loss")
class ChasesItsPrediction(Sums):
    """Reports the error and trains another loss: the gradient is that of the prediction alone."""

    def loss(self, model: Model, batch: Batch, carry: Any) -> tuple[Tensor, Any]:
        y, state = model(batch.inputs, None if batch.fresh else carry)
        error = (y[-1, :, 0] - batch.targets).square().mean()
        return error.detach() + error - 2 * error + error.detach(), detach(state)
