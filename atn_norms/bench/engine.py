"""Run the cases in order: laws first, then times in turn, then memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import torch

from atn_norms.bench import memory
from atn_norms.bench.contest import Refused, Runner, module_of
from atn_norms.bench.laws import PROBES, broken_law
from atn_norms.bench.machine import KEPT, available_memory, facts, load_average, set_malloc
from atn_norms.bench.records import Bench, CaseResult, Row, compared
from atn_norms.bench.spec import TEXTBOOK, TORCH, BenchSpec, Case
from atn_norms.bench.textbook import footprint
from atn_norms.bench.timing import LEAST, Clock, interleaved, whole_call

OnCase = Callable[[CaseResult], None]


def measure(spec: BenchSpec, on_case: OnCase | None = None, clock: Clock = perf_counter) -> Bench:
    """Measure every case of a run; `on_case` receives each result.

    The number of threads is restored. With malloc `keep` or `both` the process keeps its memory from then on.

    Errors: `SpecError` for a case that no layer has, before anything is measured.
    """
    cases, machine = spec.cases(), facts()
    judged: dict[tuple[object, ...], str | None] = {}
    results = []
    threads = torch.get_num_threads()
    try:
        for case in cases:
            set_malloc(case.malloc)
            torch.set_num_threads(case.threads)
            results.append(_measured(case, spec, judged, clock))
            if on_case is not None:
                on_case(results[-1])
    finally:
        torch.set_num_threads(threads)
    malloc = {"default": "as the system has it", "keep": KEPT}
    setting = f"first {malloc['default']}, then {KEPT}" if spec.malloc == "both" else malloc[spec.malloc]
    return Bench(machine, spec.model_dump(mode="json"), tuple(results), setting)


def _measured(case: Case, spec: BenchSpec, judged: dict[tuple[object, ...], str | None], clock: Clock) -> CaseResult:
    before = load_average()
    pairs = [(TORCH, None), *((name, window) for window in spec.windows for name in spec.runners)]
    allowed = spec.budget / (LEAST * (len(pairs) - 1))
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    estimates: dict[str, float] = {}
    for name, window in pairs:
        row = Row(name, window)
        admitted = _admitted(case, row, judged)
        if isinstance(admitted, Row):
            rows[row.label] = admitted
            continue
        # Everything is compared with torch.nn, and a runner within four times its time is never skipped.
        limit = max(allowed, 4 * estimates.get(TORCH, 0.0)) if name != TORCH else float("inf")
        try:
            seconds = whole_call(admitted.call, case.size.steps, limit, clock)
        except Exception as error:  # noqa: BLE001  the other runners still get their figures
            rows[row.label] = replace(row, status="failed", reason=f"{type(error).__name__}: {error}")
            continue
        if isinstance(seconds, str):
            rows[row.label] = replace(row, status="skipped", reason=seconds)
            continue
        rows[row.label], estimates[row.label] = row, seconds
        calls[row.label] = admitted.call(case.size.steps)
    for label, samples in interleaved(calls, estimates, spec.budget, clock).items():
        rows[label] = rows[label].timed(samples)
    if spec.memory and case.mode == "training":
        rows = {label: _with_memory(case, row, spec.budget) if label in calls else row for label, row in rows.items()}
    return CaseResult(case, compared(list(rows.values())), (before, load_average()))


def _admitted(case: Case, row: Row, judged: dict[tuple[object, ...], str | None]) -> Runner | Row:
    """Return a runner that may be timed, or a row with the reason."""
    if row.window is None:
        return Runner(case, row.runner, None)
    try:
        module_of(replace(case, size=PROBES[1].size), row.runner, row.window)
        if row.runner == TEXTBOOK and (reason := _too_large(case, row.window)):
            return replace(row, status="skipped", reason=reason)
        same = replace(case, size=PROBES[0].size, mode=str(case.mode == "training"), malloc="", input_gradient=False)
        key = (same, row.runner, row.window)
        if key not in judged:
            judged[key] = broken_law(case, row.runner, row.window)
        if (broken := judged[key]) is not None:
            return replace(row, status="laws fail", reason=broken)
        return Runner(case, row.runner, row.window)
    except Refused as refused:
        return replace(row, status="refused", reason=str(refused))


def _too_large(case: Case, window: int | str) -> str | None:
    if not isinstance(window, int):
        return None
    cell = case.layer(window).equations()
    itemsize = torch.finfo(getattr(torch, case.dtype)).bits // 8
    steps = case.size.steps if case.mode == "training" else 1
    needed = 2 * footprint(window, steps, case.size.batch, sum(cell.sites.values()), itemsize)
    there = available_memory()
    if there is None or needed < there / 2:
        return None
    return f"too large here: it would hold about {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free"


def _with_memory(case: Case, row: Row, budget: float) -> Row:
    if not memory.can_measure():
        return replace(row, reason="memory: this system does not let a process set its peak back")
    found = memory.growth(case, row.runner, row.window, timeout=60 + 4 * budget)
    return replace(row, reason=found) if isinstance(found, str) else replace(row, memory=found)
