"""Laws of a task: data follow from options and seed, the loss trains, the score depends on the model alone."""

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
    """`batch(step, size)` returns the same at every call, from every build of the task, and draws no random number.

    An interrupted trial resumes in the middle, and another machine repeats it: a batch must not depend on earlier
    calls. Torch's global generator draws the weights. A draw by the data would change the model.
    """
    task, size = subject.task, subject.size
    before = torch.get_rng_state()
    first = [task.batch(step, size) for step in (0, 1, 5)]
    task.batch(11, 2)
    demand(torch.equal(torch.get_rng_state(), before), "batch draws from torch's global generator")
    again = [task.batch(step, size) for step in (5, 1, 0)][::-1]
    torch.manual_seed(12345)
    rebuilt = subject.spec.build(0)
    other = [rebuilt.batch(step, size) for step in (0, 1, 5)]
    for name, batches in (("of a second call", again), ("of another build", other)):
        compare([tuple(b) for b in batches], [tuple(b) for b in first], tolerance=0, what=f"batches {name}")


@law(
    "task",
    unless=lambda subject: "data() lists files, and a seed does not change them" if subject.spec.data() else None,
)
def a_seed_draws_its_own_data(subject: TaskSubject) -> None:
    """Another seed gives other batches, unless the data are read from files.

    Seeds are repetitions of an experiment. If all seeds see the same data, the spread between them is too small.
    """
    mine, theirs = (subject.spec.build(seed).batch(0, subject.size) for seed in (0, 1))
    same = mine.inputs.shape == theirs.inputs.shape and torch.equal(mine.inputs, theirs.inputs)
    demand(not (same and torch.equal(mine.targets, theirs.targets)), "seeds 0 and 1 give the same batch")


@law("task")
def modules_are_fresh(subject: TaskSubject) -> None:
    """`encoder` and `readout` return new modules at each call, drawn from torch's global generator alone.

    Two models that share a module train each other. A trial seeds that generator to draw its weights.
    """
    one, two = subject.model(), subject.model()
    shared = {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    demand(not shared, f"{len(shared)} parameters belong to two models at once")
    compare(dict(one.state_dict()), dict(two.state_dict()), tolerance=0, what="a model of the same seed")


@law("task")
def a_model_fits(subject: TaskSubject) -> None:
    """The encoder returns `[T, B, input_size]`, the loss is finite and reaches every parameter, baselines are finite.

    The training loop requires nothing else of a task, and a report compares every score with the baselines.
    """
    task, model, size = subject.task, subject.model(), subject.size
    batch = task.batch(0, size)
    demand(batch.fresh, "batch(0).fresh: got False; expected True")
    encoded = model.encoder(batch.inputs)
    shape = [batch.inputs.shape[0], size, task.input_size]
    demand(list(encoded.shape) == shape, f"encoder: got shape {list(encoded.shape)}; expected {shape}")
    loss, _ = task.loss(model, batch, None)
    demand(loss.ndim == 0 and bool(loss.isfinite()), f"loss: got {loss.detach()}; expected one finite number")
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    demand(not missing, f"the loss does not reach {', '.join(missing)}")
    scores = list(task.baselines.values())
    fine = bool(scores) and all(isinstance(score, float) and math.isfinite(score) for score in scores)
    demand(fine, f"baselines: got {task.baselines}; expected at least one, each a finite number")


@law("task")
def evaluation_repeats_itself(subject: TaskSubject) -> None:
    """A score is finite and the same at every call, and leaves the model and torch's generator unchanged.

    A score depends on the model and the split alone. Scores cannot be compared if they depend on the batches of
    training, or if evaluation trains on the test split.
    """
    task, model = subject.task, subject.model().eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    first = _score(subject, model, "validation")
    task.batch(3, 2)
    torch.rand(1)
    again = _score(subject, model, "validation")
    demand(first == again, f"validation: got the score {again} at a second call; expected {first}")
    demand(math.isfinite(first), f"validation: got the score {first}; expected a finite number")
    compare(dict(model.state_dict()), kept, tolerance=0, what="the model after evaluation")
    torch.set_rng_state(before)
    _score(subject, model, "validation")
    demand(torch.equal(torch.get_rng_state(), before), "evaluate draws from torch's global generator")


@law("task")
def the_splits_differ(subject: TaskSubject) -> None:
    """Validation and test are different data.

    A model is selected on the validation split and evaluated on the test split.
    """
    model = subject.model().eval()
    scores = [_scores(subject, model, split) for split in SPLITS]
    demand(scores[0] != scores[1], f"a new model has exactly the same scores on both splits: {scores[0]}")


def _score(subject: TaskSubject, model: Model, split: str) -> float:
    return _scores(subject, model, split)[subject.task.metric]


def _scores(subject: TaskSubject, model: Model, split: str) -> dict[str, float]:
    with torch.no_grad():
        scores = subject.task.evaluate(model, split)  # type: ignore[arg-type]
    known = ", ".join(scores)
    demand(
        subject.task.metric in scores, f"evaluate: got {known}; expected the metric {subject.task.metric!r} among them"
    )
    return scores


@law("task")
def the_carried_state_is_detached(subject: TaskSubject) -> None:
    """The state that one batch passes to the next is detached, and the next batch can be trained from it.

    Otherwise the second backward pass runs through the first batch again. The result is an error, or memory that grows
    with every step.
    """
    task, model = subject.task, subject.model()
    carry = None
    for step in range(3):
        loss, carry = task.loss(model, task.batch(step, subject.size), carry)
        demand(bool(loss.isfinite()), f"the loss of step {step} is {loss.item()}")
        for leaf in tree_leaves(carry) if carry is not None else ():
            demand(not leaf.requires_grad, "carry: got a tensor with a graph; expected detached tensors")
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@law("task")
def a_step_downhill_lowers_the_loss(subject: TaskSubject) -> None:
    """A small step against the gradient lowers the loss of the same batch.

    A wrong sign, a detached prediction or a target that moves with the model would mislead every optimizer.
    """
    task, model = subject.task, subject.model()
    batch = task.batch(0, subject.size)

    def loss() -> torch.Tensor:
        torch.manual_seed(0)  # an encoder may contain dropout
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
