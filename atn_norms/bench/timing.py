"""Time several calls in turn, so that a disturbance of the machine affects all of them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

Call = Callable[[], object]
Clock = Callable[[], float]

LEAST = 3  # samples of everything that is timed at all
MOST = 60
LEAGUE = 8  # times the fastest: slower calls get few samples
SHORTEST = 2e-3  # seconds of one sample; shorter calls are repeated within it, or the clock would be what is timed


def whole_call(make: Callable[[int], Call], steps: int, allowed: float, clock: Clock = perf_counter) -> float | str:
    """Seconds of one warm call over all `steps`, or the reason why the call is skipped.

    Longer and longer beginnings of the sequence are timed. The remaining steps take at least as long in
    proportion to the last extension: steps get slower while a window fills.
    """
    before, length = (0, 0.0), min(4, steps)
    make(length)()  # the first call has extra work
    while True:
        call = make(length)
        seconds = _once(call, clock)
        for _ in range(2):  # the least of three, against disturbances
            per_step = min(seconds / length, max(0.0, seconds - before[1]) / (length - before[0]))
            least = seconds + per_step * (steps - length)
            judged = length == steps or length > 4
            if not judged or least <= allowed or seconds > 2 * allowed:
                break
            seconds = min(seconds, _once(call, clock))
        if judged and least > allowed:
            part = f"{length} of its {steps} steps" if length < steps else "one call"
            return f"too slow here: {part} took {seconds:.2g} s, and a call may take {allowed:.2g} s (see --budget)"
        if length == steps:
            return seconds
        before, length = (length, seconds), min(steps, 2 * length)


def _once(call: Call, clock: Clock) -> float:
    begin = clock()
    call()
    return clock() - begin


def interleaved(
    calls: Mapping[str, Call], estimates: Mapping[str, float], budget: float, clock: Clock = perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each sample; each round starts with another call.

    Calls of similar speed share the budget; much slower calls get LEAST samples, spread over the rounds.
    """
    estimates = {name: max(seconds, 1e-7) for name, seconds in estimates.items()}
    repeats = {name: math.ceil(SHORTEST / estimates[name]) for name in calls}
    league = [name for name in calls if estimates[name] <= LEAGUE * min(estimates.values())]
    share = budget / len(league)
    wanted = {n: int(share / (estimates[n] * repeats[n])) if n in league else 0 for n in calls}
    wanted = {name: min(MOST, max(LEAST, number)) for name, number in wanted.items()}
    rounds = max(wanted.values())
    every = {name: rounds // wanted[name] for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    begin = clock()
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if clock() - begin > 1.5 * budget and all(len(taken) >= LEAST for taken in samples.values()):
                break
            start = turn % len(names)
            for name in (*names[start:], *names[:start]):
                if turn % every[name] == 0:
                    samples[name].append(_sample(calls[name], repeats[name], clock))
    finally:
        if was_collecting:
            gc.enable()
    return samples


def _sample(call: Call, repeats: int, clock: Clock) -> float:
    def repeated() -> None:
        for _ in range(repeats):
            call()

    return _once(repeated, clock) / repeats


def best_and_median(samples: list[float]) -> tuple[float, float]:
    """Return the best and the median."""
    return min(samples), median(samples)
