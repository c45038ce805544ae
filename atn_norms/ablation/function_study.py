"""Study a function: vary its arguments, over seeds, with everything that studies have."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from atn_norms.ablation.execution.caller import refuse_different_globals
from atn_norms.ablation.execution.engine import Event, OnEvent, check_workers, run
from atn_norms.ablation.execution.estimate import costs
from atn_norms.ablation.execution.remaining import RemainingTime
from atn_norms.ablation.grid.functions import refuse_nested_start, task_of
from atn_norms.ablation.report import findings, write
from atn_norms.ablation.report.costs import duration
from atn_norms.ablation.report.sentences import answer, verdict_line
from atn_norms.ablation.store.records import StudyRecord
from atn_norms.ablation.studies import create, validated
from atn_norms.errors import SpecError, plural, typed_repr
from atn_norms.text import encodable, escape_controls


def ablate(
    function: Callable[..., Any],
    *,
    axes: Mapping[str, Sequence[Any]],
    seeds: int | Sequence[int] = 5,
    goal: Literal["min", "max"] = "min",
    metric: str | None = None,
    out: Path | str | None = None,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    files: Sequence[Path | str] = (),
    baseline: Mapping[str, Any] | None = None,
    margin: float | None = None,
    endpoint: Literal["final", "tail", "steps"] | Mapping[str, Any] | None = None,
    reach: float | None = None,
    steps: int | None = None,
    patience: int | None = None,
    reports: Literal["loss", "metric"] = "loss",
    threads: int = 1,
    workers: int = 2,
    scheduler: str | None = None,
    on_event: OnEvent | None = None,
) -> StudyRecord:
    """Call a function at every point of a grid for every seed, compare the returned metrics, and write the report.

    `function(**point, seed=seed, trial=trial)` returns `{metric: value}` or a number. It takes `seed` and `trial` only
    if it names them. `trial` is a `Trial`. It must be defined at the top level of a file, since worker processes load
    that file. torch, Python and NumPy are seeded with `seed`. The same call resumes an interrupted study.

    Trials execute the file again, up to its first call of `ablate`, without the block under `__main__` and without
    arguments of the command line. Globals that the function reads must have the same values there.

    | argument | meaning |
    |---|---|
    | `axes` | argument of the function -> the values to compare |
    | `seeds` | the number of seeds, or a list of seeds |
    | `goal` | `max` where a larger metric is better |
    | `metric` | the returned metric to compare; the first by default |
    | `out` | the study's folder; `studies/NAME-KEY` by default |
    | `name` | the study's name; the name of the function's file by default |
    | `arguments` | arguments of every call |
    | `files` | other files and folders that the result depends on; a changed file makes another study |
    | `baseline` | axis -> value that the other values are compared with |
    | `margin` | the largest difference of the endpoint that does not matter; changing it trains nothing again |
    | `endpoint` | the measure that decides: `final`, or with `reports="metric"` also `tail` or `steps`, or a mapping |
    | `reach` | with `reports="metric"`, a level of the metric: the report shows the steps to reach it |
    | `steps` | training steps of a trial, for the progress line and for trials that stop early |
    | `patience` | reports without improvement after which `trial.should_stop` is true |
    | `reports` | whether `trial.report` gets losses, or values of the `metric` |
    | `threads` | threads of torch per trial |
    | `workers`, `scheduler` | as in `run` |
    | `on_event` | called with each `Event`; by default, progress and verdict are printed |

    Errors: `SpecError` for a function that worker processes cannot load, for a global with another value in the
    trials, for arguments that the function does not take, for a bad point, and for a folder that holds another study.
    A trial that fails is recorded and the others continue.
    """
    refuse_nested_start()
    check_workers(workers)
    if not isinstance(axes, Mapping):
        raise SpecError("axes", typed_repr(axes), "a mapping of name to values")
    for option, value in (("arguments", arguments), ("baseline", baseline)):
        if not isinstance(value, Mapping | None):
            raise SpecError(option, typed_repr(value), "a mapping of name to value")
    if on_event is not None and not callable(on_event):
        raise SpecError("on_event", typed_repr(on_event), "a function of one event")
    task = {"arguments": dict(arguments or {}), "goal": goal, "metric": metric, "reports": reports}
    task |= {"files": [str(each) for each in _listed("files", files, "a list of paths")], **task_of(function)}
    train: dict[str, Any] = {"patience": patience, "threads": threads} | ({} if steps is None else {"steps": steps})
    study: dict[str, Any] = {
        "name": Path(task["file"]).stem if name is None else name,
        "task": task,
        "train": train,
        "axes": {axis: _listed(("axes", axis), values, "a list of values") for axis, values in axes.items()},
        "seeds": seeds if isinstance(seeds, Integral) else _listed("seeds", seeds, "a number or a list of seeds"),
        "baseline": dict(baseline or {}),
    }
    analysis = {"margin": margin, "endpoint": endpoint, "reach": reach}
    study |= {option: value for option, value in analysis.items() if value is not None}
    spec = validated(study)
    refuse_different_globals(function, spec.points()[0].task)
    folder = create(spec, out)
    log = _Log(folder, None if scheduler else max(1, workers))
    with _main_not_run_again():
        try:
            record = run(
                folder,
                workers=workers,
                scheduler=scheduler,
                on_start=log.start if on_event is None else None,
                on_event=on_event or log.see,
            )
        except KeyboardInterrupt:
            if on_event is None:
                command = shlex.join(["atn-norms", "resume", str(folder)])
                _print(f"interrupted; the same call resumes, and so does {command}")
            raise KeyboardInterrupt from None
    result = findings(record)
    page = write(result, folder / "report")[0]
    if on_event is None:
        for each in result.tasks:
            _print(" ".join([f"{each.task}: {verdict_line(result, each)}.", *answer(result, each)]))
        if failed := record.count("failed"):
            _print(f"{plural(failed, 'trial')} failed; see {shlex.join(['atn-norms', 'status', str(folder)])}")
        _print(f"report: {page}")
    return record


def _listed(option: str | tuple[str, ...], values: Any, expected: str) -> list[Any]:
    """Return several values as a list; `SpecError` for one value, and for a set, which has no order."""
    if isinstance(values, str | bytes | Mapping | set | frozenset) or not isinstance(values, Iterable):
        raise SpecError(option, typed_repr(values), expected)
    return list(values)


class _Log:
    """Print the start of a run, and a line for each trial that ends, with the remaining time."""

    def __init__(self, folder: Path, workers: int | None) -> None:
        self._folder, self._remaining = folder, RemainingTime((), workers)
        self._workers = workers

    def start(self, record: StudyRecord) -> None:
        left = sum(trial.status not in ("done", "diverged") for trial in record.trials)
        _print(f"study {record.name!r}: {left} of {len(record.trials)} trials to run; folder: {self._folder}")
        self._remaining = RemainingTime(record.trials, self._workers, costs(record))

    def see(self, event: Event) -> None:
        now = time.monotonic()
        self._remaining.see(event, now)
        if event.kind not in ("done", "diverged", "failed", "busy"):
            return
        point = ", ".join(f"{name}={label}" for name, label in event.point.items() if name != "task")
        why = f": {event.message}" if event.message else ""
        seconds = self._remaining.recent(now) if event.finished < event.total else None
        left = "" if seconds is None else f"  (about {duration(seconds)} left)"
        _print(f"[{event.finished}/{event.total}] {event.kind} {point}{why}{left}")


def _print(text: str) -> None:
    """Print a text to standard output in whatever encoding that has, without control characters."""
    if sys.stdout is not None:
        print(encodable(escape_controls(text), getattr(sys.stdout, "encoding", None) or "utf-8"), flush=True)


@contextmanager
def _main_not_run_again() -> Iterator[None]:
    """Start worker processes without running the main file again: they load the function's file instead.

    Python's multiprocessing runs the main file again in each new process. A script without
    `if __name__ == "__main__":` would start the study again there.
    """
    main = sys.modules["__main__"]
    hidden = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).pop("__file__", None)
    vars(main)["__spec__"] = None
    try:
        yield
    finally:
        vars(main).update(hidden)
