"""The cost of a study: the time of its trials for each point, and the machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atn_norms.ablation.analysis.intervals import mean, median
from atn_norms.ablation.report.findings import Findings
from atn_norms.ablation.report.names import NOTHING, name
from atn_norms.ablation.store.records import StudyRecord, TrialRecord
from atn_norms.errors import plural


@dataclass(frozen=True)
class Cost:
    """The cost of one point of one task, as text for the page."""

    task: str
    point: str
    timed: int
    typical: str
    extremes: str
    step: str
    total: str


def costs(found: Findings) -> list[Cost]:
    """Return the cost of every point that has a trial with a recorded time."""
    return [
        _cost(task.task, name(found.record, row.point), times)
        for task in found.tasks
        for row in task.final.rows
        if (times := {trial.id: (trial, spent) for trial in row.point.trials if (spent := seconds(trial)) is not None})
    ]


def _cost(task: str, point: str, times: Mapping[str, tuple[TrialRecord, float]]) -> Cost:
    spent = [value for _, value in times.values()]
    per_step = [value / steps for trial, value in times.values() if (steps := (trial.result or {}).get("step"))]
    return Cost(
        task=task,
        point=point,
        timed=len(spent),
        typical=duration(median(spent)),
        extremes=f"{duration(min(spent))} to {duration(max(spent))}" if len(spent) > 1 else NOTHING,
        step=f"{1000 * mean(per_step):.3g} ms" if per_step else NOTHING,
        total=duration(sum(spent)),
    )


def total(record: StudyRecord) -> str:
    """Return a sentence with the total time of all trials."""
    spent = [value for trial in record.trials if (value := seconds(trial)) is not None]
    if not spent:
        return "No trial has recorded its time."
    again = sum(int((trial.run or {}).get("attempts", 1)) > 1 for trial in record.trials)
    taken = f", {again} of them in more than one attempt" if again else ""
    return f"{duration(sum(spent))} of computing in {plural(len(spent), 'trial')}{taken}."


def machines(record: StudyRecord) -> list[tuple[str, str]]:
    """Return each machine with its number of trials and, if recorded, its processor and versions.

    A last line lists the seeds whose trials ran on different processors, which round differently.
    """
    runs = [(trial.seed, trial.run) for trial in record.trials if trial.run]
    found = Counter((str(run.get("host", NOTHING)), _described(run)) for _, run in runs)
    lines = [
        (f"trained on {host}", f"{plural(count, 'trial')}{f', {described}' if described else ''}")
        for (host, described), count in sorted(found.items())
    ]
    kinds: dict[int, set[str]] = {}
    for seed, run in runs:
        kinds.setdefault(seed, set()).update(filter(None, [run.get("processor")]))
    mixed = [str(seed) for seed, names in sorted(kinds.items()) if len(names) > 1]
    return lines + ([("seeds with trials on different processors", ", ".join(mixed))] if mixed else [])


def _described(run: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in (run.get("versions") or {}).items()]
    return ", ".join([*filter(None, [run.get("processor")]), *versions])


def seconds(trial: TrialRecord) -> float | None:
    """Return the seconds of all attempts of a trial; None if they are not recorded."""
    value = (trial.run or {}).get("seconds")
    return float(value) if isinstance(value, int | float) else None


def duration(spent: float) -> str:
    """Format seconds in readable units.

    >>> duration(4.25), duration(272), duration(7322)
    ('4.2 s', '4 min 32 s', '2 h 2 min')
    """
    if spent < 59.95:
        return f"{spent:.1f} s"
    minutes, rest = divmod(round(spent), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
