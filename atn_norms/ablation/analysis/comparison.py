"""What the trials of a study say about each point of its grid, compared seed by seed with a named baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS, EXPLODED, Interval, bootstrap, mean, median, wilson
from atn_norms.ablation.store.records import Goal, Status, StudyRecord, TaskFacts, TrialRecord

Verdict = Literal["better", "worse", "undecided", "too few seeds"]
Cell = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Measure:
    """What a trial is judged by.

    | field   | meaning                                                                                             |
    |---------|-----------------------------------------------------------------------------------------------------|
    | `name`  | what its number is called                                                                           |
    | `goal`  | whether smaller (`min`) or larger (`max`) is better                                                 |
    | `score` | trial -> number; infinite, at the bad end, where it ended without one; None where it has not ended  |
    | `limit` | what such an infinite number counts as in a mean; None where it has no part in one                  |
    """

    name: str
    goal: Goal
    score: Callable[[TrialRecord], float | None]
    limit: float | None = None


def final(facts: TaskFacts) -> Measure:
    """The test metric at the end of training: a trial that diverged ranks last and has no part in a mean."""
    return Measure(facts.metric, facts.goal, lambda trial: score(trial, facts))


def score(trial: TrialRecord, facts: TaskFacts, split: str = "test") -> float | None:
    """The trial's metric on a split in the end; infinity at the bad end where it diverged; None without an outcome.

    A trial that ended with a metric that is no number, or beyond 1e30, diverged too, whatever its status says.
    """
    worst = math.inf if facts.goal == "min" else -math.inf
    if trial.status == "diverged":
        return worst
    if trial.status != "done" or trial.result is None:
        return None
    value = trial.result.get("metrics", {}).get(split, {}).get(facts.metric)
    return float(value) if isinstance(value, int | float) and abs(value) < EXPLODED else worst


def outcome(record: StudyRecord, trial: TrialRecord) -> Status:
    """The trial's status, where one that ended with a metric out of all bounds counts as diverged."""
    task = trial.points[0].get("task", "") if trial.points else ""
    if trial.status != "done" or task not in record.tasks:
        return trial.status
    found = score(trial, record.tasks[task])
    return "diverged" if found is not None and math.isinf(found) else "done"


@dataclass(frozen=True)
class Point:
    """One distinct point of the grid under one measure, with every seed that was asked for.

    | field     | meaning                                                                                |
    |-----------|----------------------------------------------------------------------------------------|
    | `cells`   | the grid cells that resolve to it: one, or several (no norm: the window means nothing) |
    | `trials`  | its trials, by seed, whatever became of them                                           |
    | `ends`    | seed -> what became of its trial                                                       |
    | `scores`  | seed -> its number, infinite where it has none (`Measure`); no entry without outcome   |
    | `measure` | what the numbers are                                                                   |
    """

    cells: tuple[dict[str, str], ...]
    trials: tuple[TrialRecord, ...]
    ends: Mapping[int, Status]
    scores: Mapping[int, float]
    measure: Measure

    @cached_property
    def counted(self) -> dict[int, float]:
        """Seed -> the number that counts in a mean: finite, at most the measure's limit."""
        limit = self.measure.limit
        if limit is not None:
            return {seed: min(value, limit) for seed, value in self.scores.items()}
        return {seed: value for seed, value in self.scores.items() if math.isfinite(value)}

    @property
    def values(self) -> list[float]:
        """The numbers that count in a mean, by seed."""
        return list(self.counted.values())

    @property
    def lost(self) -> int:
        """How many seeds have an outcome and no number of their own: diverged, or never there."""
        return sum(math.isinf(value) for value in self.scores.values())

    @property
    def diverged(self) -> int:
        """How many trials diverged."""
        return self.counts["diverged"]

    @property
    def counts(self) -> Counter[str]:
        """Trials by outcome: `done`, `diverged`, `failed`, `running`, `pending`."""
        return Counter(self.ends.values())

    @cached_property
    def mean(self) -> float:
        """Mean of the numbers that count; NaN when there is none."""
        return mean(self.values)

    @cached_property
    def median(self) -> float:
        """Median over all seeds with an outcome, those without a number last; infinite where half or more have none."""
        return median(self.scores.values())

    @cached_property
    def interval(self) -> Interval | None:
        """Bootstrap interval of the mean."""
        return bootstrap(self.values)


@dataclass(frozen=True)
class Difference:
    """A point against its reference, paired by seed.

        mean        = 1/n sum_s (point_s - reference_s)                                           (derived)
        improvement = 1/m sum_s [point_s better than reference_s] + [point_s = reference_s] / 2

    | field         | meaning                                                                                       |
    |---------------|-----------------------------------------------------------------------------------------------|
    | `mean`        | in the measure's unit; NaN without a pair                                                     |
    | `interval`    | its bootstrap interval; None below two pairs                                                  |
    | `median`      | of the differences of all ranked pairs; infinite where most have a side without a number      |
    | `pairs`       | n, the seeds where both have a number that counts                                             |
    | `improvement` | probability of improvement, 0 to 1; a side without a number loses, two of them tie            |
    | `chance`      | its Wilson interval; None without a pair                                                      |
    | `ranked`      | m, the seeds where both have an outcome                                                       |
    | `diverged`    | of these, how many times the point diverged; `reference_diverged`: how many times the other   |
    """

    reference: Point
    mean: float
    interval: Interval | None
    median: float
    pairs: int
    improvement: float
    chance: Interval | None
    ranked: int
    diverged: int
    reference_diverged: int

    @classmethod
    def between(cls, point: Point, reference: Point) -> Difference:
        """Pair `point` with `reference` by seed."""
        ours, theirs = point.counted, reference.counted
        ranked = [seed for seed in point.scores if seed in reference.scores]
        paired = [ours[seed] - theirs[seed] for seed in ranked if seed in ours and seed in theirs]
        sign = 1 if point.measure.goal == "min" else -1
        scored = [(point.scores[seed], reference.scores[seed]) for seed in ranked]
        wins = sum(float(sign * mine < sign * other) + float(mine == other) / 2 for mine, other in scored)
        # A limit makes numbers of all scores; without one the infinite ones still rank, and two of them tie.
        ends = [(ours.get(s, point.scores[s]), theirs.get(s, reference.scores[s])) for s in ranked]
        return cls(
            reference=reference,
            mean=mean(paired),
            interval=bootstrap(paired),
            median=median(0.0 if mine == other else mine - other for mine, other in ends),
            pairs=len(paired),
            improvement=wins / len(ranked) if ranked else math.nan,
            chance=wilson(wins, len(ranked)),
            ranked=len(ranked),
            diverged=sum(point.ends[seed] == "diverged" for seed in ranked),
            reference_diverged=sum(reference.ends[seed] == "diverged" for seed in ranked),
        )

    @property
    def verdict(self) -> Verdict:
        """What may be claimed: five pairs, an interval without zero, and a winner that never diverged."""
        if self.pairs < ENOUGH_SEEDS or self.interval is None:
            return "too few seeds"
        if not self.interval.excludes(0.0):
            return "undecided"
        ahead = (self.interval.high < 0) == (self.reference.measure.goal == "min")
        if self.diverged if ahead else self.reference_diverged:
            return "undecided"
        return "better" if ahead else "worse"


@dataclass(frozen=True)
class Row:
    """A point and, where its reference is another point, how it differs from that."""

    point: Point
    against: Difference | None
    is_reference: bool


@dataclass(frozen=True)
class Comparison:
    """One task under one measure: a row per distinct point in the grid's order, and where each cell finds its row."""

    task: str
    measure: Measure
    rows: tuple[Row, ...]
    index: Mapping[Cell, Row]

    def at(self, cell: Mapping[str, str]) -> Row | None:
        """The row of one grid cell (axis -> label)."""
        return self.index.get(_key(cell))

    @property
    def has_reference(self) -> bool:
        """Whether any row is compared with another."""
        return any(row.against for row in self.rows)

    @property
    def best(self) -> Row | None:
        """The row with the best mean, of equals the one that lost fewest seeds; None where no trial has finished."""
        sign = 1 if self.measure.goal == "min" else -1
        finished = (row for row in self.rows if row.point.values)
        return min(finished, key=lambda row: (sign * row.point.mean, row.point.lost), default=None)


def compare(record: StudyRecord, baseline: Mapping[str, str] | None = None) -> tuple[Comparison, ...]:
    """Compare every point of every task by its final metric with the point that has the baseline's labels.

    `baseline`: axis -> label; the study's own when None. Axes it does not name are matched: `{"norm": "none"}` compares
    a GRU with the un-normalized GRU. Points without such a partner have no difference.
    """
    return tuple(compare_task(record, task, final(facts), baseline) for task, facts in record.tasks.items())


def compare_task(
    record: StudyRecord, task: str, measure: Measure, baseline: Mapping[str, str] | None = None
) -> Comparison:
    """Compare every point of one task by any measure, as `compare` does by the final metric."""
    named = record.baseline if baseline is None else baseline
    points = list(_points(record, task, measure))
    home = {_key(cell): point for point in points for cell in point.cells}
    rows = []
    for point in points:
        partners = [home.get(_key({**cell, **named})) for cell in point.cells] if named else []
        # Cells that collapsed into one point could ask for different partners; then none is the right one.
        reference = partners[0] if partners and all(partner is partners[0] for partner in partners) else None
        is_reference = reference is point
        against = Difference.between(point, reference) if reference is not None and not is_reference else None
        rows.append(Row(point, against, is_reference))
    return Comparison(task, measure, tuple(rows), {_key(cell): row for row in rows for cell in row.point.cells})


def _points(record: StudyRecord, task: str, measure: Measure) -> Iterator[Point]:
    """The distinct points of a task: trials that stand for the same grid cells differ by seed alone."""
    order = {axis: {label: place for place, label in enumerate(labels)} for axis, labels in record.axes.items()}

    def place(cell: Cell) -> list[int]:
        labels = dict(cell)
        return [places.get(labels.get(axis, ""), len(places)) for axis, places in order.items()]

    groups: dict[tuple[Cell, ...], list[TrialRecord]] = {}
    for trial in record.trials:
        cells = tuple(sorted((_key(point) for point in trial.points if point.get("task") == task), key=place))
        if cells:
            groups.setdefault(cells, []).append(trial)
    for cells in sorted(groups, key=lambda cells: place(cells[0])):
        trials = tuple(sorted(groups[cells], key=lambda trial: trial.seed))
        scored = {trial.seed: measure.score(trial) for trial in trials}
        yield Point(
            cells=tuple(dict(cell) for cell in cells),
            trials=trials,
            ends={trial.seed: outcome(record, trial) for trial in trials},
            scores={seed: value for seed, value in scored.items() if value is not None},
            measure=measure,
        )


def _key(cell: Mapping[str, str]) -> Cell:
    return tuple(sorted((axis, label) for axis, label in cell.items() if axis != "task"))
