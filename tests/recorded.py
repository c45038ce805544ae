"""Study records made by hand, for what reads them."""

from collections.abc import Callable, Mapping, Sequence

from atn_norms.ablation.records import StudyRecord, TaskFacts, TrialRecord

METRIC = "mean squared error"
Score = Callable[[str, str, int], float]


def trial(
    norm: str, windows: Sequence[str], seed: int, value: float | None, task: str = "adding", metric: str = METRIC
) -> TrialRecord:
    """A finished trial of the given test metric; pending where the value is None."""
    points = tuple({"task": task, "norm": norm, "window": window} for window in windows)
    identity = f"{task}-{norm}-{'-'.join(windows)}-{seed}"
    if value is None:
        return TrialRecord(identity, {"seed": seed}, points, seed, "pending")
    metrics = {"test": {metric: value}, "validation": {metric: value * 1.01}}
    return TrialRecord(
        identity,
        {"seed": seed},
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
    """A complete study in which `score(norm, window, seed)` says every test metric; no norm has a single point."""
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
