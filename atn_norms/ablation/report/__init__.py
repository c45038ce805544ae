"""A study as a page one would show a colleague: pictures, tables and sentences, all derived from the record."""

from __future__ import annotations

from pathlib import Path

from atn_norms.ablation.files import make_folder
from atn_norms.ablation.files import write as put
from atn_norms.ablation.records import StudyRecord
from atn_norms.ablation.report.tables import Table, latex, markdown, results_csv, table

__all__ = ["Table", "table", "write"]


def write(record: StudyRecord, folder: Path | str) -> list[Path]:
    """Write the report of a study, finished or not, and return its files, the page first.

        report.html    heatmap-TASK, curves-TASK, strip-TASK as .png and .svg    results.csv    tables.md    tables.tex

    The same record always gives the same bytes. Errors: `StoreError` naming the file that cannot be written.
    """
    from atn_norms.ablation.report.html import page, pictures

    drawn = pictures(record)
    content: dict[str, bytes] = {"report.html": page(record, drawn).encode()}
    for picture in (picture for group in drawn for picture in group):
        content |= {f"{picture.name}.png": picture.png, f"{picture.name}.svg": picture.svg.encode()}
    content["results.csv"] = results_csv(record).encode()
    content["tables.md"] = markdown(record).encode()
    content["tables.tex"] = latex(record).encode()
    folder = Path(folder)
    make_folder(folder)
    for name, data in content.items():
        put(folder / name, data)
    return [folder / name for name in content]
