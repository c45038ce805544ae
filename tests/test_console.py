"""Tables on a terminal: no text is cut at any width, and text is never parsed as markup."""

import re
from collections import Counter

import pytest

from atn_norms.commands import console

COLUMNS = ("task", "metric", "", "difference to layer[red]", "error")
ROWS = [
    ("adding", "mean squared error", "n=1", "\N{MINUS SIGN}0.0123 [\N{MINUS SIGN}0.02, 0.01]", "[bold]unknown[/bold]"),
    ("charlm", "bits per character", "n=2", "", None),
]


def on_screen(monkeypatch, capsys, width: int) -> list[str]:
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    console.print_table("a study [dim]of mine", COLUMNS, ROWS)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [30, 40, 120, 200])
def test_every_word_is_complete_in_lists_and_tables(monkeypatch, capsys, width):
    lines = on_screen(monkeypatch, capsys, width)
    assert all(len(line) <= width for line in lines)
    words = {word.strip(";") for line in lines for word in line.split()}
    for cell in ("a study [dim]of mine", *COLUMNS, *(cell or "" for row in ROWS for cell in row)):
        assert words >= set(cell.split())


@pytest.mark.parametrize("width", range(62, 130, 4))
def test_a_word_that_fits_the_terminal_is_not_broken(monkeypatch, capsys, width):
    label, path = "window=exponential(half_life=2.5)", f"/{'long-name/' * 4}last"
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    console.print_table("a study", ("point", "mean", "error"), [(label, "0.0123", f"cannot write {path}: no room")] * 2)
    text = capsys.readouterr().out
    assert text.count(label) == text.count(path + ":") == 2
    assert max(map(len, text.splitlines())) <= width


def test_a_word_longer_than_the_terminal_is_complete(monkeypatch, capsys):
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    path = f"/{'another-long-name/' * 5}last"
    console.print_table("a study", ("point", "error"), [("layer", path)])
    assert path in re.sub(r"\s", "", capsys.readouterr().out)


@pytest.mark.parametrize("width", range(45, 120, 5))
def test_no_text_is_cut_at_any_width(monkeypatch, capsys, width):
    text = "".join(lines := on_screen(monkeypatch, capsys, width))
    assert all(len(line) <= width for line in lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    wanted = "".join((*COLUMNS, *(cell or "" for row in ROWS for cell in row)))
    assert not Counter("".join(wanted.split())) - Counter(text)


def test_a_table_that_is_too_wide_becomes_a_list_without_empty_cells(monkeypatch, capsys):
    assert any(set(line) == {"\N{BOX DRAWINGS LIGHT HORIZONTAL}"} for line in on_screen(monkeypatch, capsys, 120))
    text = " ".join(" ".join(on_screen(monkeypatch, capsys, 40)).split())
    assert re.fullmatch(r"a study \[dim\]of mine - task adding; .*; n=1; difference .* - task charlm; .*; n=2", text)
