"""Laws of a task: its data follow from options and seed, its loss trains, its score is a property of the model."""

from __future__ import annotations

import math

import torch

from atn_norms.pytree import tree_leaves
from atn_norms.tasks import Model
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import law
from atn_norms.testing.tasked import TaskSubject

SPLITS = ("validation", "test")


@law("task")
def batches_are_pure(subject: TaskSubject) -> None:
    """`batch(step, size)` is the same whenever it is asked, by whichever build of the task, and draws nothing.

    A killed trial resumes in the middle, another machine repeats it: the batches must not depend on what was asked
    before. Torch's global generator belongs to the weights, and a draw from it makes the model depend on the data.
    """
    task, size = subject.task, subject.size
    before = torch.get_rng_state()
    first = [task.batch(step, size) for step in (0, 1, 5)]
    task.batch(11, 2)
    demand(torch.equal(torch.get_rng_state(), before), "batch draws from torch's global generator")
    again = [task.batch(step, size) for step in (5, 1, 0)][::-1]
    torch.manual_seed(12345)
    anew = subject.spec.build(0)
    other = [anew.batch(step, size) for step in (0, 1, 5)]
    for name, batches in (("asked again", again), ("of another build", other)):
        compare([tuple(b) for b in batches], [tuple(b) for b in first], tolerance=0, what=f"batches {name}")


@law(
    "task",
    unless=lambda subject: "data() names what it reads, which no seed changes" if subject.spec.data() else None,
)
def a_seed_draws_its_own_data(subject: TaskSubject) -> None:
    """Another seed gives other batches, where the data are drawn and not read.

    Seeds are repetitions of an experiment; if all of them see the same data, the spread between them is too small.
    """
    mine, theirs = (subject.spec.build(seed).batch(0, subject.size) for seed in (0, 1))
    same = mine.inputs.shape == theirs.inputs.shape and torch.equal(mine.inputs, theirs.inputs)
    demand(not (same and torch.equal(mine.targets, theirs.targets)), "seeds 0 and 1 give the same batch")


@law("task")
def modules_are_fresh(subject: TaskSubject) -> None:
    """`encoder` and `readout` make new modules at each call, drawn from torch's global generator alone.

    Two models that share a module train each other, and a trial draws its weights by seeding that generator.
    """
    one, two = subject.model(), subject.model()
    shared = {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    demand(not shared, f"{len(shared)} parameters belong to two models at once")
    compare(dict(one.state_dict()), dict(two.state_dict()), tolerance=0, what="a model of the same seed")


@law("task")
def a_model_fits(subject: TaskSubject) -> None:
    """Encoder, loss and baselines are what they are said to be: `[T, B, input_size]`, a finite scalar that reaches
    every parameter, and finite scores of trivial predictors.

    The training loop asks nothing else of a task, and a report compares every score with the baselines.
    """
    task, model, size = subject.task, subject.model(), subject.size
    batch = task.batch(0, size)
    demand(batch.fresh, "the first batch does not start afresh")
    encoded = model.encoder(batch.inputs)
    wanted = [batch.inputs.shape[0], size, task.input_size]
    demand(list(encoded.shape) == wanted, f"the encoder gives {list(encoded.shape)}; allowed: {wanted}")
    loss, _ = task.loss(model, batch, None)
    demand(loss.ndim == 0 and bool(loss.isfinite()), f"the loss is {loss.detach()}; allowed: one finite number")
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    demand(not missing, f"the loss does not reach {', '.join(missing)}")
    scores = list(task.baselines.values())
    fine = bool(scores) and all(isinstance(score, float) and math.isfinite(score) for score in scores)
    demand(fine, f"baselines: {task.baselines}; allowed: at least one, each a finite number")


@law("task")
def evaluation_repeats_itself(subject: TaskSubject) -> None:
    """A score is finite, the same when asked again, and leaves the model and torch's generator as they were.

    It is a property of the model and the split. One that depends on how training was batched, or that trains a little
    on the test split, cannot be compared.
    """
    task, model = subject.task, subject.model().eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    first = _score(subject, model, "validation")
    task.batch(3, 2)
    torch.rand(1)
    again = _score(subject, model, "validation")
    demand(first == again, f"validation scores {first}, and asked again {again}")
    demand(math.isfinite(first), f"validation scores {first}")
    compare(dict(model.state_dict()), kept, tolerance=0, what="the model after evaluation")
    torch.set_rng_state(before)
    _score(subject, model, "validation")
    demand(torch.equal(torch.get_rng_state(), before), "evaluate draws from torch's global generator")


@law("task")
def the_splits_are_two(subject: TaskSubject) -> None:
    """Validation and test are different data.

    A model is chosen by the one and judged by the other.
    """
    model = subject.model().eval()
    scores = [_scores(subject, model, split) for split in SPLITS]
    demand(scores[0] != scores[1], f"a fresh model scores {scores[0]} on both splits, to the last digit")


def _score(subject: TaskSubject, model: Model, split: str) -> float:
    return _scores(subject, model, split)[subject.task.metric]


def _scores(subject: TaskSubject, model: Model, split: str) -> dict[str, float]:
    with torch.no_grad():
        scores = subject.task.evaluate(model, split)  # type: ignore[arg-type]
    known = ", ".join(scores)
    demand(subject.task.metric in scores, f"evaluate gives {known}, and the metric is {subject.task.metric!r}")
    return scores


@law("task")
def what_is_carried_is_detached(subject: TaskSubject) -> None:
    """What one batch hands to the next is cut out of its graph, and the next batch can be trained from it.

    Otherwise the second backward pass runs through the first batch again: an error, or memory that grows with every
    step.
    """
    task, model = subject.task, subject.model()
    carry = None
    for step in range(3):
        loss, carry = task.loss(model, task.batch(step, subject.size), carry)
        demand(bool(loss.isfinite()), f"the loss of step {step} is {loss.item()}")
        for leaf in tree_leaves(carry) if carry is not None else ():
            demand(not leaf.requires_grad, "what is carried holds on to the graph; allowed: detached tensors")
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@law("task")
def a_step_downhill_lowers_the_loss(subject: TaskSubject) -> None:
    """A small step against the gradient lowers the loss of the same batch.

    A wrong sign, a detached prediction or a target that moves along would make every optimizer train something else.
    """
    task, model = subject.task, subject.model()
    batch = task.batch(0, subject.size)

    def loss() -> torch.Tensor:
        torch.manual_seed(0)  # an encoder may drop out
        return task.loss(model, batch, None)[0]

    start = loss()
    parameters = list(model.parameters())
    gradients = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(start, parameters, allow_unused=True), strict=True
        )
    ]
    length = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    demand(float(length) > 0, "the gradient of the loss is 0 everywhere")
    reached = []
    for step in (1e-2, 1e-3):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= step * gradient / length
            reached.append(loss().item())
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += step * gradient / length
    demand(min(reached) < start.item(), f"a loss of {start.item():.6g} becomes {min(reached):.6g} downhill")
