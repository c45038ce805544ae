"""Synthetic study records for tests of analysis and reports."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from atn_norms.ablation.report.findings import findings
from atn_norms.ablation.report.sentences import answer, caution, coverage, verdict_line
from atn_norms.ablation.store.records import StudyRecord, TaskFacts, TrialRecord

METRIC = "mean squared error"
Score = Callable[[str, str, int], float]
Point = dict[str, str]


def trial(
    norm: str, windows: Sequence[str], seed: int, value: float | None, task: str = "adding", metric: str = METRIC
) -> TrialRecord:
    """Return a finished trial with the given test metric; pending if the value is None."""
    points = tuple({"task": task, "norm": norm, "window": window} for window in windows)
    identity = f"{task}-{norm}-{'-'.join(windows)}-{seed}"
    if value is None:
        return TrialRecord(identity, {"seed": seed, "train": {"steps": 20}}, points, seed, "pending")
    metrics = {"test": {metric: value}, "validation": {metric: value * 1.01}}
    return TrialRecord(
        identity,
        {"seed": seed, "train": {"steps": 20}},
        points,
        seed,
        "done",
        result={"trial": identity, "outcome": "finished", "step": 20, "metrics": metrics},
        curve=[
            {"step": step, "train_loss": value * 30 / step, "validation": value * 20 / step if step % 10 == 0 else None}
            for step in range(5, 21, 5)
        ],
        run={"seconds": 2.5 + seed, "host": "here", "attempts": 1},
    )


def study(
    score: Score,
    *,
    norms: Sequence[str] = ("none", "layer", "rms"),
    windows: Sequence[str] = ("1", "25"),
    tasks: Mapping[str, TaskFacts] | None = None,
    seeds: int = 6,
    baseline: Mapping[str, str] | None = None,
) -> StudyRecord:
    """Return a complete study with test metrics `score(norm, window, seed)`; `none` has a single point."""
    tasks = {"adding": TaskFacts(METRIC, {"guessing one": 1 / 6})} if tasks is None else tasks
    trials = [
        trial(norm, group, seed, score(norm, group[0], seed), task, facts.metric)
        for task, facts in tasks.items()
        for norm in norms
        for group in ([windows] if norm == "none" else [(window,) for window in windows])
        for seed in range(seeds)
    ]
    return StudyRecord(
        name="by hand",
        study={"model": {"cell": "lstm"}, "axes": {"norm": list(norms), "window": list(windows)}, "seeds": seeds},
        environment={"python": "3", "versions": {"torch": "2"}},
        axes={"norm": list(norms), "window": list(windows)},
        tasks=dict(tasks),
        baseline={"norm": "none"} if baseline is None else dict(baseline),
        trials=tuple(trials),
    )


def score(norm: str, window: str, seed: int) -> float:
    """Score both norms far better than none, RMS better than layer, and longer windows slightly better."""
    return {"none": 0.15, "layer": 0.012, "rms": 0.009}[norm] * (1 + 0.1 * seed) / (1 + 0.01 * int(window))


def learned(final: float, start: float, seed: int, steps: int, every: int) -> list[dict]:
    """Return a learning curve with noise that leaves its plateau at a step and ends at `final`."""
    turn, curve = steps * (0.35 + 0.04 * (seed % 5)), []
    for step in range(every, steps + 1, every):
        fade = 1 / (1 + math.exp(12 * (step - turn) / steps)) * (1 if step < steps else 0)
        rough = 1 + 0.05 * math.sin(seed + 37 * step / steps) * (step < steps)
        value = (final + (start - final) * fade) * rough
        validated = step % (4 * every) == 0 or step == steps
        curve.append({"step": step, "train_loss": value * 1.03, "validation": value if validated else None})
    return curve


def grid(
    axes: Mapping[str, Sequence[str]],
    score: Callable[[Point, int], float],
    *,
    seeds: int = 5,
    baseline: Mapping[str, str] | None = None,
    facts: TaskFacts | None = None,
    task: str = "adding",
    name: str = "by hand",
    steps: int = 1000,
) -> StudyRecord:
    """Return a complete study over any axes, with curves; each trial ends at `score(labels, seed)`."""
    facts = TaskFacts(METRIC, {"always 1": 1 / 6}) if facts is None else facts
    start = next(iter(facts.baselines.values()), 1.0)
    groups: dict[tuple[tuple[str, str], ...], list[Point]] = {}
    for labels in itertools.product(*axes.values()):
        point = dict(zip(axes, labels, strict=True))
        meant = {axis: label for axis, label in point.items() if axis != "window" or point.get("norm") != "none"}
        groups.setdefault(tuple(meant.items()), []).append(point)
    trials = []
    for meant, points in groups.items():
        for seed in range(seeds):
            value = score(dict(meant), seed)
            identity = "-".join([task, *(label for _, label in meant), str(seed)])
            trials.append(
                TrialRecord(
                    identity,
                    {"seed": seed, "train": {"steps": steps}},
                    tuple({"task": task, **point} for point in points),
                    seed,
                    "done",
                    result={
                        "trial": identity,
                        "outcome": "finished",
                        "step": steps,
                        "metrics": {"test": {facts.metric: value}, "validation": {facts.metric: value}},
                    },
                    curve=learned(value, start, seed, steps, max(1, steps // 100)),
                    run={"seconds": 12.5 + seed, "host": "here", "attempts": 1},
                )
            )
    return StudyRecord(
        name=name,
        study={
            "model": {"cell": "lstm", "hidden_size": 60},
            "axes": {axis: list(values) for axis, values in axes.items()},
        },
        environment={"python": "3", "versions": {"torch": "2"}},
        axes={axis: list(values) for axis, values in axes.items()},
        tasks={task: facts},
        baseline=dict(baseline) if baseline else {},
        trials=tuple(trials),
    )


def verdict_text(record: StudyRecord) -> str:
    """Return the verdict and answer of a study's first task, with plain spaces, and hyphens as minus signs."""
    found = findings(record)
    task = found.tasks[0]
    words = " ".join([verdict_line(found, task), coverage(record), caution(found), *answer(found, task)])
    return words.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
