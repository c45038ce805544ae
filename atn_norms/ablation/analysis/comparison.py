"""Compare the points of the grid under a measure, seed by seed, with a named baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS, EXPLODED, Interval, mean, median, wilson
from atn_norms.ablation.analysis.paired import ALPHA, Paired
from atn_norms.ablation.store.records import Goal, Status, StudyRecord, TaskFacts, TrialRecord

Verdict = Literal["helps", "hurts", "no difference", "undecided"]
Cell = tuple[tuple[str, str], ...]
Labels = dict[str, str]


@dataclass(frozen=True)
class Measure:
    """A number of each trial, by which trials are compared.

    | field   | meaning                                                                                             |
    |---------|-----------------------------------------------------------------------------------------------------|
    | `name`  | the name of the number                                                                              |
    | `goal`  | `min` if a smaller number is better, `max` if a larger number is better                             |
    | `score` | trial -> number; infinite, as the worst value, if it ended without one; None if it has not ended    |
    | `limit` | value that replaces an infinite number in a mean; None: means exclude infinite numbers              |
    | `log`   | True: logarithms are averaged and compared, so means are geometric and differences are ratios       |
    | `ratio_margin` | True: a margin is a ratio, also where a score that is not positive prevents logarithms       |
    | `resolution` | a number may be up to this much smaller than measured                                          |
    """

    name: str
    goal: Goal
    score: Callable[[TrialRecord], float | None]
    limit: float | None = None
    log: bool = False
    ratio_margin: bool = False
    resolution: float = 0.0

    def scaled(self, value: float) -> float:
        """Convert a score to the scale on which scores are averaged and subtracted; infinite scores stay infinite."""
        return math.log(value) if self.log and math.isfinite(value) else value

    def unscaled(self, value: float) -> float:
        """Convert a mean back to the unit of the scores; with `log`, a difference becomes a ratio."""
        return math.exp(min(value, 700.0)) if self.log and math.isfinite(value) else value


def score_name(metric: str) -> str:
    """Return the name of a metric on the test split, which the name of a function's metric may hold.

    >>> score_name("accuracy"), score_name("test accuracy")
    ('test accuracy', 'test accuracy')
    """
    return metric if metric.split(" ")[0].split("_")[0].lower() == "test" else f"test {metric}"


def final(record: StudyRecord, task: str) -> Measure:
    """Measure the test metric at the end of training; a diverged trial ranks last and is excluded from means."""
    facts = record.tasks[task]
    return in_logarithm(Measure(score_name(facts.metric), facts.goal, lambda trial: score(trial, facts)), record, task)


def tail(record: StudyRecord, task: str, validations: int) -> Measure:
    """Measure the mean of the last validations; a diverged trial ranks last and is excluded from means."""
    facts = record.tasks[task]

    def last(trial: TrialRecord) -> float | None:
        end = score(trial, facts)
        if end is None or math.isinf(end):
            return end
        values = [line["validation"] for line in trial.curve if is_number(line.get("validation"))]
        return mean(values[-validations:]) if values else None

    name = f"mean of the last {validations} validations of {facts.metric}"
    return in_logarithm(Measure(name, facts.goal, last), record, task)


def in_logarithm(measure: Measure, record: StudyRecord, task: str) -> Measure:
    """Return a measure of logarithms if the task's spread is multiplicative and every finite score is positive."""
    if record.tasks[task].spread != "multiplicative":
        return measure
    scores = (measure.score(trial) for trial in record.trials if trial.points and trial.points[0].get("task") == task)
    return replace(measure, log=all(x is None or x > 0 or math.isinf(x) for x in scores), ratio_margin=True)


def is_number(value: object) -> bool:
    """Return True for a number below 1e30 in size."""
    return isinstance(value, int | float) and abs(value) < EXPLODED


def score(trial: TrialRecord, facts: TaskFacts, split: str = "test") -> float | None:
    """Return the final metric of a trial on a split: the worst, infinite value if it diverged; None before its end.

    A trial whose final metric is no number, or is beyond 1e30, counts as diverged, whatever its status.
    """
    worst = math.inf if facts.goal == "min" else -math.inf
    if trial.status == "diverged":
        return worst
    if trial.status != "done" or trial.result is None:
        return None
    value = trial.result.get("metrics", {}).get(split, {}).get(facts.metric)
    return float(value) if isinstance(value, int | float) and abs(value) < EXPLODED else worst


def outcome(record: StudyRecord, trial: TrialRecord) -> Status:
    """Return the status of a trial; a trial whose final metric is beyond 1e30 counts as diverged."""
    task = trial.points[0].get("task", "") if trial.points else ""
    if trial.status != "done" or task not in record.tasks:
        return trial.status
    found = score(trial, record.tasks[task])
    return "diverged" if found is not None and math.isinf(found) else "done"


@dataclass(frozen=True)
class Point:
    """One distinct point of the grid under one measure, with every seed of the study.

    | field        | meaning                                                                                 |
    |--------------|-----------------------------------------------------------------------------------------|
    | `cells`      | the grid cells that resolve to the point: several if, without a norm, the window varies |
    | `trials`     | the trials of the point, by seed, whatever their status                                 |
    | `ends`       | seed -> status of the trial                                                             |
    | `scores`     | seed -> number of the trial, which may be infinite (`Measure`); no entry if unfinished  |
    | `measure`    | the measure of the numbers                                                              |
    | `tuned`      | tuned option -> the value with the best validation, at which `trials` were trained      |
    | `candidates` | the trials of the point at all values of the tuned options                              |
    | `repeated`   | whether the finished trials have one test metric and one curve, so the seed has no effect |
    """

    cells: tuple[Labels, ...]
    trials: tuple[TrialRecord, ...]
    ends: Mapping[int, Status]
    scores: Mapping[int, float]
    measure: Measure
    tuned: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[TrialRecord, ...] = ()
    repeated: bool = False

    @cached_property
    def counted(self) -> dict[int, float]:
        """Seed -> number that enters a mean: finite, and at most the limit of the measure."""
        limit = self.measure.limit
        if limit is not None:
            return {seed: min(value, limit) for seed, value in self.scores.items()}
        return {seed: value for seed, value in self.scores.items() if math.isfinite(value)}

    @property
    def values(self) -> list[float]:
        """The numbers that enter a mean, by seed."""
        return list(self.counted.values())

    @cached_property
    def scaled(self) -> dict[int, float]:
        """Seed -> number on the scale on which numbers are averaged and subtracted."""
        return {seed: self.measure.scaled(value) for seed, value in self.counted.items()}

    @property
    def lost(self) -> int:
        """The number of finished seeds without a finite number: the trial diverged, or never reached the level."""
        return sum(math.isinf(value) for value in self.scores.values())

    @property
    def diverged(self) -> int:
        """The number of diverged trials."""
        return self.counts["diverged"]

    @property
    def counts(self) -> Counter[str]:
        """Trials by outcome: `done`, `diverged`, `failed`, `running`, `pending`."""
        return Counter(self.ends.values())

    @cached_property
    def mean(self) -> float:
        """Mean of `values`, geometric under a logarithmic measure; NaN without values."""
        return self.measure.unscaled(mean(list(self.scaled.values())))

    @cached_property
    def median(self) -> float:
        """Median over all finished seeds; infinite if half of them or more have no finite number."""
        return median(self.scores.values())

    @cached_property
    def interval(self) -> Interval | None:
        """95% interval of the mean; None below two numbers, and if all are equal."""
        found = Paired.of(list(self.scaled.values()))
        if found is None or not found.deviation:
            return None
        return Interval(self.measure.unscaled(found.interval.low), self.measure.unscaled(found.interval.high))


@dataclass(frozen=True)
class Difference:
    """The difference of a point and its reference, paired by seed; of logarithms under a logarithmic measure.

        mean        = 1/n sum_s (point_s - reference_s)                                           (derived)
        improvement = 1/m sum_s [point_s better than reference_s] + [point_s = reference_s] / 2

    | field         | meaning                                                                                       |
    |---------------|-----------------------------------------------------------------------------------------------|
    | `values`      | seed -> difference on the measure's scale, for the n seeds at which both sides enter a mean     |
    | `mean`        | mean of `values`; NaN without a pair                                                            |
    | `paired`      | tests and intervals of `mean`; None for fewer than two pairs, and if `ignores_seed`             |
    | `median`      | median difference of all ranked pairs; may be infinite if sides have no finite number           |
    | `improvement` | probability of improvement, 0 to 1; a side without a finite number loses, two such sides tie    |
    | `chance`      | Wilson interval of `improvement`; None without a pair                                           |
    | `ranked`      | m, the number of seeds at which both trials ended                                               |
    | `unreached`   | the number of these seeds at which a trial never reached the level, and counts with the limit   |
    | `diverged`    | number of all seeds at which the point diverged, also where the reference has no score          |
    | `reference_diverged` | number of all seeds at which the reference diverged                                      |
    | `failed`      | number of all seeds at which the trial of the point failed                                      |
    | `reference_failed`   | number of all seeds at which the trial of the reference failed                           |
    """

    reference: Point
    values: Mapping[int, float]
    mean: float
    paired: Paired | None
    median: float
    improvement: float
    chance: Interval | None
    ranked: int
    unreached: int
    diverged: int
    reference_diverged: int
    failed: int = 0
    reference_failed: int = 0

    @classmethod
    def between(cls, point: Point, reference: Point) -> Difference:
        """Pair `point` with `reference` by seed."""
        ours, theirs, measure = point.scaled, reference.scaled, point.measure
        ranked = [seed for seed in point.scores if seed in reference.scores]
        values = {seed: ours[seed] - theirs[seed] for seed in ranked if seed in ours and seed in theirs}
        one_result = point.repeated and reference.repeated
        sign = 1 if measure.goal == "min" else -1
        scored = [(point.scores[seed], reference.scores[seed]) for seed in ranked]
        wins = sum(float(sign * mine < sign * other) + float(mine == other) / 2 for mine, other in scored)
        # With a limit all numbers are finite; without a limit infinite scores still rank, and two of them tie.
        ends = [(ours.get(s, point.scores[s]), theirs.get(s, reference.scores[s])) for s in ranked]
        return cls(
            reference=reference,
            values=values,
            mean=mean(list(values.values())),
            paired=None if one_result else Paired.of(list(values.values())),
            median=median(0.0 if mine == other else mine - other for mine, other in ends),
            improvement=wins / len(ranked) if ranked else math.nan,
            chance=wilson(wins, len(ranked)),
            ranked=len(ranked),
            unreached=0 if measure.limit is None else sum(math.isinf(a) or math.isinf(b) for a, b in scored),
            diverged=point.diverged,
            reference_diverged=reference.diverged,
            failed=point.counts["failed"],
            reference_failed=reference.counts["failed"],
        )

    @property
    def measure(self) -> Measure:
        """The measure of both sides."""
        return self.reference.measure

    @property
    def pairs(self) -> int:
        """The number of seeds at which both sides enter a mean."""
        return len(self.values)

    @property
    def ignores_seed(self) -> bool:
        """True if the seed has no effect on either side: such pairs are one result, repeated."""
        return self.pairs > 1 and self.paired is None

    @property
    def interval(self) -> Interval | None:
        """95% interval of `mean`; None without `paired`, and if all differences are equal."""
        return self.paired.interval if self.paired and self.paired.deviation else None

    @property
    def p(self) -> float | None:
        """Two-sided p-value of "no difference", without correction; None without `paired`."""
        return self.paired.p if self.paired else None

    @property
    def effect(self) -> float:
        """`mean` in the unit of the measure: a difference, or a ratio under a logarithmic measure."""
        return self.measure.unscaled(self.mean)

    @property
    def effect_interval(self) -> Interval | None:
        """95% interval of `effect`."""
        unscaled = self.measure.unscaled
        return Interval(unscaled(self.interval.low), unscaled(self.interval.high)) if self.interval else None

    @property
    def lost(self) -> tuple[int, int]:
        """The numbers of seeds at which the point, and its reference, diverged or failed."""
        return self.diverged + self.failed, self.reference_diverged + self.reference_failed

    @property
    def ahead(self) -> bool:
        """True if the point is better than its reference on average."""
        return (self.mean < 0) == (self.measure.goal == "min") and self.mean != 0

    @property
    def verdict(self) -> Verdict:
        """The verdict of this comparison without correction, for exploratory tables."""
        return self.verdict_at(self.p)

    def verdict_at(self, p: float | None) -> Verdict:
        """Return `helps` or `hurts` if there are five pairs, p is below 5%, and the better side ended at every seed."""
        if p is None or self.pairs < ENOUGH_SEEDS or p >= ALPHA:
            return "undecided"
        if self.lost[0 if self.ahead else 1]:
            return "undecided"
        return "helps" if self.ahead else "hurts"


@dataclass(frozen=True)
class Row:
    """A point with its difference to the reference, unless it is the reference; to the first if there are `several`."""

    point: Point
    against: Difference | None
    is_reference: bool
    several: bool = False  # such as those of no norm, which is trained once for all windows


@dataclass(frozen=True)
class Comparison:
    """One task under one measure: a row per distinct point, in the order of the grid; `index` maps cells to rows."""

    task: str
    measure: Measure
    rows: tuple[Row, ...]
    index: Mapping[Cell, Row]

    def at(self, cell: Mapping[str, str]) -> Row | None:
        """Return the row of one grid cell (axis -> label)."""
        return self.index.get(_key(cell))

    @property
    def has_reference(self) -> bool:
        """True if any row is compared with another row."""
        return any(row.against for row in self.rows)

    @property
    def best(self) -> Row | None:
        """The row with the best mean; of equal rows, the one with fewest lost seeds. None without a finished trial."""
        sign = 1 if self.measure.goal == "min" else -1
        finished = (row for row in self.rows if row.point.values)
        return min(finished, key=lambda row: (sign * row.point.mean, row.point.lost), default=None)


def compare(record: StudyRecord, baseline: Mapping[str, str] | None = None) -> tuple[Comparison, ...]:
    """Compare every point of every task by its final metric with the point that has the baseline's labels.

    `baseline`: axis -> label; None selects the baseline of the study. On all other axes the two points are equal:
    `{"norm": "none"}` compares a GRU with the GRU without a norm. A point without such a partner has no difference.
    """
    return tuple(compare_task(record, task, final(record, task), baseline) for task in record.tasks)


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
        reference = next(filter(None, partners), None)
        against = None if reference is None or reference is point else Difference.between(point, reference)
        rows.append(Row(point, against, reference is point, len(set(map(id, partners))) > 1))
    return Comparison(task, measure, tuple(rows), {_key(cell): row for row in rows for cell in row.point.cells})


def _points(record: StudyRecord, task: str, measure: Measure) -> Iterator[Point]:
    """Yield the distinct points of a task, each at its best values of the tuned options."""
    order = {axis: {label: place for place, label in enumerate(labels)} for axis, labels in record.axes.items()}

    def place(cell: Cell) -> list[int]:
        labels = dict(cell)
        return [places.get(labels.get(axis, ""), len(places)) for axis, places in order.items()]

    groups: dict[tuple[Cell, ...], list[TrialRecord]] = {}
    for trial in record.trials:
        own = [_key(point, record.tune) for point in trial.points if point.get("task") == task]
        cells = tuple(sorted(set(own), key=place))
        if cells:
            groups.setdefault(cells, []).append(trial)
    for cells in sorted(groups, key=lambda cells: place(cells[0])):
        candidates = tuple(sorted(groups[cells], key=lambda trial: trial.seed))
        tuned, trials = _tuned(record, task, candidates)
        scored = {trial.seed: measure.score(trial) for trial in trials}
        yield Point(
            cells=tuple(dict(cell) for cell in cells),
            trials=trials,
            ends={trial.seed: outcome(record, trial) for trial in trials},
            scores={seed: value for seed, value in scored.items() if value is not None},
            measure=measure,
            tuned=tuned,
            candidates=candidates,
            repeated=_repeated(trials, record.tasks[task]),
        )


def _repeated(trials: tuple[TrialRecord, ...], facts: TaskFacts) -> bool:
    """Check whether several trials are done, and all of them have the same test metric and curve."""
    results = [(score(trial, facts), trial.curve) for trial in trials if trial.status == "done"]
    return len(results) > 1 and all(each == results[0] for each in results)


def _tuned(record: StudyRecord, task: str, trials: tuple[TrialRecord, ...]) -> tuple[Labels, tuple[TrialRecord, ...]]:
    """Return the values of the tuned options with the best mean validation, and the trials at these values.

    The mean is over the seeds at which the trials of all values have ended, or over the seeds of each value if they
    share none. Fewer diverged trials are better, at any seed. A value without an outcome is not chosen.
    """
    if not record.tune:
        return {}, trials
    found: dict[Cell, list[TrialRecord]] = {}
    for trial in trials:
        found.setdefault(_key({axis: trial.points[0][axis] for axis in record.tune}), []).append(trial)
    facts = record.tasks[task]
    measure = in_logarithm(Measure("", facts.goal, lambda trial: score(trial, facts, "validation")), record, task)
    sign = 1 if facts.goal == "min" else -1
    scores = {
        cell: {trial.seed: value for trial in own if (value := measure.score(trial)) is not None}
        for cell, own in found.items()
    }
    scored = {cell: own for cell, own in scores.items() if own} or scores
    shared = set.intersection(*(set(own) for own in scored.values()))

    def cost(cell: Cell) -> tuple[int, float]:
        values = [measure.scaled(scores[cell][seed]) for seed in sorted(shared or scores[cell])]
        finite = [value for value in values if math.isfinite(value)]
        return sum(map(math.isinf, scores[cell].values())), sign * mean(finite) if finite else 0.0

    places = {label: i for labels in record.tune.values() for i, label in enumerate(labels)}
    best = min(sorted(scored, key=lambda cell: [places[label] for _, label in cell]), key=cost)
    return dict(best), tuple(found[best])


def _key(cell: Mapping[str, str], without: Iterable[str] = ()) -> Cell:
    return tuple(sorted((axis, label) for axis, label in cell.items() if axis != "task" and axis not in without))
