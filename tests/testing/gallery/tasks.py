"""Wrong tasks."""

from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.pytree import detach
from atn_norms.tasks import Batch, Model, Task, generator
from tests.testing.gallery.entry import wrong

STEPS = 5


class Sums(Task):
    """Right: the sum of a short sequence, at its last step; state is carried from batch to batch."""

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
    """Reads a file that is not there, and says so with whatever `open` raises."""

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
    """Goes through its data by an iterator and takes no notice of the step it is asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked = 0

    def batch(self, step: int, size: int) -> Batch:
        self.asked += 1
        return super().batch(self.asked, size)._replace(fresh=step == 0)


@wrong("a_seed_draws_its_own_data")
class IgnoresTheSeed(Sums):
    """Draws the same data for every seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(0)


@wrong("modules_are_fresh")
class SharesItsReadout(Sums):
    """Makes one read-out and gives it to every model."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.made: nn.Module | None = None

    def readout(self, output_size: int) -> nn.Module:
        self.made = self.made or nn.Linear(output_size, 1)
        return self.made


@wrong("a_model_fits")
class EncodesToAnotherSize(Sums):
    """Declares another size than its encoder has: the layer is built for the one and given the other."""

    def encoder(self) -> nn.Module:
        return nn.Linear(2, 3)


@wrong("a_model_fits")
class HasNoBaselines(Sums):
    """Names no trivial predictor to be compared with."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.baselines = {}


@wrong("a_model_fits")
class DoesNotTrainItsEncoder(Sums):
    """Detaches what it encodes."""

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
    """Scores in batches of the size that training last used, and averages them without their sizes."""

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
    """Adapts the read-out's shift to the split it is scored on."""

    def evaluate(self, model: Model, split: str) -> dict[str, float]:
        scores = super().evaluate(model, split)
        with torch.no_grad():
            next(iter(model.readout.parameters())).mul_(0.99)
        return scores


@wrong("the_splits_are_two")
class TestsOnValidation(Sums):
    """Takes the validation split for the test split."""

    def evaluate(self, model: Model, split: str) -> dict[str, float]:
        return super().evaluate(model, "validation")


@wrong("what_is_carried_is_detached")
class CarriesTheGraph(Sums):
    """Carries state that still belongs to the last batch's graph."""

    def loss(self, model: Model, batch: Batch, carry: Any) -> tuple[Tensor, Any]:
        y, state = model(batch.inputs, None if batch.fresh else carry)
        return (y[-1, :, 0] - batch.targets).square().mean(), state


@wrong("a_step_downhill_lowers_the_loss")
class ChasesItsPrediction(Sums):
    """Reports the error and trains something else: the gradient is that of the prediction alone."""

    def loss(self, model: Model, batch: Batch, carry: Any) -> tuple[Tensor, Any]:
        y, state = model(batch.inputs, None if batch.fresh else carry)
        error = (y[-1, :, 0] - batch.targets).square().mean()
        return error.detach() + error - 2 * error + error.detach(), detach(state)
