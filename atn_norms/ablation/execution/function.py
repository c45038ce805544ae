"""Run one trial of a user's function: call it with its arguments, record its reports and store its result."""

from __future__ import annotations

import gc
import inspect
import io
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atn_norms.ablation.execution.first_metric import require_same_metric
from atn_norms.ablation.execution.random_state import random_state, restore_random_state, seed_all
from atn_norms.ablation.grid.functions import FunctionSpec, load_function
from atn_norms.ablation.grid.imports import local_modules, uncounted
from atn_norms.ablation.grid.schedules import Improvement
from atn_norms.ablation.store.checkpoints import first_unloadable, is_of_the_machine
from atn_norms.ablation.store.trial import FILES, TrialFolder
from atn_norms.errors import SpecError, brief, mismatch, nearest, plural, short_repr, typed_repr
from atn_norms.layers.io import to_bytes
from atn_norms.text import encodable

MOST_LINES = 1000  # lines of a function's output in a trial's log
FRESH = {"step": 0, "first": None, "best": math.inf, "since": 0}  # the reports of a trial before its first
GRACE = 2.0  # seconds for a process that a function left running to end

OnStep = Callable[[int], None]
_SET_BY_IMPORTS: dict[tuple[str, str], dict[str, Any]] = {}  # file and hash -> settings that its first load changed


class Diverged(Exception):
    """A loss or score is not finite, or has grown too much: an outcome of the trial, not a failure."""


class Checkpoint:
    """Save the state of a function during a trial, and load it after an interruption."""

    def __init__(self, folder: TrialFolder, trial: Trial, on_saved: Callable[[], None]) -> None:
        self._folder, self._trial, self._on_saved = folder, trial, on_saved
        self._stored = folder.restore()  # also truncates the curve to the step of the checkpoint
        if self._stored is not None and self._stored.keys() != {"state", "random", "watch"}:
            folder.reject_checkpoint("got other parts than a function's checkpoint has")
            self._stored = None
        self._is_loaded = False

    def save(self, state: dict[str, Any]) -> None:
        """Save `state`: a mapping of tensors, numbers, text, and lists, tuples and mappings of these.

        The random states of torch (CPU, and CUDA where it is in use), Python and NumPy are saved with it.

        Errors: `TypeError` for a state that is no mapping, and for a part that `load` could not read.
        """
        if not isinstance(state, Mapping):
            raise TypeError(mismatch("state", typed_repr(state), "a mapping such as {'step': 3}"))
        if (unloadable := first_unloadable(state, "state")) is not None:
            path, part = unloadable
            got = f"{type(part).__module__}.{type(part).__qualname__} {short_repr(part)}"
            raise TypeError(mismatch(path, got, "tensors, numbers, text, and lists, tuples and mappings of these"))
        self.reject_unless_loaded()
        self._folder.save({"state": state, "random": random_state(), "watch": self._trial._watched()})
        self._on_saved()

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state and restore its random states; None at the beginning of a trial.

        Call it before the first report: a checkpoint that is not loaded by then is set aside, and the curve is empty.
        """
        if self._stored is None:
            return None
        try:
            self._trial._continue(self._stored["watch"])
            restore_random_state(self._stored["random"])
        except Exception as error:  # a foreign state may raise any error
            if is_of_the_machine(error):
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._folder.reject_checkpoint(f"got another state than a function's checkpoint has ({brief(problem)})")
            self._stored = None
            self._trial._continue(FRESH)
            seed_all(self._trial.seed)
            return None
        self._is_loaded = True
        return self._stored["state"]

    def reject_unless_loaded(self) -> None:
        """Set a checkpoint aside that the function has not loaded, and empty the learning curve."""
        if self._stored is not None and not self._is_loaded:
            self._folder.reject_checkpoint("the function did not load it")
            self._stored = None


class Trial:
    """The argument `trial` of a study's function.

    | attribute | meaning |
    |---|---|
    | `seed` | the trial's seed; torch, Python and NumPy are seeded with it already |
    | `folder` | a folder of the trial for the function's files |
    | `checkpoint` | `save(state)` and `load()`, to continue after an interruption |
    | `should_stop` | true after `patience` consecutive reports without improvement |
    """

    def __init__(
        self, folder: TrialFolder, trial: dict[str, Any], on_step: OnStep, on_saved: Callable[[], None]
    ) -> None:
        self.seed: int = trial["seed"]
        self._folder, self._train, self._on_step = folder, trial["train"], on_step
        self._task: dict[str, Any] = trial["task"]
        self._first: float | None = None
        self._step = 0
        self._watch = Improvement()
        self._end: BaseException | None = None  # ends the trial, also where the function catches every exception
        self.checkpoint = Checkpoint(folder, self, on_saved)

    @property
    def folder(self) -> Path:
        """A folder of the trial for the function's files, created at the first access."""
        files = self._folder.folder.folder(FILES)
        files.make()
        return files.path

    @property
    def should_stop(self) -> bool:
        """True after `patience` consecutive reports without improvement."""
        patience = self._train.get("patience")
        return patience is not None and self._watch.since >= patience

    def report(self, step: int, value: Any) -> None:
        """Record a loss at a training step: a point of the learning curve, and a heartbeat.

        A loss that is not finite, or over `divergence_factor` times the first loss, ends the trial as diverged. With
        the option `reports: metric`, the value is the metric instead of a loss.
        """
        if isinstance(step, bool) or not isinstance(step, Integral) or step < max(1, self._step + 1):
            raise ValueError(f"step: got {short_repr(step)}; expected an integer of at least {self._step + 1}")
        step = int(step)
        number = _number(value)
        if number is None:
            raise TypeError(f"value: got {type(value).__name__} {short_repr(value)}; expected a number")
        self.checkpoint.reject_unless_loaded()
        self._refuse_divergence(number)
        self._step = step
        metric = self._task["reports"] == "metric"
        self._watch.see(-number if metric and self._task["goal"] == "max" else number)
        try:
            self._folder.measure({"step": step, "train_loss": number, "validation": number if metric else None})
            self._on_step(step)
        except BaseException as end:
            self._end = end
            raise

    def keep(self, model: nn.Module) -> None:
        """Save a model with the trial, for `ablation.load(DIR).best().model()`; a later call replaces it."""
        self.checkpoint.reject_unless_loaded()
        self._folder.keep_model(to_bytes(model))

    def _refuse_divergence(self, number: float) -> None:
        most, name = self._train["divergence_factor"], self._task["reports"]
        self._first = number if self._first is None else self._first
        if not math.isfinite(number):
            self._end = Diverged(f"the reported {name} is {number}")
        elif name == "loss" and most is not None and number > most * abs(self._first) > 0:
            self._end = Diverged(f"the reported loss is {number:.3g}, over {most:g} times what it was at first")
        if self._end is not None:
            raise self._end

    def _watched(self) -> dict[str, Any]:
        return {"step": self._step, "first": self._first, "best": self._watch.best, "since": self._watch.since}

    def _continue(self, watched: dict[str, Any]) -> None:
        step, first, best, since = (watched[name] for name in FRESH)
        is_number = type(best) is float and best == best and type(since) is int and since >= 0
        is_loss = first is None or (type(first) is float and math.isfinite(first))
        if type(step) is not int or step != self._folder.last_step() or not (is_number and is_loss):
            raise ValueError(f"got {short_repr(watched)}; expected the last step of the curve, and finite losses")
        self._step, self._first = step, first
        self._watch.best, self._watch.since = best, since


def run_function(
    folder: TrialFolder, trial: dict[str, Any], on_step: OnStep | None, on_saved: Callable[[], None]
) -> dict[str, Any]:
    """Call the function of a trial and return the result to store.

    Errors: `SpecError` where the file has changed or cannot be loaded, and where the function returns no number, returns
    another first metric than other trials of its task, or calls `sys.exit`; every exception of the function.
    """  # noqa: E501
    task = FunctionSpec.model_validate(trial["task"])
    data = task.data()
    for option, content in trial["data"].items():
        if data[option] != content:
            raise changed_data(option)
    torch.set_num_threads(trial["train"]["threads"])
    result: dict[str, Any] = {"trial": folder.id, "outcome": "finished", "step": 0, "metrics": {}}
    folder.start()
    with contained(folder.log, task.function), local_modules(Path(task.file)):
        function = loaded(task, data["file"])
        for warning in uncounted(function, Path(task.file), task.files):
            folder.log(warning)
        handle = Trial(folder, trial, on_step or (lambda step: None), on_saved)
        seed_all(trial["seed"])
        try:
            returned = _called(function, task.function, trial["model"], handle)
            handle.checkpoint.reject_unless_loaded()
            result["metrics"] = {"test": _metrics(folder, task, returned)}
            if handle.should_stop:
                result["reason"] = f"no improvement in {plural(handle._watch.since, 'report')}"
        except Diverged as reason:
            folder.log(f"diverged at step {handle._step}: {reason}")
            result |= {"outcome": "diverged", "reason": str(reason)}
    if result["metrics"]:
        require_same_metric(folder, task, next(iter(result["metrics"]["test"])))
    return result | {"step": handle._step}


def loaded(task: FunctionSpec, code: str) -> Callable[..., Any]:
    """Load a function, with the global settings that its modules set when they are imported.

    Installed modules are imported once in a process, and the settings are restored after each trial. Without this, only
    the first trial of a process would have them.
    """
    before = _settings()
    function = load_function(task)
    now = _settings()
    changed = {name: now[name] for name in now if now[name] != before[name]}
    _put_settings(_SET_BY_IMPORTS.setdefault((task.file, code), changed))
    return function


def _called(function: Callable[..., Any], name: str, arguments: Mapping[str, Any], trial: Trial) -> Any:
    provided = {"seed": trial.seed, "trial": trial}
    takes = inspect.signature(function).parameters
    every = any(each.kind == each.VAR_KEYWORD for each in takes.values())
    provided = {key: value for key, value in provided.items() if every or key in takes}
    try:
        returned = function(**arguments, **provided)
    except SystemExit as error:
        got = f"a call of sys.exit({error.code if error.code is not None else ''})"
        raise SpecError(name, got, "returned metrics, or an exception") from None
    if trial._end is not None:  # the function caught the exception that ends it
        raise trial._end
    return returned


def changed_data(option: str) -> SpecError:
    """Return the error for data of a task that changed after the study was created."""
    expected = "the content of the time when the study was created"
    return SpecError(f"task.{option}", "changed content", expected, detail="Restore it, or make a new study.")


def _metrics(folder: TrialFolder, task: FunctionSpec, returned: Any) -> dict[str, float]:
    """Return the finite metrics as numbers, the compared metric first; log the others.

    Errors: `Diverged` where the compared metric is not finite.
    """
    named = {task.metric or "score": returned} if _number(returned) is not None else returned
    expected = "a number, or a mapping of metric to number such as {'test accuracy': 0.9}"
    if not isinstance(named, Mapping) or not named:
        raise SpecError(task.function, typed_repr(returned), expected)
    numbers = {}
    for name, value in named.items():
        number = _number(value)
        if number is None or not isinstance(name, str) or encodable(name) != name:
            raise SpecError(task.function, f"{short_repr(value)} for {short_repr(name)}", expected)
        numbers[name] = number
    if task.metric is not None and task.metric not in numbers:
        got, expected = f"metrics {', '.join(numbers)}", f"{task.metric!r} among them"
        raise SpecError(task.function, got, expected, nearest(task.metric, numbers))
    first = task.metric or next(iter(numbers))
    if not math.isfinite(numbers[first]):
        raise Diverged(f"the returned {first} is {numbers[first]}")
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    for name, number in numbers.items():
        if name not in finite:
            folder.log(f"{task.function}: the returned {name} is {number}; it has no number in the results")
    return {first: numbers[first]} | finite


def _number(value: Any) -> float | None:
    """Convert a value, or a tensor or array of one element, to a float; None where it is no real number."""
    is_other = str(getattr(value, "dtype", "")).removeprefix("torch.").startswith(("bool", "complex"))
    if isinstance(value, bool | str | bytes) or value is None or is_other:
        return None
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        return None


@contextmanager
def contained(write: Callable[[str], None], name: str) -> Iterator[None]:
    """Write a function's output to a log; afterwards end its processes and restore global settings."""

    def note(text: str) -> None:
        write(f"{name}: {text}")

    log = _Log(write)
    before, children = _settings(), _children()
    process: Any = multiprocessing.current_process()
    daemon = process._config.get("daemon")
    process._config["daemon"] = False  # a Dask worker is a daemon, which may not start processes to load data
    try:
        with redirect_stdout(log), redirect_stderr(log):
            yield
    finally:
        process._config["daemon"] = daemon
        log.close()
        for each in _end_processes(children):
            note(f"left a process running ({each}); it was ended")
        for setting in _restore_settings(before):
            note(f"changed {setting}; restored")


class _Log(io.TextIOBase):
    """Standard output as lines of a trial's log, at most `MOST_LINES`."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._line, self._count = write, "", 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._put(line)
        return len(text)

    def close(self) -> None:
        if not self.closed:
            self._put(self._line)
        super().close()

    def _put(self, line: str) -> None:
        line = line.rpartition("\r")[2].rstrip()  # the final state of a progress bar
        if not line:
            return
        self._count += 1
        if self._count <= MOST_LINES:
            self._write(f"printed: {line}")
        elif self._count == MOST_LINES + 1:
            self._write(f"printed more than {MOST_LINES} lines; the others are dropped")


def _children() -> set[int]:
    """Return the ids of this process's children, without the helpers of Python's multiprocessing."""
    ids: set[int] = set()
    for tasks in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            ids |= set(map(int, tasks.read_text().split()))
    ids |= {each.pid for each in multiprocessing.active_children() if each.pid is not None}
    return {each for each in ids if "resource_tracker" not in _command(each) and "forkserver" not in _command(each)}


def _command(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    return ""


def _end_processes(before: set[int]) -> list[str]:
    """End the child processes that are not in `before`, and describe them."""
    left = sorted(_children() - before)
    if left:
        gc.collect()  # a data loader ends its processes when it is collected
        left = sorted(_children() - before)
    described = [f"{each}: {short_repr(_command(each))}" for each in left]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for each in left:
            with suppress(ProcessLookupError):
                os.kill(each, number)
        deadline = time.monotonic() + GRACE
        while left and time.monotonic() < deadline:
            left = [each for each in left if not _ended(each)]
            time.sleep(0.02 if left else 0)
    return described


def _ended(process: int) -> bool:
    with suppress(ChildProcessError):
        return os.waitpid(process, os.WNOHANG)[0] == process
    return not Path(f"/proc/{process}").exists()


def _settings() -> dict[str, Any]:
    """Return the global settings that a function may change, which would change other trials."""
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "whether torch records gradients": torch.is_grad_enabled(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's anomaly detection": torch.is_anomaly_enabled(),
        "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
        "the working directory": os.getcwd(),
        "the environment variables": dict(os.environ),
    }


def _restore_settings(before: dict[str, Any]) -> list[str]:
    """Restore global settings, and return the names of those that had changed."""
    now = _settings()
    changed = [name for name in before if now[name] != before[name]]
    _put_settings({name: before[name] for name in changed})
    return changed


def _put_settings(settings: dict[str, Any]) -> None:
    setters: dict[str, Callable[[Any], Any]] = {
        "torch's default dtype": torch.set_default_dtype,
        "torch's default device": lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        "whether torch records gradients": lambda on: torch.set_grad_enabled(on),
        "torch's deterministic algorithms": torch.use_deterministic_algorithms,
        "torch's anomaly detection": torch.autograd.set_detect_anomaly,
        "torch's float32 matmul precision": torch.set_float32_matmul_precision,
        "the working directory": os.chdir,
        "the environment variables": _put_environment,
    }
    for name, value in settings.items():
        setters[name](value)


def _put_environment(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)
