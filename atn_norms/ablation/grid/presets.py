"""Ready-made studies: files of this package that run by their name, and that `init` writes out for editing."""

from __future__ import annotations

import itertools
from importlib import resources

from atn_norms.errors import SpecError, did_you_mean, short_repr

DEFAULT = "quick"


def names() -> list[str]:
    """The ready-made studies.

    >>> names()[:4]
    ['charlm', 'paper-adding', 'paper-charlm', 'paper-copying']
    """
    files = resources.files("atn_norms.ablation.grid") / "studies"
    return sorted(file.name.removesuffix(".yaml") for file in files.iterdir() if file.name.endswith(".yaml"))


def is_name(word: str) -> bool:
    """Whether a word means a ready-made study and not a file: a study's file has a suffix, or it could not be read.

    >>> is_name("quick"), is_name("quick.yaml"), is_name("some/folder")
    (True, False, False)
    """
    return "." not in word and "/" not in word


def summary(name: str) -> str:
    """What a ready-made study is, in the words that its file begins with.

    >>> summary("quick")
    'A first look, in a minute or two: four normalizers, three windows, a toy and a text, two seeds.'
    """
    comments = itertools.takewhile(lambda line: line.startswith("#"), text(name).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in comments)


def text(name: str) -> str:
    """The file of a ready-made study, as YAML text with comments; `SpecError` where there is none of this name."""
    known = names()
    if name not in known:
        raise SpecError(
            f"unknown study {short_repr(name)}; a file, or one of: {', '.join(known)}{did_you_mean(name, known)}"
        )
    return (resources.files("atn_norms.ablation.grid") / "studies" / f"{name}.yaml").read_text(encoding="utf-8")
