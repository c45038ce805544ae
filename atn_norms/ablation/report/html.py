"""The page: everything in one file, nothing loaded from elsewhere, every name from a file escaped."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from ruamel.yaml import YAML

from atn_norms.ablation.comparison import ENOUGH_SEEDS, RESAMPLES, Point, compare, outcome
from atn_norms.ablation.records import StudyRecord, TrialRecord
from atn_norms.ablation.report.canvas import Picture
from atn_norms.ablation.report.curves import curves
from atn_norms.ablation.report.heatmap import heatmap
from atn_norms.ablation.report.names import NOTHING, labels, leaf, name, number, plural, slugs
from atn_norms.ablation.report.sentences import answer, question
from atn_norms.ablation.report.strip import strip
from atn_norms.ablation.report.tables import Table, contrasts, reason, tables, task_of


@dataclass(frozen=True)
class Section:
    """One task of the page."""

    task: str
    facts: str
    pictures: tuple[Picture, ...]
    table: Table


def pictures(record: StudyRecord) -> list[tuple[Picture, ...]]:
    """The three pictures of every task."""
    names = slugs(list(record.tasks))
    return [
        tuple(draw(record, comparison, f"{kind}-{slug}") for kind, draw in _KINDS.items())
        for slug, comparison in zip(names, compare(record), strict=True)
    ]


_KINDS = {"heatmap": heatmap, "curves": curves, "strip": strip}


def page(record: StudyRecord, drawn: list[tuple[Picture, ...]]) -> str:
    """The page as text; its pictures are the ones given, as inline SVG."""
    here = resources.files("atn_norms.ablation.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    seconds = [_seconds(trial) for trial in record.trials]
    return template.render(
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        name=record.name,
        question=question(record),
        answer=answer(record, compare(record), contrasts(record)),
        sections=list(_sections(record, drawn)),
        wrong=[trial for trial in _lines(record) if trial["status"] in ("failed", "diverged")],
        axes=[leaf(axis) for axis in record.axes],
        trials=_lines(record),
        cost=duration(sum(found for found in seconds if found is not None)),
        timed=plural(sum(found is not None for found in seconds), "trial"),
        environment=list(_flat(record.environment)),
        study=_yaml(record.study),
        resamples=f"{RESAMPLES:,}",
        enough=ENOUGH_SEEDS,
    )


def _sections(record: StudyRecord, drawn: list[tuple[Picture, ...]]) -> Iterator[Section]:
    for task, group, found in zip(record.tasks, drawn, tables(record), strict=True):
        facts = record.tasks[task]
        trivial = ", ".join(f"{label}: {number(value)}" for label, value in facts.baselines.items())
        words = f"{facts.metric}, lower is better" + (f". Trivial predictors: {trivial}." if trivial else ".")
        yield Section(task, words, group, found)


def _lines(record: StudyRecord) -> list[dict[str, Any]]:
    """Every trial as the page lists it."""
    rows = {trial.id: row for c in compare(record) for row in c.rows for trial in row.point.trials}
    return [_line(record, trial, rows[trial.id].point if trial.id in rows else None) for trial in record.trials]


def _line(record: StudyRecord, trial: TrialRecord, point: Point | None) -> dict[str, Any]:
    task = task_of(trial)
    facts = record.tasks.get(task)
    metrics = ((trial.result or {}).get("metrics") or {}).get("test") or {}
    value = metrics.get(facts.metric) if facts else None
    seconds = _seconds(trial)
    return {
        "id": trial.id,
        "task": task,
        "name": name(record, point) if point else "",
        "labels": list(labels(record, point).values()) if point else [NOTHING for _ in record.axes],
        "seed": trial.seed,
        "status": outcome(record, trial),
        "value": number(float(value)) if isinstance(value, int | float) else NOTHING,
        "step": (trial.result or {}).get("step", trial.curve[-1].get("step", NOTHING) if trial.curve else NOTHING),
        "seconds": NOTHING if seconds is None else duration(seconds),
        "attempts": (trial.run or {}).get("attempts", NOTHING),
        "reason": reason(record, trial),
        "traceback": str((trial.error or {}).get("traceback") or ""),
    }


def _seconds(trial: TrialRecord) -> float | None:
    value = (trial.run or {}).get("seconds")
    return float(value) if isinstance(value, int | float) else None


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(4.25), duration(272), duration(7322)
    ('4.2 s', '4 min 32 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", str(entry)


def _yaml(study: Mapping[str, Any]) -> str:
    """The study as a file that `ablate` reads."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    text = io.StringIO()
    yaml.dump(dict(study), text)
    return text.getvalue()
