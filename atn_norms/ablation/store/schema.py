"""Strict validation of a store's files: results, trials, studies and heartbeats."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.identity import DIGITS, digest, identity
from atn_norms.errors import short_repr, to_spec_error

MOST_STEPS = 10**12  # training steps of a trial
RETRAIN = "remove it to train the trial again"  # the cure for a damaged result
ID = rf"^[0-9a-f]{{{DIGITS}}}$"

Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Id = Annotated[str, Field(pattern=ID)]
Scores = dict[str, float]


class Stored(BaseModel):
    """A JSON object of a store: types are exact, numbers are finite, `true` is not a number, unknown keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


class Mark(Stored):
    """The state of a learning curve: its size in bytes and its SHA-256."""

    bytes: int = Field(ge=0, le=2**60)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Task(Stored):
    kind: str


class _Train(Stored):
    steps: int = Field(ge=1, le=MOST_STEPS)
    threads: int = Field(ge=1, le=1024)


class StoredTrial(Stored):
    """`trial.json`."""

    version: int
    model: dict[str, Any]
    task: _Task
    train: _Train
    seed: int = Field(ge=0)
    data: dict[str, str]
    plugins: dict[str, dict[str, str]] = {}


class StoredResult(Stored):
    """`result.json`."""

    trial: Id
    outcome: Literal["finished", "diverged"]
    step: Step
    metrics: dict[str, Scores]
    curve: Mark
    reason: str | None = None


class StoredRun(Stored):
    """`run.json`."""

    attempts: int = Field(default=0, ge=0, le=MOST_STEPS)
    seconds: float = Field(default=0.0, ge=0)
    started: str | None = None
    host: str | None = None
    processor: str | None = None
    process: int | None = None
    versions: dict[str, str] = {}


class StoredError(Stored):
    """`error.json`."""

    error: str
    traceback: str


class FirstMetric(Stored):
    """The entry of a task in `first.json`: a metric, and a trial that has returned it."""

    metric: str
    trial: Id


class StoredEnvironment(Stored):
    """`environment.json`."""

    versions: dict[str, str]


class _Entry(Stored):
    id: Id
    points: list[dict[str, str]] = Field(min_length=1)
    trial: StoredTrial


class _Facts(Stored):
    metric: str
    baselines: Scores = {}
    baselines_at: dict[str, Scores] = {}
    goal: Literal["min", "max"] = "min"


class StoredStudy(Stored):
    """`study.resolved.json`."""

    version: int
    key: Id
    name: str
    source: str
    study: dict[str, Any]
    axes: dict[str, list[str]]
    tasks: dict[str, _Facts]
    baseline: dict[str, str]
    tune: dict[str, list[str]] = {}
    sources: dict[str, dict[str, dict[str, str]]] = {}
    trials: list[_Entry] = Field(min_length=1)


class Heartbeat(Stored):
    """The line that the holder of a lock writes every second.

    | field | meaning |
    |---|---|
    | `holder` | host, process and a random word, which is new for each time that a lock is taken |
    | `machine` | boot id of the holder's kernel; on the same machine `flock` is reliable |
    | `beat` | number of the heartbeat |
    | `step`, `loss` | training steps taken and the last training loss, None before the first |
    """

    holder: str = Field(pattern=r"^[^/\x00-\x1f\x7f]{0,64}/[0-9]{1,10}/[0-9a-f]{8}$")
    machine: str = Field(max_length=256)
    beat: int = Field(ge=0, le=MOST_STEPS)
    step: Step | None = None
    loss: float | None = None


Kind = TypeVar("Kind", bound=Stored)


def check(kind: type[Kind], value: Any, place: str, cure: str = "") -> Kind:
    """Validate a JSON value as one kind of stored object; `StoreError` names position, problem and fix."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = to_spec_error(error).problems[0]
        raise StoreError(f"{place}: damaged: {problem}{'; ' if cure else ''}{cure}") from error
    except (OverflowError, RecursionError, ValueError) as error:
        raise StoreError(f"{place}: damaged: {type(error).__name__}: {error}{'; ' if cure else ''}{cure}") from error


def check_trial(trial: dict[str, Any], wanted: str, place: str, cure: str) -> None:
    """Validate a trial and compare its content with its id, which is a hash of it."""
    check(StoredTrial, trial, place, cure)
    try:
        actual = identity(trial)
    except (RecursionError, ValueError) as error:
        raise StoreError(f"{place}: damaged: {error}; {cure}") from error
    if actual != wanted:
        raise StoreError(f"{place}: got the content of trial {actual}; expected that of {wanted}, its id; {cure}")


def check_study(resolved: dict[str, Any], place: str, cure: str) -> None:
    """Validate a study: its trials by their ids, its grid by its key, and every point by the grid."""
    check(StoredStudy, resolved, place, cure)
    for number, entry in enumerate(resolved["trials"]):
        check_trial(entry["trial"], entry["id"], f"{place}: trials[{number}]", cure)
    try:
        actual = study_key(resolved["axes"], resolved["baseline"], resolved["trials"])
    except (RecursionError, ValueError) as error:
        raise StoreError(f"{place}: damaged: {error}; {cure}") from error
    if actual != resolved["key"]:
        raise StoreError(f"{place}: damaged: got a grid with key {actual}; expected key {resolved['key']}; {cure}")
    labels = {**resolved.get("tune", {}), **resolved["axes"], "task": list(resolved["tasks"])}
    known = {name: set(values) for name, values in labels.items()}
    for number, entry in enumerate(resolved["trials"]):
        for point in entry["points"]:
            if "task" not in point or any(value not in known.get(name, ()) for name, value in point.items()):
                where = f"{place}: damaged: trials[{number}].points: got {short_repr(point)}"
                raise StoreError(f"{where}; expected a task and labels of the study's axes; {cure}")
    if len({entry["id"] for entry in resolved["trials"]}) < len(resolved["trials"]):
        raise StoreError(f"{place}: damaged: trials: got an id twice; expected different ones; {cure}")


def study_key(axes: Any, baseline: Any, trials: Any) -> str:
    """Compute the key of a study: a hash of its trials, their points in the grid, and the baseline."""
    return digest(
        {
            "axes": axes,
            "baseline": baseline,
            "trials": [{"id": each["id"], "points": list(each["points"])} for each in trials],
        }
    )


def check_result(result: dict[str, Any], trial: str, place: str) -> None:
    """Validate the result of this trial; it has a test score unless the training diverged."""
    check(StoredResult, result, place, RETRAIN)
    if result["trial"] != trial:
        raise StoreError(f"{place}: got the result of trial {result['trial']}; expected that of {trial}; {RETRAIN}")
    if result["outcome"] == "finished" and not result["metrics"].get("test"):
        raise StoreError(f"{place}: damaged: metrics.test: got nothing; expected a value; {RETRAIN}")
