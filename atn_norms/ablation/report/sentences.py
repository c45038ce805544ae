"""The answer in words, made from the statistics: no direction is claimed without an interval behind it."""

from __future__ import annotations

from atn_norms.ablation.comparison import ENOUGH_SEEDS, Comparison, Row, outcome
from atn_norms.ablation.records import StudyRecord
from atn_norms.ablation.report.names import change, leaf, listed, name, number, plural, share
from atn_norms.ablation.report.tables import baseline_words

_ORDER = ("done", "diverged", "failed", "running", "pending")


def question(record: StudyRecord) -> str:
    """What was asked, in a sentence."""
    axes = [f"{leaf(axis)} ({', '.join(values)})" for axis, values in record.axes.items()]
    varied = " \N{MULTIPLICATION SIGN} ".join(axes) or "a single configuration"
    tasks = listed([f"{task} ({facts.metric})" for task, facts in record.tasks.items()])
    seeds = len({trial.seed for trial in record.trials})
    against = f" Every point is compared with {baseline_words(record)} at the same seeds." if record.baseline else ""
    return f"{varied} on {tasks}, {plural(seeds, 'seed')} each.{against}"


def answer(
    record: StudyRecord, comparisons: tuple[Comparison, ...], windowed: tuple[Comparison, ...] | None
) -> list[str]:
    """The answer as paragraphs: what there is to go by, then every task."""
    said = [" ".join(filter(None, (coverage(record), caution(comparisons))))]
    for place, comparison in enumerate(comparisons):
        told = _task(record, comparison) + (_windows(record, windowed[place]) if windowed else [])
        said.append(" ".join(told))
    return said


def coverage(record: StudyRecord) -> str:
    """How many trials ended how."""
    ends = [outcome(record, trial) for trial in record.trials]
    counts = {status: ends.count(status) for status in _ORDER}
    if counts["done"] == len(record.trials):
        return f"All {plural(len(record.trials), 'trial')} finished." if record.trials else "The study has no trials."
    rest = [f"{count} {status}" for status, count in counts.items() if count and status != "done"]
    return f"Of {plural(len(record.trials), 'trial')}, {counts['done']} finished; {listed(rest)}."


def caution(comparisons: tuple[Comparison, ...]) -> str:
    """A plain word where the seeds are too few for any conclusion."""
    pairs = [row.against.pairs for comparison in comparisons for row in comparison.rows if row.against]
    most = max(pairs, default=0)
    if not pairs or most >= ENOUGH_SEEDS:
        return ""
    return (
        f"With {plural(most, 'seed')} to compare, nothing here is a conclusion: a difference may well be chance, "
        f"and this report claims none on fewer than {ENOUGH_SEEDS}. The numbers say what happened at these seeds."
    )


def _task(record: StudyRecord, comparison: Comparison) -> list[str]:
    metric = record.tasks[comparison.task].metric
    finished = [row for row in comparison.rows if row.point.values]
    if not finished:
        return [f"On {comparison.task} no trial has finished."]
    best = min(finished, key=lambda row: row.point.mean)
    where = f"{number(best.point.mean)} ({name(record, best.point)})"
    lead = f"On {comparison.task} the lowest {metric}, averaged over seeds, is {where}"
    base = baseline_words(record)
    compared = [row for row in comparison.rows if row.against]
    if not comparison.has_reference:
        return [f"{lead}; there is no baseline in the study to compare it with."]
    if best.is_reference:
        said = [f"{lead}, which is the baseline."]
    elif best.against is None or not best.against.pairs:
        said = [f"{lead}; the baseline has no finished seed to compare it with."]
    else:
        hedge = ", which does not tell the two apart" if best.against.verdict == "undecided" else ""
        said = [f"{lead}: {change(best.against)} against {base}, better at {share(best.against)} seeds{hedge}."]
    if any(row.against and row.against.pairs >= ENOUGH_SEEDS for row in compared):
        said.append(f"Against {base}, {_verdicts(record, compared)}.")
    return said


def _windows(record: StudyRecord, comparison: Comparison) -> list[str]:
    compared = [row for row in comparison.rows if row.against and row.against.pairs]
    if not compared:
        return []
    if all(row.against and row.against.pairs < ENOUGH_SEEDS for row in compared):
        lower = sum(bool(row.against and row.against.mean < 0) for row in compared)
        return [
            f"Against window 1 of the same normalizer the mean is lower at {lower} of "
            f"{plural(len(compared), 'point')}, which so few seeds cannot tell from chance."
        ]
    return [f"Against window 1 of the same normalizer, {_verdicts(record, compared)}."]


def _verdicts(record: StudyRecord, rows: list[Row]) -> str:
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.against:
            groups.setdefault(row.against.verdict, []).append(name(record, row.point))
    told = []
    for verdict in ("better", "worse", "undecided", "too few seeds"):
        found = groups.get(verdict, [])
        if found:
            few = f" ({'; '.join(found)})" if len(found) <= 6 else ""
            told.append(f"{len(found)} {'with ' * (verdict == 'too few seeds')}{verdict}{few}")
    return f"of {plural(len(rows), 'point')}: {', '.join(told)}"
