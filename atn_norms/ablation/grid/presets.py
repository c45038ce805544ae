"""Ready-made studies: files of this package that run by name, and that `init` copies for editing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib import resources

from atn_norms.errors import SpecError, unknown

DEFAULT = "quick"


def names() -> list[str]:
    """Return the names of the ready-made studies.

    >>> names()[:4]
    ['charlm', 'paper-adding', 'paper-charlm', 'paper-copying']
    """
    files = resources.files("atn_norms.ablation.grid") / "studies"
    return sorted(file.name.removesuffix(".yaml") for file in files.iterdir() if file.name.endswith(".yaml"))


def is_name(word: str) -> bool:
    """Check whether a word names a ready-made study; a file has a suffix or a slash.

    >>> is_name("quick"), is_name("quick.yaml"), is_name("some/folder")
    (True, False, False)
    """
    return "." not in word and "/" not in word


def summary(name: str) -> str:
    """Return the summary of a ready-made study: the comment at the start of its file.

    >>> summary("quick")
    'A first study, in a minute or two: no norm and three normalizers, three windows, a toy task and a text, two seeds.'
    """
    comments = itertools.takewhile(lambda line: line.startswith("#"), text(name).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in comments)


def text(name: str) -> str:
    """Return the file of a ready-made study, as YAML text with comments; `SpecError` for an unknown name."""
    known = names()
    if name not in known:
        problem = unknown("study", name, known)
        raise SpecError.of([replace(problem, expected=f"a file or {problem.expected}")])
    return (resources.files("atn_norms.ablation.grid") / "studies" / f"{name}.yaml").read_text(encoding="utf-8")
