"""Results of a run: rows, their ratios to torch.nn, and their forms as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from atn_norms.bench.spec import TORCH, Case
from atn_norms.bench.timing import best_and_median


@dataclass(frozen=True)
class Row:
    """One runner in one case; times in seconds a call, `memory` in bytes, ratios to torch.nn's row.

    `status` is `measured`, `refused` (not supported), `skipped` (too slow or too large here), `laws fail`, or `failed`
    (it raised at this size). `reason` explains it, and only a measured row has figures. `spread` is median over best.
    """

    runner: str
    window: int | str | None
    status: str = "measured"
    reason: str = ""
    runs: int = 0
    best: float | None = None
    median: float | None = None
    spread: float | None = None
    ratio: float | None = None
    ratio_of_medians: float | None = None
    memory: int | None = None
    memory_ratio: float | None = None

    @property
    def label(self) -> str:
        """The runner, and its window."""
        if self.window is None:
            return self.runner
        return f"{self.runner}, {'k =' if isinstance(self.window, int) else 'window'} {self.window}"

    def timed(self, samples: Sequence[float]) -> Row:
        """Return the row with its times."""
        best, median = best_and_median(list(samples))
        return replace(self, runs=len(samples), best=best, median=median, spread=_over(median, best))


@dataclass(frozen=True)
class CaseResult:
    """One case: its rows, torch.nn's first, and the load average of the machine before and after it."""

    case: Case
    rows: tuple[Row, ...]
    load: tuple[float | None, float | None]

    @property
    def noise(self) -> float | None:
        """Median over best of torch.nn itself: 1 on a quiet machine."""
        return next((row.spread for row in self.rows if row.runner == TORCH), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        case = {**asdict(self.case), "size": self.case.size._asdict()}
        return {**case, "noise": self.noise, "load": list(self.load), "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class Bench:
    """A whole run: the machine, the options, the malloc setting, and every case."""

    machine: dict[str, Any]
    options: dict[str, Any]
    cases: tuple[CaseResult, ...]
    malloc: str

    @property
    def failed(self) -> list[Row]:
        """Rows without figures because their laws fail, or because they raised."""
        return [row for case in self.cases for row in case.rows if row.status in ("laws fail", "failed")]

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "machine": self.machine,
            "options": self.options,
            "malloc": self.malloc,
            "laws_hold": all(row.status != "laws fail" for row in self.failed),
            "cases": [case.to_dict() for case in self.cases],
        }

    def to_csv(self) -> str:
        """Return one line a row with a header; the columns of the case come first."""
        lines = []
        for case in self.cases:
            columns = case.to_dict()
            before, after = columns.pop("load")
            size, rows = columns.pop("size"), columns.pop("rows")
            lines += [{**size, **columns, "load_before": before, "load_after": after, **row} for row in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()


def compared(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Every measured row with its ratios to torch.nn: best over best, median over median, memory over memory."""
    torch_row = next(row for row in rows if row.runner == TORCH)
    return tuple(
        replace(
            row,
            ratio=_over(row.best, torch_row.best),
            ratio_of_medians=_over(row.median, torch_row.median),
            memory_ratio=_over(row.memory, torch_row.memory),
        )
        for row in rows
    )


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
