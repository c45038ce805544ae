"""The report of a study: pictures, tables and sentences, all computed from the record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from atn_norms.ablation.report.archive import MOST_BYTES, is_report, read
from atn_norms.ablation.report.findings import Findings, findings
from atn_norms.ablation.report.tables import Table, table
from atn_norms.ablation.store.files import Folder, StoreError
from atn_norms.ablation.store.records import StudyRecord
from atn_norms.drawing import import_matplotlib
from atn_norms.errors import SpecError, unknown

__all__ = ["FORMATS", "Findings", "Table", "findings", "is_report", "read", "table", "write"]

FORMATS = ("svg", "png", "md", "tex")
# The links of a page to the files that depend on the options of `write`.
_LINK = re.compile(
    rb'href="((?:forest|curves|(?:steps-)?(?:heatmap|strip))-[a-z0-9-]+\.(?:svg|png)|tables\.(?:md|tex))"'
)


def write(
    record: StudyRecord | Findings,
    folder: Folder | Path | str,
    reach: Mapping[str, float] | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write the report of a study, finished or not, and return its files, the page first.

        report.html    forest-TASK, heatmap-TASK, curves-TASK, strip-TASK, steps-heatmap-TASK, steps-strip-TASK
        results.csv    points.csv    curves.csv    study.yaml    study.json    tables.md    tables.tex

    | symbol    | meaning                                                                                        |
    |-----------|------------------------------------------------------------------------------------------------|
    | `record`  | a study, or its `findings` if they are computed already                                        |
    | `reach`   | task -> level for steps to a level; it replaces `reach` of the study and the default level     |
    | `formats` | the files of pictures (`svg`, `png`) and tables (`md`, `tex`) to write; the page has all       |

    The files of an earlier report in the folder are replaced, and those that this report does not have are removed.
    The same record always gives the same bytes. `read` returns the record of a folder that `write` wrote.

    Errors: `SpecError` for a level of an unknown task, or an unknown format; `StoreError` that names the file that
    cannot be written, or that `read` would refuse for its size.
    """
    import_matplotlib()
    from atn_norms.ablation.report import archive, csv_export, html, tables
    from atn_norms.specs import to_yaml

    for each in formats:
        if each not in FORMATS:
            raise SpecError.of([unknown("format", each, FORMATS, path=("formats",))])
    found = record if isinstance(record, Findings) else findings(record, reach)
    sections = html.sections(found)
    content: dict[str, bytes] = {"report.html": html.page(found, sections, formats).encode()}
    for picture in (shown.picture for section in sections for shown in section.shown()):
        files = {"png": picture.png, "svg": picture.svg.encode()}
        content |= {f"{picture.name}.{ending}": data for ending, data in files.items() if ending in formats}
    content["results.csv"] = csv_export.results_csv(found).encode()
    content["points.csv"] = csv_export.points_csv(found).encode()
    content["curves.csv"] = csv_export.curves_csv(found).encode()
    content["study.yaml"] = to_yaml(html.study(found.record)).encode()
    content["study.json"] = archive.study_json(found.record).encode()
    written = {"md": tables.markdown, "tex": tables.latex}
    content |= {f"tables.{ending}": make(found).encode() for ending, make in written.items() if ending in formats}
    place = folder if isinstance(folder, Folder) else Folder(folder)
    archive.refuse_size(place, content)
    place.make()
    place.remove_leftovers()
    for name in _linked(place) - content.keys():
        place.remove(name)
    for name in sorted(content, key=lambda name: name not in archive.RECORD):  # a killed process leaves a report
        place.write(name, content[name])
    return [place.path / name for name in content]


def _linked(folder: Folder) -> set[str]:
    """Return the pictures and tables that the page of an earlier report links to; a user's files are not among them."""
    if folder.has("report.html"):
        with suppress(StoreError):  # the new page replaces one that cannot be read
            return {name.decode() for name in _LINK.findall(folder.read("report.html", MOST_BYTES))}
    return set()
