"""The HTML page of a report: one file without external resources; every text from a study is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from atn_norms.ablation.analysis.comparison import Point, outcome, score_name
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS
from atn_norms.ablation.analysis.paired import RESAMPLED_FROM, RESAMPLES
from atn_norms.ablation.report import costs
from atn_norms.ablation.report.canvas import Picture
from atn_norms.ablation.report.csv_export import reason, scored_step, task_of
from atn_norms.ablation.report.curves import curves, draws_seeds
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
    """A picture with its caption."""

    picture: Picture
    caption: str


@dataclass(frozen=True)
class Section:
    """The section of one task: verdict and answer, then pictures and tables by test metric and by speed."""

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
        """Return every picture of the section."""
        return [*([self.forest] if self.forest else []), *self.final, *self.speed]


def sections(found: Findings) -> list[Section]:
    """Draw the section of every task."""
    names = slugs([task.task for task in found.tasks])
    return [_section(found, task, slug) for slug, task in zip(names, found.tasks, strict=True)]


def _section(found: Findings, task: TaskFindings, slug: str) -> Section:
    record, facts = found.record, task.facts
    words = f"{facts.metric}, {lower(facts.goal)} is better."
    if facts.baselines:
        words += f" Scores of trivial predictors: {_trivial(facts.baselines)}."
    if facts.baselines_at:
        each = "; ".join(f"{_trivial(own)} at {options}" for options, own in facts.baselines_at.items())
        words += f" Scores of trivial predictors, which differ between points and are not drawn: {each}."
    if facts.notes:
        words += f" Data: {'; '.join(facts.notes)}."
    test, drawn = score_name(facts.metric), forest(record, task, f"forest-{slug}")
    grid = len(task.final.rows) > 1
    mean = "geometric mean" if task.final.measure.log else "mean"
    lines = _CURVES if draws_seeds(task.final) else _CURVES.replace("single seeds", "seeds that did not finish")
    drawn_curves = curves(record, task.final, f"curves-{slug}", task.level.value)
    final = [
        *([Shown(heatmap(record, task.final, f"heatmap-{slug}", test), _HEATMAP)] if grid else []),
        Shown(drawn_curves, lines.format(mean=mean)),
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


def _trivial(baselines: Mapping[str, float]) -> str:
    return listed([f"“{label}” {number(value)}" for label, value in baselines.items()])


_FOREST = (
    "Each row is a declared comparison. The bar is its 95% interval without correction. The verdict uses the "
    "adjusted p-value. So a bar may exclude “no effect” while the comparison is undecided. For “no difference "
    "larger than” the margin, it is the p-value of a difference of at least the margin."
)
_HEATMAP = (
    "Each cell is a point of the grid. If several cells are the same point, such as all windows without a norm, they "
    "are one rectangle. Hatched: no number."
)
_CURVES = (
    "Thin lines: single seeds. Thick line: {mean} of the finished seeds. Band: from the lowest to the highest of them, "
    "up to the last step that all of them have. Cross: a trial diverged or failed. Dashed black: the baseline, if it "
    "is in another panel."
)
_STRIP = "Every seed is a mark. In each row, the seeds are in order from top to bottom."
_STEPS = "The same for the steps to the level. “≥”: some seeds never reached the level and count with all steps."


def _reach(task: TaskFindings) -> str:
    """Return sentences about the level of the task and the count of its steps."""
    to, choose = task.level, min if task.facts.goal == "min" else max
    if to.value is None:
        return f"The task has no level: {to.why}. Set one with “reach” in the study."
    origin = f"The level, {number(to.value)}, was {to.why}."
    if not to.given:
        label, trivial = choose(task.facts.baselines.items(), key=lambda item: item[1])
        origin = (
            f"The level, {number(to.value)}, is {to.why} from the best trivial predictor ({label}, {number(trivial)}) "
            "to the best final mean validation of a point. It was chosen after the results were known, because the "
            "study does not set “reach”."
        )
    return (
        f"{origin} The resolution is the distance of two validations. Only the first {to.limit} steps count, which "
        "every trial has, and only validations at steps at which all trials have one, if there are any. A trial that "
        "does not reach the level counts with all of these steps in a mean and in a difference. Two such trials tie."
    )


def study(record: StudyRecord) -> dict[str, Any]:
    """Return the options that the study file sets."""
    return {name: each for name, each in record.study.items() if each is not None and each != {}}


def page(found: Findings, shown: list[Section], formats: Sequence[str]) -> str:
    """Return the page, with its pictures as inline SVG and links to the files of the `formats`."""
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
        options=[leaf(axis) for axis in (*record.axes, *record.tune)],
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
    """Return a line for every trial, as the page shows it."""
    rows = {trial.id: row.point for task in found.tasks for row in task.final.rows for trial in row.point.candidates}
    return [_line(found.record, trial, rows.get(trial.id)) for trial in found.record.trials]


def _line(record: StudyRecord, trial: TrialRecord, point: Point | None) -> dict[str, Any]:
    task = task_of(trial)
    facts = record.tasks.get(task)
    values = {axis: str(trial.points[0].get(axis, NOTHING)) for axis in record.tune}
    metrics = ((trial.result or {}).get("metrics") or {}).get("test") or {}
    value = metrics.get(facts.metric) if facts else None
    spent = costs.seconds(trial)
    return {
        "id": trial.id,
        "task": task,
        "name": ", ".join([name(record, point), *(f"{leaf(a)} {v}" for a, v in values.items())]) if point else "",
        "labels": [*(labels(record, point).values() if point else [NOTHING] * len(record.axes)), *values.values()],
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
    """Return the last step; all steps if the trial ended early; the scored step if it is not the last."""
    last = (trial.result or {}).get("step", trial.curve[-1].get("step", NOTHING) if trial.curve else NOTHING)
    scored, steps = scored_step(record, trial), trial.trial["train"]["steps"]
    early = f" of {steps}: {reason(record, trial)}" if trial.status == "done" and last < steps else ""
    return f"{last}{early}" if scored in (None, last) else f"{last}{early}, scored {scored}"


def _data(record: StudyRecord) -> list[tuple[str, str]]:
    """Return the content hashes of the data that the trials read."""
    found = {(task_of(t), option): str(h) for t in record.trials for option, h in (t.trial.get("data") or {}).items()}
    return [(f"{task} {option}", content) for (task, option), content in found.items()]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", str(entry)
