"""The page: everything in one file, nothing loaded from elsewhere, every name from a file escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from atn_norms.ablation.analysis.comparison import Point, outcome
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS
from atn_norms.ablation.analysis.paired import RESAMPLED_FROM, RESAMPLES
from atn_norms.ablation.report import costs
from atn_norms.ablation.report.canvas import Picture
from atn_norms.ablation.report.csv_export import reason, scored_step, task_of
from atn_norms.ablation.report.curves import curves
from atn_norms.ablation.report.findings import Findings, TaskFindings
from atn_norms.ablation.report.forest import forest
from atn_norms.ablation.report.heatmap import heatmap
from atn_norms.ablation.report.names import NOTHING, labels, leaf, listed, lower, name, number, slugs
from atn_norms.ablation.report.sentences import answer, caution, coverage, endpoint, question, verdict_line
from atn_norms.ablation.report.strip import strip
from atn_norms.ablation.report.tables import NUMERIC, Table, final_table, speed_table, verdict_table
from atn_norms.ablation.store.records import StudyRecord, TrialRecord
from atn_norms.specs import to_yaml


@dataclass(frozen=True)
class Shown:
    """A picture with what a reader must know to read it."""

    picture: Picture
    caption: str


@dataclass(frozen=True)
class Section:
    """One task of the page: its verdict and answer, then pictures and a table by the test metric and by speed."""

    task: str
    facts: str
    verdict: str
    endpoint: str
    answer: list[str]
    forest: Shown | None
    verdicts: Table | None
    final: list[Shown]
    table: Table
    reach: str
    speed: list[Shown]
    speed_table: Table | None

    def shown(self) -> list[Shown]:
        """Every picture."""
        return [*([self.forest] if self.forest else []), *self.final, *self.speed]


def sections(found: Findings) -> list[Section]:
    """Everything the page shows, task by task, drawn."""
    names = slugs([task.task for task in found.tasks])
    return [_section(found, task, slug) for slug, task in zip(names, found.tasks, strict=True)]


def _section(found: Findings, task: TaskFindings, slug: str) -> Section:
    record, facts = found.record, task.facts
    trivial = [f"“{label}” {number(value)}" for label, value in facts.baselines.items()]
    words = f"{facts.metric}, {lower(facts.goal)} is better."
    if trivial:
        words += f" What trivial predictors score: {listed(trivial)}."
    if facts.notes:
        words += f" Data: {'; '.join(facts.notes)}."
    test, drawn = f"test {facts.metric}", forest(record, task, f"forest-{slug}")
    grid = len(task.final.rows) > 1
    final = [
        *([Shown(heatmap(record, task.final, f"heatmap-{slug}", test), _HEATMAP)] if grid else []),
        Shown(curves(record, task.final, f"curves-{slug}", task.level.value), _CURVES),
        Shown(strip(record, task.final, f"strip-{slug}", test, facts.baselines), _STRIP),
    ]
    speed = []
    if task.speed:
        steps = f"steps to reach {number(task.level.value)}"
        speed = [
            *([Shown(heatmap(record, task.speed.comparison, f"steps-heatmap-{slug}", steps), _STEPS)] if grid else []),
            Shown(strip(record, task.speed.comparison, f"steps-strip-{slug}", steps, {}), _STRIP),
        ]
    return Section(
        task=task.task,
        facts=words,
        verdict=verdict_line(found, task),
        endpoint=endpoint(found, task),
        answer=answer(found, task),
        forest=Shown(drawn, _FOREST) if drawn else None,
        verdicts=verdict_table(record, task),
        final=final,
        table=final_table(record, task),
        reach=_reach(task),
        speed=speed,
        speed_table=speed_table(record, task),
    )


_FOREST = (
    "Each row is a declared comparison. The bar is the 95% interval of this comparison alone. The verdict uses the "
    "adjusted p-value, so a bar may leave out 0 and the comparison still be undecided."
)
_HEATMAP = (
    "Each cell is a point of the grid. A point that means the same in several cells, such as any window without a "
    "norm, fills them all. Hatched: no number."
)
_CURVES = (
    "Thin lines: single seeds. Thick line: mean of the finished seeds, in the band from the lowest to the highest of "
    "them, as far as all of them trained. Cross: where a trial diverged or failed. Dashed black: the baseline, where "
    "it belongs to another panel."
)
_STRIP = "Every seed is a mark, in the order of the seeds from top to bottom of its row; none is left out."
_STEPS = "As above, for the steps it took; a cell with “≥” holds seeds that never got there and count as all the steps."


def _reach(task: TaskFindings) -> str:
    """The level of this task and the counting of its steps, as text."""
    to, choose = task.level, min if task.facts.goal == "min" else max
    if to.value is None:
        return f"No level is set whose first reaching could be timed: {to.why}. Name one with “reach” in the study."
    origin = f"The level, {number(to.value)}, was {to.why}."
    if not to.given:
        label, trivial = choose(task.facts.baselines.items(), key=lambda item: item[1])
        origin = (
            f"The level, {number(to.value)}, is {to.why} from the best trivial predictor ({label}, {number(trivial)}) "
            "to the best mean validation of a point at its end; the study names none; its option “reach” does."
        )
    return (
        f"{origin} A trial reaches it at the first validation that is there, so these steps are as coarse as the "
        f"validations are far apart. Only the first {to.limit} steps count, which every trial was given; one that is "
        "not there by then counts as all of them in a mean and in a difference, and ties with others like it."
    )


def study(record: StudyRecord) -> dict[str, Any]:
    """The options that the study's file names."""
    return {name: each for name, each in record.study.items() if each is not None and each != {}}


def page(found: Findings, shown: list[Section], formats: Sequence[str]) -> str:
    """The page as text, with its pictures as inline SVG and links to the files of the `formats`."""
    here = resources.files("atn_norms.ablation.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    record, lines = found.record, _lines(found)
    return template.render(
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        name=record.name,
        question=question(record),
        coverage=coverage(record),
        caution=caution(found),
        sections=shown,
        numeric=NUMERIC,
        wrong=[trial for trial in lines if trial["status"] in ("failed", "diverged")],
        axes=[leaf(axis) for axis in record.axes],
        trials=lines,
        total=costs.total(record),
        costs=costs.costs(found),
        environment=[*_flat(record.environment), *costs.machines(record)],
        data=_data(record),
        study=to_yaml(study(record)),
        formats=formats,
        resamples=f"{RESAMPLES:,}",
        enough=ENOUGH_SEEDS,
        resampled_from=RESAMPLED_FROM,
        tuned=bool(record.tune),
    )


def _lines(found: Findings) -> list[dict[str, Any]]:
    """Every trial as the page lists it."""
    rows = {trial.id: row.point for task in found.tasks for row in task.final.rows for trial in row.point.trials}
    return [_line(found.record, trial, rows.get(trial.id)) for trial in found.record.trials]


def _line(record: StudyRecord, trial: TrialRecord, point: Point | None) -> dict[str, Any]:
    task = task_of(trial)
    facts = record.tasks.get(task)
    metrics = ((trial.result or {}).get("metrics") or {}).get("test") or {}
    value = metrics.get(facts.metric) if facts else None
    spent = costs.seconds(trial)
    return {
        "id": trial.id,
        "task": task,
        "name": name(record, point) if point else "",
        "labels": list(labels(record, point).values()) if point else [NOTHING for _ in record.axes],
        "seed": trial.seed,
        "status": outcome(record, trial),
        "value": number(float(value)) if isinstance(value, int | float) else NOTHING,
        "step": _step(record, trial),
        "seconds": NOTHING if spent is None else costs.duration(spent),
        "attempts": (trial.run or {}).get("attempts", NOTHING),
        "reason": reason(record, trial),
        "traceback": str((trial.error or {}).get("traceback") or ""),
    }


def _step(record: StudyRecord, trial: TrialRecord) -> str:
    """The last step, of how many where it ended early, and the one whose weights were scored where that is another."""
    last = (trial.result or {}).get("step", trial.curve[-1].get("step", NOTHING) if trial.curve else NOTHING)
    scored, steps = scored_step(record, trial), trial.trial["train"]["steps"]
    early = f" of {steps}: {reason(record, trial)}" if trial.status == "done" and last < steps else ""
    return f"{last}{early}" if scored in (None, last) else f"{last}{early}, scored {scored}"


def _data(record: StudyRecord) -> list[tuple[str, str]]:
    """The data that the trials read, by content: the same files make the same trials."""
    found = {(task_of(t), option): str(h) for t in record.trials for option, h in (t.trial.get("data") or {}).items()}
    return [(f"{task} {option}", content) for (task, option), content in found.items()]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", str(entry)
