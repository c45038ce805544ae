"""Print the tables of docs/results/index.md from the reports in this folder: `python docs/results/summary.py`.

All declared comparisons of all reports are one family here, so the p-values are adjusted for all of them at once.
"""

from __future__ import annotations

from pathlib import Path

from atn_norms.ablation import report
from atn_norms.ablation.analysis.comparison import Comparison, Difference, Row
from atn_norms.ablation.analysis.decision import decide
from atn_norms.ablation.report.names import NOTHING, chances, change, name, seeds_needed, verdict

HERE = Path(__file__).parent
STUDIES = sorted(path.parent for path in HERE.glob("*/study.json"))
Compared = tuple[str, str, Row, Difference]


def main() -> str:
    """Return the table of verdicts and the table of steps to a level, in Markdown."""
    found = {folder.name: report.findings(report.read(folder)) for folder in STUDIES}
    ends: list[Compared] = []
    steps: list[Compared] = []
    for study, each in found.items():
        for task in each.tasks:
            point = [name(each.record, row.point) for row in task.primary.rows]
            ends += _compared(study, point, task.primary)
            steps += _compared(study, point, task.speed.comparison) if task.speed else []
    decisions = decide([difference for *_, difference in ends], [None] * len(ends))
    verdicts = [
        [
            f"[{study}]({study}/report.html)",
            point,
            str(difference.pairs),
            change(difference),
            chances(difference.p),
            chances(difference.paired.p_sign_flip) if difference.paired else NOTHING,
            chances(decision.p),
            NOTHING if decision.power is None else f"{decision.power:.2f}",
            seeds_needed(decision) if decision.verdict == "undecided" else "",
            verdict(decision),
        ]
        for (study, point, _, difference), decision in zip(ends, decisions, strict=True)
    ]
    headers = ["study", "point", "n", "difference to window 1", "p", "p, sign flip", "adjusted p", "power"]
    first = _markdown([*headers, "seeds needed", "verdict"], verdicts)
    soon = [[study, point, str(d.pairs), change(d), chances(d.p)] for study, point, row, d in steps if _ever(row, d)]
    return f"{first}\n{_markdown(['study', 'point', 'n', 'steps, difference to window 1', 'p, unadjusted'], soon)}"


def _compared(study: str, points: list[str], comparison: Comparison) -> list[Compared]:
    rows = zip(points, comparison.rows, strict=True)
    return [(study, point, row, row.against) for point, row in rows if row.against]


def _ever(row: Row, difference: Difference) -> bool:
    """Whether a seed of either side reached the level."""
    return any(point.lost < len(point.scores) for point in (row.point, difference.reference))


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(main(), end="")
