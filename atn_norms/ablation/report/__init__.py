"""A study as a page one would show a colleague: pictures, tables and sentences, all derived from the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from atn_norms.ablation.report.tables import Table, table
from atn_norms.ablation.store.files import make_folder
from atn_norms.ablation.store.files import write as put
from atn_norms.ablation.store.records import StudyRecord

__all__ = ["Table", "table", "write"]


def write(record: StudyRecord, folder: Path | str, reach: Mapping[str, float] | None = None) -> list[Path]:
    """Write the report of a study, finished or not, and return its files, the page first.

        report.html    heatmap-TASK, curves-TASK, strip-TASK, steps-heatmap-TASK, steps-strip-TASK as .png and .svg
        results.csv    points.csv    curves.csv    tables.md    tables.tex

    `reach`: task -> the level whose first reaching is timed, in place of the study's own and the default. The same
    record always gives the same bytes. Errors: `SpecError` for a level of a task that is not there; `StoreError` naming
    the file that cannot be written.
    """
    from atn_norms.ablation.report import csv_export, html, tables
    from atn_norms.ablation.report.findings import findings

    found = findings(record, reach)
    sections = html.sections(found)
    content: dict[str, bytes] = {"report.html": html.page(found, sections).encode()}
    for picture in (shown.picture for section in sections for shown in (*section.final, *section.speed)):
        content |= {f"{picture.name}.png": picture.png, f"{picture.name}.svg": picture.svg.encode()}
    content["results.csv"] = csv_export.results_csv(found).encode()
    content["points.csv"] = csv_export.points_csv(found).encode()
    content["curves.csv"] = csv_export.curves_csv(found).encode()
    content["tables.md"] = tables.markdown(found).encode()
    content["tables.tex"] = tables.latex(found).encode()
    folder = Path(folder)
    make_folder(folder)
    for name, data in content.items():
        put(folder / name, data)
    return [folder / name for name in content]
