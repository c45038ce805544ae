"""What the trials of a study say about each point of its grid, compared seed by seed with a named baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from atn_norms.ablation.records import Status, StudyRecord, TrialRecord

RESAMPLES = 10_000
ENOUGH_SEEDS = 5
COVERAGE = 0.95
EXPLODED = 1e30  # beside a loss of this size no mean and no axis can show the others

Verdict = Literal["better", "worse", "undecided", "too few seeds"]
Cell = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Interval:
    """The ends of a percentile bootstrap interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether `value` lies strictly outside."""
        return value < self.low or value > self.high


def bootstrap(values: Sequence[float]) -> Interval | None:
    """Percentile bootstrap interval of a mean, 95% wide, from 10,000 resamples of a fixed seed.

        [q(0.025), q(0.975)]   of the means of n values drawn with replacement        Efron (1979)

    `values`: finite, of one unit; the interval has that unit. None below two values, which cannot be resampled.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(low=1.0, high=1.0)
    >>> bootstrap([1.0]) is None
    True
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return None
    draws = np.random.default_rng(0).integers(0, len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.quantile(sample[draws].mean(axis=1), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(low), float(high))


def score(trial: TrialRecord, metric: str) -> float | None:
    """The trial's test metric; infinity where it diverged, so that it ranks last; None where it has no outcome.

    A trial that ended with a metric that is no number, or beyond 1e30, diverged too, whatever its status says.
    """
    if trial.status == "diverged":
        return math.inf
    if trial.status != "done" or trial.result is None:
        return None
    value = trial.result.get("metrics", {}).get("test", {}).get(metric)
    return float(value) if isinstance(value, int | float) and abs(value) < EXPLODED else math.inf


def outcome(record: StudyRecord, trial: TrialRecord) -> Status:
    """The trial's status, where one that ended with a metric out of all bounds counts as diverged."""
    task = trial.points[0].get("task", "") if trial.points else ""
    if trial.status != "done" or task not in record.tasks:
        return trial.status
    return "diverged" if score(trial, record.tasks[task].metric) == math.inf else "done"


@dataclass(frozen=True)
class Point:
    """One distinct point of the grid, with every seed that was asked for.

    | field    | meaning                                                                                   |
    |----------|-------------------------------------------------------------------------------------------|
    | `cells`  | the grid cells that resolve to it: one, or several (no norm: the window means nothing)    |
    | `trials` | its trials, by seed, whatever became of them                                              |
    | `scores` | seed -> test metric, smaller is better; infinite where diverged; no entry without outcome |
    """

    cells: tuple[dict[str, str], ...]
    trials: tuple[TrialRecord, ...]
    scores: dict[int, float]

    @property
    def values(self) -> list[float]:
        """The finite scores, by seed."""
        return [value for value in self.scores.values() if math.isfinite(value)]

    @property
    def diverged(self) -> int:
        """How many trials diverged."""
        return len(self.scores) - len(self.values)

    @property
    def counts(self) -> Counter[str]:
        """Trials by outcome: `done`, `diverged`, `failed`, `running`, `pending`."""
        unsettled = Counter[str](trial.status for trial in self.trials if trial.seed not in self.scores)
        return unsettled + Counter({"done": len(self.values), "diverged": self.diverged})

    @cached_property
    def mean(self) -> float:
        """Mean of the finite scores; NaN when there is none."""
        return float(np.mean(self.values)) if self.values else math.nan

    @cached_property
    def median(self) -> float:
        """Median of all scores, a diverged trial ranking last; infinite when most diverged."""
        ordered = sorted(self.scores.values())
        if not ordered:
            return math.nan
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    @cached_property
    def interval(self) -> Interval | None:
        """Bootstrap interval of the mean."""
        return bootstrap(self.values)


@dataclass(frozen=True)
class Difference:
    """A point against its reference, paired by seed.

        mean        = 1/n sum_s (point_s - reference_s)                                    (derived)
        improvement = 1/m sum_s [point_s < reference_s] + [point_s = reference_s] / 2

    | field         | meaning                                                                                 |
    |---------------|-----------------------------------------------------------------------------------------|
    | `mean`        | in the metric's unit, negative where the point is better; NaN without a pair            |
    | `interval`    | its bootstrap interval; None below two pairs                                            |
    | `pairs`       | n, the seeds where both scores are finite                                               |
    | `improvement` | probability of improvement, 0 to 1; a diverged trial loses, two of them tie             |
    | `ranked`      | m, the seeds where both have an outcome                                                 |
    | `diverged`    | of these, how many times the point diverged; `reference_diverged`: how many times the other |
    """

    reference: Point
    mean: float
    interval: Interval | None
    pairs: int
    improvement: float
    ranked: int
    diverged: int
    reference_diverged: int

    @classmethod
    def between(cls, point: Point, reference: Point) -> Difference:
        """Pair `point` with `reference` by seed."""
        shared = [(point.scores[seed], reference.scores[seed]) for seed in point.scores if seed in reference.scores]
        finite = [ours - theirs for ours, theirs in shared if math.isfinite(ours) and math.isfinite(theirs)]
        wins = [float(ours < theirs) + float(ours == theirs) / 2 for ours, theirs in shared]
        return cls(
            reference=reference,
            mean=float(np.mean(finite)) if finite else math.nan,
            interval=bootstrap(finite),
            pairs=len(finite),
            improvement=float(np.mean(wins)) if wins else math.nan,
            ranked=len(wins),
            diverged=sum(math.isinf(ours) for ours, _ in shared),
            reference_diverged=sum(math.isinf(theirs) for _, theirs in shared),
        )

    @property
    def verdict(self) -> Verdict:
        """What may be claimed: five pairs, an interval without zero, and a winner that never diverged."""
        if self.pairs < ENOUGH_SEEDS or self.interval is None:
            return "too few seeds"
        if self.interval.high < 0 and not self.diverged:
            return "better"
        if self.interval.low > 0 and not self.reference_diverged:
            return "worse"
        return "undecided"


@dataclass(frozen=True)
class Row:
    """A point and, where its reference is another point, how it differs from that."""

    point: Point
    against: Difference | None
    is_reference: bool


@dataclass(frozen=True)
class Comparison:
    """One task: a row per distinct point in the grid's order, and where each grid cell finds its row."""

    task: str
    rows: tuple[Row, ...]
    index: Mapping[Cell, Row]

    def at(self, cell: Mapping[str, str]) -> Row | None:
        """The row of one grid cell (axis -> label)."""
        return self.index.get(_key(cell))

    @property
    def has_reference(self) -> bool:
        """Whether any row is compared with another."""
        return any(row.against for row in self.rows)


def compare(record: StudyRecord, baseline: Mapping[str, str] | None = None) -> tuple[Comparison, ...]:
    """Compare every point of every task with the point that has the baseline's labels and is otherwise the same.

    `baseline`: axis -> label; the study's own when None. Axes it does not name are matched: `{"norm": "none"}` compares
    a GRU with the un-normalized GRU. Points without such a partner have no difference.
    """
    named = record.baseline if baseline is None else baseline
    return tuple(_compare_task(record, task, named) for task in record.tasks)


def _compare_task(record: StudyRecord, task: str, baseline: Mapping[str, str]) -> Comparison:
    points = list(_points(record, task))
    home = {_key(cell): point for point in points for cell in point.cells}
    rows = []
    for point in points:
        partners = [home.get(_key({**cell, **baseline})) for cell in point.cells] if baseline else []
        # Cells that collapsed into one point could ask for different partners; then none is the right one.
        reference = partners[0] if partners and all(partner is partners[0] for partner in partners) else None
        is_reference = reference is point
        against = Difference.between(point, reference) if reference is not None and not is_reference else None
        rows.append(Row(point, against, is_reference))
    return Comparison(task, tuple(rows), {_key(cell): row for row in rows for cell in row.point.cells})


def _points(record: StudyRecord, task: str) -> Iterator[Point]:
    """The distinct points of a task: trials that stand for the same grid cells differ by seed alone."""
    order = {axis: {label: place for place, label in enumerate(labels)} for axis, labels in record.axes.items()}
    metric = record.tasks[task].metric

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
        scored = {trial.seed: score(trial, metric) for trial in trials}
        scores = {seed: value for seed, value in scored.items() if value is not None}
        yield Point(tuple(dict(cell) for cell in cells), trials, scores)


def _key(cell: Mapping[str, str]) -> Cell:
    return tuple(sorted((axis, label) for axis, label in cell.items() if axis != "task"))
