"""Contents of a study's folder as plain values, for the report, the status line and the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.labels import label
from atn_norms.ablation.store.schema import RETRAIN
from atn_norms.errors import SpecError, nearest, one_of

if TYPE_CHECKING:
    from torch import nn

MODEL = "model.safetensors"  # a trial's saved model
Status = Literal["pending", "running", "done", "diverged", "failed"]
Goal = Literal["min", "max"]
Spread = Literal["additive", "multiplicative"]
BuildModel = TypeVar("BuildModel", bound="Callable[[dict[str, Any]], nn.Module]")
_BUILDERS: list[Callable[[dict[str, Any]], nn.Module]] = []


def model_builder(function: BuildModel) -> BuildModel:
    """Register the function that builds an untrained model of a trial; `execution` has it, above this package."""
    _BUILDERS[:] = [function]
    return function


@dataclass(frozen=True)
class TaskFacts:
    """Meaning of a task's scores.

    | field       | meaning                                                                  |
    |-------------|--------------------------------------------------------------------------|
    | `metric`    | name, and unit where it has one                                          |
    | `baselines` | scores of trivial predictors: name -> value of the metric                |
    | `goal`      | `min` if a smaller metric is better, such as a loss; `max` if a larger   |
    | `notes`     | sentences about the data that were read                                  |
    | `spread`    | `multiplicative` if scores are compared as logarithms                    |
    | `reported`  | the quantity in the curve of `train_loss`                                |
    | `baselines_at` | values of the axes of the task's options -> baselines; empty where all points agree |
    """

    metric: str
    baselines: dict[str, float] = field(default_factory=dict)
    goal: Goal = "min"
    notes: Sequence[str] = ()
    spread: Spread = "additive"
    reported: str = "training loss"
    baselines_at: dict[str, dict[str, float]] = field(default_factory=dict)

    def baselines_of(self, labels: Mapping[str, str]) -> dict[str, float]:
        """Return the baselines of the point with these labels.

        >>> facts = TaskFacts("MAE", baselines_at={"task.horizon 1": {"last value": 0.2}})
        >>> facts.baselines_of({"norm": "layer", "task.horizon": "1"})
        {'last value': 0.2}
        """
        return self.baselines_at.get(task_options(labels), self.baselines)

    def as_json(self) -> dict[str, Any]:
        """Return the facts for a file, without `baselines_at` where it is empty."""
        return {name: value for name, value in asdict(self).items() if value or name != "baselines_at"}


def task_options(labels: Mapping[str, str]) -> str:
    """Return the values of the axes of a task's options.

    >>> task_options({"task": "adding", "task.length": "50", "norm": "layer"})
    'task.length 50'
    """
    return ", ".join(f"{axis} {value}" for axis, value in sorted(labels.items()) if axis.startswith("task."))


@dataclass(frozen=True)
class Endpoint:
    """The primary endpoint of a task.

    | field         | meaning                                                                                         |
    |---------------|-------------------------------------------------------------------------------------------------|
    | `measure`     | `final`: test metric at the end; `tail`: mean of the last validations; `steps`: steps to a level |
    | `validations` | the number of validations of `tail`                                                             |
    | `margin`      | the largest difference that does not matter, a ratio above 1 where logarithms are compared      |
    | `declared`    | whether the study names the endpoint                                                            |
    """

    measure: str = "final"
    validations: int = 5
    margin: float | None = None
    declared: bool = False

    @classmethod
    def of(cls, study: Mapping[str, Any], task: str) -> Endpoint:
        """Return the endpoint that a study names for a task; `final` where it names none."""
        margin = _own(study.get("margin"), task)
        named = study.get("endpoint")
        named = named if isinstance(named, str) or (named and "measure" in named) else _own(named, task)
        if not named:
            return cls(margin=margin)
        options: Mapping[str, Any] = {"measure": named} if isinstance(named, str) else named
        return cls(options["measure"], options.get("validations", cls.validations), margin, True)


def _own(value: Any, task: str) -> Any:
    return value.get(task) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class TrialRecord:
    """One trial, read from its folder.

    | field    | meaning                                                                                             |
    |----------|-----------------------------------------------------------------------------------------------------|
    | `id`     | hash of the trial's canonical JSON                                                                  |
    | `trial`  | that JSON: `version`, `model`, `task`, `train`, `seed`, `data`, and `plugins` if it uses any        |
    | `points` | its grid points: axis name -> label, and `task` -> label; several if points are equal trials        |
    | `seed`   | the seed, in the trial as well                                                                      |
    | `status` | `pending`, `running`, `done`, `diverged` (by a loss that is too large or not finite) or `failed`    |
    | `result` | `result.json`: `trial`, `outcome`, `step`, `metrics` {split: {metric: value}}, empty if it diverged |
    | `curve`  | `metrics.jsonl`: `step`, `train_loss`, `validation` (None where it was not measured)                |
    | `run`    | `run.json`: seconds, host, attempts; differs from machine to machine                                |
    | `error`  | `error.json`: `error` (one line), `traceback`; None unless the last attempt failed                  |
    | `step`   | training steps taken, by the result, the heartbeat of its worker, or the curve                      |
    """

    id: str
    trial: dict[str, Any] = field(repr=False)
    points: tuple[dict[str, str], ...]
    seed: int
    status: Status
    result: dict[str, Any] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list, repr=False)
    run: dict[str, Any] | None = None
    error: dict[str, Any] | None = field(default=None, repr=False)
    step: int = 0
    folder: Path | None = None

    def model(self, model: nn.Module | None = None) -> nn.Module:
        """Load the trained model that the trial saved (`train.keep_model`), in evaluation mode.

        A `model` is required if `atn_norms.load` requires one: for a class of your own, saved with `trial.keep`. A
        model with modules of a task plugin is rebuilt by that task.

        Errors: `SpecError` where no model was saved; `StoreError` where the file is a link or too large; the errors of
        `atn_norms.load`.
        """
        from atn_norms.layers.io import from_bytes

        content, path = self._saved()
        return from_bytes(content, path, model, None if self.trial["task"].get("kind") == "python" else self._untrained)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return what a program needs to use the trained model on new data, saved with the model: see the task.

        Errors: as `model`.
        """
        from atn_norms.layers.io import preprocessing_of

        return preprocessing_of(*self._saved())

    def _saved(self) -> tuple[bytes, Path]:
        """Return the content and the path of `model.safetensors`."""
        from atn_norms.ablation.store.files import Folder
        from atn_norms.files import most_bytes

        path = (self.folder or Path(self.id)) / MODEL
        # STUDY/trials/ID, where neither of the last two may be a link
        folder = None if self.folder is None else Folder(self.folder.parents[1], *self.folder.parts[-2:])
        if folder is None or not folder.has(MODEL):
            kept = self.trial.get("train", {}).get("keep_model")
            why = "train.keep_model is none" if kept == "none" else f"The trial is {self.status}"
            raise SpecError(position=str(path), got="no model", expected="a saved model", detail=f"{why}.")
        return folder.read(MODEL, most_bytes()), path

    def _untrained(self) -> nn.Module:
        """Build an untrained model of this trial by its task."""
        (build,) = _BUILDERS
        return build(self.trial)


@dataclass(frozen=True)
class StudyRecord:
    """A whole study, read from its folder; axes, tasks and trials in the order of the study file."""

    name: str
    study: dict[str, Any]
    environment: dict[str, Any]
    axes: dict[str, list[str]]
    tasks: dict[str, TaskFacts]
    baseline: dict[str, str]
    trials: tuple[TrialRecord, ...]
    tune: dict[str, list[str]] = field(default_factory=dict)

    def endpoint(self, task: str) -> Endpoint:
        """The primary endpoint of a task."""
        return Endpoint.of(self.study, task)

    def __post_init__(self) -> None:
        """Name the metric of a function, which is known once it has returned one."""
        named = {label: _with_metric(facts, label, self.trials) for label, facts in self.tasks.items()}
        object.__setattr__(self, "tasks", named)

    def best(self, **labels: Any) -> TrialRecord:
        """Return the finished trial with the best validation score among the trials with the given labels.

        Without validation scores, as in the study of a function, the returned metric decides. A label is the value of
        an axis or a tuned option in the study file, such as `norm="layer", window=25`. `task` and `seed` are labels
        too. Pass a name with a dot in a mapping: `best(**{"train.optimizer.lr": 0.1})`.

        Errors: `SpecError` for an unknown axis or label, where several tasks are left, and where no trial has finished.
        """
        wanted = {name.removeprefix("model."): label(value) for name, value in labels.items()}
        seeds = sorted({str(t.seed) for t in self.trials})
        known = {"task": list(self.tasks), "seed": seeds, **self.axes, **self.tune}
        for name, value in wanted.items():
            if name not in known:
                raise SpecError((name,), "an unknown axis", one_of(known), nearest(name, known))
            if value not in known[name]:
                raise SpecError((name,), value, one_of(known[name]), nearest(value, known[name]))
        found = [trial for trial in self.trials if trial.status == "done" and _fits(trial, wanted)]
        tasks = list(dict.fromkeys(trial.points[0]["task"] for trial in found))
        if len(tasks) > 1:
            got, expected = f"{len(tasks)} tasks, whose scores do not compare", one_of(tasks)
            raise SpecError("task", got, expected)
        if not found:
            description = ", ".join(f"{name}={value}" for name, value in wanted.items()) or "any label"
            raise SpecError((f"study {self.name!r}",), f"no finished trial with {description}", "at least one")
        facts = self.tasks[tasks[0]]
        return (min if facts.goal == "min" else max)(found, key=lambda trial: _selection(trial, facts))

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.counts().items() if count)
        return f"StudyRecord(name={self.name!r}, tasks={list(self.tasks)}, axes={self.axes}, trials: {counts})"

    def count(self, status: Status) -> int:
        """Return the number of trials with a status."""
        return sum(trial.status == status for trial in self.trials)

    def counts(self) -> dict[str, int]:
        """Return the numbers of trials that are `done`, `diverged`, `failed`, `running` and `pending`."""
        return {status: self.count(status) for status in ("done", "diverged", "failed", "running", "pending")}


def _with_metric(facts: TaskFacts, label: str, trials: Sequence[TrialRecord]) -> TaskFacts:
    """Name the metric of a function, which is known once it has returned one: the first of the first trial."""
    if facts.metric:
        return facts
    returned = (
        trial.result["metrics"]["test"]
        for trial in trials
        if trial.status == "done" and trial.result and trial.points[0].get("task") == label
    )
    return replace(facts, metric=next(iter(next(returned, {"": 0.0}))))


def refuse_missing_metrics(record: StudyRecord) -> None:
    """Raise `StoreError` for a finished trial that did not return the metric of its task: it cannot be compared."""
    done: dict[str, list[TrialRecord]] = {}
    for trial in record.trials:
        if trial.status == "done" and trial.result and trial.points:
            done.setdefault(trial.points[0].get("task", ""), []).append(trial)
    for task, trials in done.items():
        wanted = record.tasks[task].metric
        have = [trial for trial in trials if wanted in _returned(trial)]
        for trial in trials:
            if wanted not in _returned(trial):
                place = trial.folder / "result.json" if trial.folder else f"trial {trial.id}"
                got = ", ".join(map(repr, _returned(trial))) or "none"
                expected = f"expected {wanted!r}" + (f", as in trial {have[0].id}" if have else "")
                raise StoreError(f"{place}: got metrics {got}; {expected}; {RETRAIN}")


def _returned(trial: TrialRecord) -> Mapping[str, Any]:
    return (trial.result or {}).get("metrics", {}).get("test", {})


def _fits(trial: TrialRecord, wanted: dict[str, str]) -> bool:
    """Return whether a grid point of a trial has all of these labels."""
    return any(wanted.items() <= {**point, "seed": str(trial.seed)}.items() for point in trial.points)


def _selection(trial: TrialRecord, facts: TaskFacts) -> float:
    """Return the score that selects trials: on validation data if the trial has such scores, else the final metric."""
    metrics = (trial.result or {}).get("metrics", {})
    value = metrics.get("validation", {}).get(facts.metric, metrics.get("test", {}).get(facts.metric))
    return float(value) if isinstance(value, int | float) else float("inf" if facts.goal == "min" else "-inf")
