"""Print tables (drawn on a terminal, plain text in a pipe) and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from atn_norms.commands.output import emit, encodes_unicode, results
from atn_norms.text import CONTROLS, escape_controls

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with code 1 if a plugin failed or is slow to load.")]


def at_home(path: Path | None) -> Path | None:
    """Expand a leading ~ to the home folder, which shells do not expand in `--out=~/x`."""
    return None if path is None else Path(os.path.expanduser(path))


def all_at_home(paths: list[Path] | None) -> list[Path]:
    """Expand a leading ~ of each path."""
    return [Path(os.path.expanduser(path)) for path in paths or ()]


def example(*lines: str) -> str:
    """Lay out the examples that end a command's help."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])  # \b keeps the parser from filling lines


def on_terminal() -> bool:
    """Return whether results go to a terminal."""
    return results().isatty()


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=not encodes_unicode(), allow_nan=False)
    emit(CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table: drawn on a terminal, aligned plain text elsewhere."""
    title = escape_controls(title)
    cells = [["" if cell is None else escape_controls(str(cell)) for cell in row] for row in rows]
    if on_terminal():
        _draw(title, columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    emit(title)
    for row in [columns, *cells]:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Draw a table, or a list where the terminal is too narrow for whole words. Cells are text, not markup."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console, Group
    from rich.measure import Measurement
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(file=results())
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    sizes = [
        Measurement.get(console, console.options.update(width=10**6), Group(*map(Text, column)))
        for column in zip(columns, *rows, strict=True)
    ]
    for column, width in zip(columns, _widths(sizes, console.width - 2 * len(sizes)), strict=True):
        table.add_column(Text(column), width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    if sum(size.minimum for size in sizes) + 2 * len(sizes) <= console.width:
        console.print(table)
        return
    entries = Table.grid(Column(), Column(overflow="fold"), padding=(0, 1))
    for row in rows:
        parts = [
            Text(" ").join([Text(column, "dim"), Text(cell)] if column else [Text(cell)])
            for column, cell in zip(columns, row, strict=True)
            if cell
        ]
        entries.add_row("-", Text("; ").join(parts))
    console.print(Text(title, "bold"), entries)


def _widths(sizes: Sequence[Any], room: int) -> list[int]:
    """Return the width of each column. The widest columns are cut first, but never below their longest word."""
    widths = [size.maximum for size in sizes]
    while sum(widths) > room:
        wide = [place for place, size in enumerate(sizes) if widths[place] > size.minimum]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
