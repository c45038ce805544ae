"""Train one trial from its JSON alone: deterministic, and resumed from its checkpoint with identical bits."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from atn_norms.ablation.execution.environment import processor
from atn_norms.ablation.execution.fitting import BadState, check_state, load_optimizer
from atn_norms.ablation.execution.function import Diverged, OnStep, changed_data, run_function
from atn_norms.ablation.grid import optimizers
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.grid.plan import VERSION
from atn_norms.ablation.grid.resolve import TASK
from atn_norms.ablation.grid.schedules import Improvement, Rate
from atn_norms.ablation.grid.sources import CURE, describe_changes, plugin_sources
from atn_norms.ablation.store.checkpoints import is_of_the_machine
from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.records import model_builder
from atn_norms.ablation.store.trial import TrialFolder, keeps_model
from atn_norms.errors import plural
from atn_norms.layers import LayerSpec
from atn_norms.layers.io import to_bytes
from atn_norms.normalizers import BatchNorm, Normalizer
from atn_norms.pytree import Tree
from atn_norms.registry import SpecError
from atn_norms.tasks import Model, Split, generator

MOST_LOST = 60.0  # seconds of training that a kill may cost, for any `checkpoint_every`
SAVING = 20.0  # least time between such checkpoints, as a multiple of the time to write one


class Trainer:
    """A trial in memory: `advance` takes one training step; `restore` continues from a `state` with identical bits.

    Trials of equal seed and sizes start from equal weights, with any normalizer. The initial weights are drawn from the
    seed in the order encoder, layer, read-out, and a normalizer draws nothing. The trainer uses torch's global
    generator; wrap it in `isolated` to keep the generator's state.
    """

    def __init__(self, trial: dict[str, Any]) -> None:
        if trial["version"] != VERSION:
            expected = f"{VERSION}, since this program cannot train others"
            raise SpecError("version", str(trial["version"]), expected)
        self.train, seed = trial["train"], trial["seed"]
        spec = TASK.validate_python(trial["task"])
        for option, content in trial["data"].items():
            if spec.data()[option] != content:
                raise changed_data(option)
        layer_spec = LayerSpec.model_validate(trial["model"])
        if changes := describe_changes(trial.get("plugins", {}), plugin_sources(layer_spec, spec)):
            raise SpecError("plugins", detail=f"{changes}. {CURE}")
        torch.set_num_threads(self.train["threads"])
        self.task = spec.build(seed)
        torch.set_rng_state(generator(seed, "weights").get_state())
        encoder = self.task.encoder()
        layer = layer_spec.build()
        self.model = Model(encoder, layer, self.task.readout(layer.output_size))
        self.task.share(self.model)
        torch.set_rng_state(generator(seed, "training").get_state())
        self.optimizer = optimizers.make(self.train["optimizer"], list(self.model.parameters()))
        self.rate = Rate(self.train["schedule"], self.train["steps"], self.optimizer)
        self.step = 0
        self.carry: Tree | None = None
        self.first: float | None = None  # loss of the first step, by which divergence is measured
        self.summed, self.count = 0.0, 0  # losses since the last point of the curve
        self.watch = Improvement()
        self.kept: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """True where every training step has been taken, or `patience` has run out."""
        return self.step >= self.train["steps"] or self.stopped

    @property
    def stopped(self) -> bool:
        """True after `patience` consecutive validations without improvement."""
        return self.train["patience"] is not None and self.watch.since >= self.train["patience"]

    @property
    def needs_best(self) -> bool:
        """True where the weights of the best validation are scored or saved."""
        return "best" in (self.train["keep"], keeps_model(self.train))

    def advance(self) -> dict[str, Any] | None:
        """Take one training step; return a point of the learning curve every `log_every` and `eval_every` steps.

        Errors: `Diverged` where a loss or a score is not finite, or the loss has grown beyond `divergence_factor`.
        """
        self.model.train()
        self.rate.set(self.step, self.task.rate(self.step, self.train["batch_size"]))
        batch = self.task.batch(self.step, self.train["batch_size"])
        self.optimizer.zero_grad(set_to_none=True)
        loss, self.carry = self.task.loss(self.model, batch, self.carry)
        loss.backward()
        if self.train["clip_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train["clip_grad_norm"])
        self.optimizer.step()
        self.step += 1
        value = _finite(loss.item(), "training loss")
        self.first = value if self.first is None else self.first
        self.summed += value
        self.count += 1
        return self._line()

    def _line(self) -> dict[str, Any] | None:
        validate = self.step >= self.train["steps"] or self.step % self.train["eval_every"] == 0
        if not validate and self.step % self.train["log_every"]:
            return None
        loss = self.summed / self.count
        self._refuse_divergence(loss)
        score = self._validate() if validate else None
        self.summed, self.count = 0.0, 0
        in_metric = _finite(self.task.in_metric(loss), f"training {self.task.metric}")
        return {"step": self.step, "train_loss": in_metric, "validation": score}

    def _refuse_divergence(self, loss: float) -> None:
        most = self.train["divergence_factor"]
        if most is not None and self.first is not None and loss > most * abs(self.first) > 0:
            raise Diverged(f"the training loss is {loss:.3g}, over {most:g} times what it was at first")

    def _validate(self) -> float:
        score = self.evaluate("validation")[self.task.metric]
        cost = score if self.task.goal == "min" else -score
        self.rate.see(cost)
        if self.watch.see(cost) and self.needs_best:
            self.kept = {name: each.clone() for name, each in self.model.state_dict().items()}
        return score

    def evaluate(self, split: Split) -> dict[str, float]:
        """Score the model on a split; `Diverged` where the score is not finite."""
        with self._renewed_populations():
            return self._score(split)

    def conclude(self) -> dict[str, dict[str, float]]:
        """Score the weights of `keep` on both splits; `Diverged` where a score is not finite."""
        with self._weights(self.train["keep"]), self._renewed_populations():
            return {split: self._score(split) for split in ("validation", "test")}

    def saved(self) -> bytes | None:
        """Return the content of `model.safetensors`: the weights of `keep_model`, with their populations."""
        if (which := keeps_model(self.train)) == "none":
            return None
        with self._weights(which), self._renewed_populations():
            return to_bytes(self.model.eval(), self.task.preprocessing)

    @contextmanager
    def _weights(self, which: str) -> Iterator[None]:
        """Load the weights of the best validation where `which` is `best`, and afterwards the last weights."""
        if which != "best" or self.kept is None:
            yield
            return
        last = {name: each.clone() for name, each in self.model.state_dict().items()}
        self.model.load_state_dict(self.kept)
        try:
            yield
        finally:
            self.model.load_state_dict(last)

    def _score(self, split: Split) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            scores = self.task.evaluate(self.model, split)
        return {name: _finite(value, f"{split} {name}") for name, value in scores.items()}

    @contextmanager
    def _renewed_populations(self) -> Iterator[None]:
        """Compute the populations of these weights on the first training batches; afterwards restore the earlier ones.

        A `BatchNorm` starts from an empty population and averages these batches with equal weights. Any other norm with
        `train_eval_differ` updates its population as in training.
        """
        count = self.train.get("population_batches", 0)
        norms = [each for each in self.model.modules() if isinstance(each, Normalizer) and each.train_eval_differ]
        if not (count and norms):
            yield
            return
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        momenta = [(norm, norm.momentum) for norm in norms if isinstance(norm, BatchNorm)]
        try:
            for norm, _ in momenta:
                norm.momentum = None
                norm.num_batches_tracked.zero_()
            self.model.train()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                carry = None
                for step in range(count):
                    _, carry = self.task.loss(self.model, self.task.batch(step, self.train["batch_size"]), carry)
            yield
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum
            for buffer, old in before:
                buffer.copy_(old)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rate": self.rate.state(),
            "carry": self.carry,
            "random": torch.get_rng_state(),
            "first": self.first,
            "summed": self.summed,
            "count": self.count,
            "best": self.watch.best,
            "since": self.watch.since,
            "kept": self.kept,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load a `state`.

        Errors: `BadState` where the state belongs to another trial; an error of the machine, such as `MemoryError`. The
        trainer cannot be used after either.
        """
        try:
            check_state(state, self.train["steps"], self.state(), self.needs_best)
            load_optimizer(self.optimizer, state["optimizer"])
            self.model.load_state_dict(state["model"])
            self.rate.restore(state["rate"])
            self.step, self.carry = state["step"], state["carry"]
            self.first, self.summed, self.count = state["first"], state["summed"], state["count"]
            self.watch.best, self.watch.since = state["best"], state["since"]
            self.kept = state["kept"] if self.needs_best else None  # later checkpoints would hold outdated weights
            torch.set_rng_state(state["random"])
        except BadState:
            raise
        except Exception as error:  # torch raises exceptions of many types for a state of another model
            if is_of_the_machine(error):
                raise
            raise BadState(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def run_trial(folder: TrialFolder, on_step: OnStep | None = None, versions: dict[str, str] | None = None) -> str:
    """Train the trial of a folder to its end, from its checkpoint if it has one; return the outcome.

    `on_step` is called after each step with the number of steps taken; an exception that it raises ends the attempt.
    A trial that is done already is not changed.

    Errors: `Busy` while another process trains it; `StoreError` and `SpecError` naming the file or option; every
    exception of a plugin.
    """
    with folder.lock():
        folder.tidy()
        done = folder.result()
        if done is not None:
            return done["outcome"]
        trial = folder.trial()
        run = folder.run()
        if not run and (folder.path / "run.json").exists():
            folder.log("run.json is damaged; attempts and seconds are counted from 0")
        before = run.get("seconds", 0.0)
        started = time.monotonic()
        run |= {
            "attempts": run.get("attempts", 0) + 1,
            "started": run.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": before,
            "host": platform.node(),
            "processor": "; ".join(dict.fromkeys([*filter(None, [run.get("processor")]), processor()])),
            "process": os.getpid(),
            "versions": versions or {},
        }
        folder.write_run(run)

        def note_time() -> None:
            run["seconds"] = round(before + time.monotonic() - started, 3)
            folder.write_run(run)

        with isolated(), warnings.catch_warnings():
            warnings.showwarning = lambda message, category, *where: folder.log(f"{category.__name__}: {message}")
            train = run_function if is_function(trial["task"]) else _train
            try:
                result = train(folder, trial, on_step, note_time)
            except BaseException:
                with suppress(StoreError):  # the first error is the reason
                    note_time()
                raise
        note_time()
        folder.finish(result)
        folder.log(
            f"{result['outcome']} after step {result['step']}, {run['seconds']} s in {run['attempts']} attempt(s)"
        )
        return result["outcome"]


def _train(
    folder: TrialFolder, trial: dict[str, Any], on_step: OnStep | None, on_saved: Callable[[], None]
) -> dict[str, Any]:
    trainer = _resumed(folder, trial)
    folder.log(f"attempt on {platform.node()} starts at step {trainer.step} of {trial['train']['steps']}")
    result: dict[str, Any] = {"trial": folder.id, "outcome": "finished", "step": 0, "metrics": {}}
    due = time.monotonic() + MOST_LOST
    try:
        while not trainer.finished:
            line = trainer.advance()
            if line is not None:
                folder.measure(line)
            now = time.monotonic()
            if trainer.step % trial["train"]["checkpoint_every"] == 0 or trainer.finished or now >= due:
                folder.save(trainer.state())
                on_saved()  # the time up to here is not spent again, however this attempt ends
                due = time.monotonic() + max(MOST_LOST, SAVING * (time.monotonic() - now))
            if on_step is not None:
                on_step(trainer.step)
        result["metrics"] = trainer.conclude()
        if (content := _model_of(folder, trainer)) is not None:
            folder.keep_model(content)
        else:
            folder.drop_model()  # of an attempt under another `keep_model`
        if trainer.step < trial["train"]["steps"]:
            result["reason"] = f"no improvement in {plural(trainer.watch.since, 'validation')}"
    except Diverged as reason:
        folder.log(f"diverged at step {trainer.step}: {reason}")
        result |= {"outcome": "diverged", "metrics": {}, "reason": str(reason)}
    return result | {"step": trainer.step}


def _resumed(folder: TrialFolder, trial: dict[str, Any]) -> Trainer:
    """Return the trainer at its last checkpoint; at the start where a checkpoint is missing or does not fit."""
    trainer, state = Trainer(trial), folder.restore()
    if state is None:
        return trainer
    try:
        trainer.restore(state)
    except BadState as error:
        folder.reject_checkpoint(str(error))
        return Trainer(trial)
    return trainer


def _model_of(folder: TrialFolder, trainer: Trainer) -> bytes | None:
    """Return the model to save; None, with a log line, where safetensors is missing and `keep_model` is not set."""
    if trainer.train.get("keep_model") is None and find_spec("safetensors") is None:
        folder.log("no model is saved: safetensors is not installed (pip install 'atn-norms[ablation]')")
        return None
    return trainer.saved()


@model_builder
def untrained(trial: dict[str, Any]) -> Model:
    """Build the untrained model of a trial."""
    with isolated():
        return Trainer(trial).model


@contextmanager
def isolated() -> Iterator[None]:
    """Run with the global state of a fresh torch, and restore the earlier state afterwards.

    This covers the generator, default type and device, threads, gradient, inference and autocast modes, anomaly
    detection, deterministic algorithms, matmul precision, oneDNN and denormal numbers. A trial depends on all of these.
    """
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # the context slows every call of torch
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        for read, write, value in _GLOBALS:
            stack.callback(write, read())
            write(value)
        yield


def _uses_onednn() -> bool:
    return torch.backends.mkldnn.enabled  # type: ignore[attr-defined]


def _use_onednn(enabled: bool) -> None:
    torch.backends.mkldnn.set_flags(enabled)  # type: ignore[attr-defined]


def _flushes_denormals() -> bool:
    return (torch.tensor(5e-324, dtype=torch.float64) * 1).item() == 0


# Reader and writer of a global setting of torch, and its value in a fresh process.
_GLOBALS: tuple[tuple[Callable[[], Any], Callable[[Any], Any], Any], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    (_uses_onednn, _use_onednn, True),
    (_flushes_denormals, torch.set_flush_denormal, False),
)


def _finite(value: float | Tensor, what: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise Diverged(f"the {what} is {number}")
    return number
