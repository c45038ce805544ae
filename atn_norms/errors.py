"""What is wrong with a specification, said so that it can be mended: where, what, what is allowed, what is nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

WORDS = re.compile(r"must be a valid (dictionary|tuple|list)\b")


class SpecError(ValueError):
    """Say what is wrong with a specification, one located problem a line.

    >>> print(SpecError(["norm.eps: must be positive, got -1", "window: must be at least 1, got 0"]))
    norm.eps: must be positive, got -1
    window: must be at least 1, got 0
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


def nearest(word: object, choices: Iterable[str]) -> str | None:
    """Name the choice most like a word, or None when none is like it.

    >>> nearest("laier", ["batch", "layer", "rms"]), nearest("?", ["batch"])
    ('layer', None)
    """
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """Render the nearest match as the tail of a message: `; nearest: 'layer'`, or nothing."""
    match = nearest(word, choices)
    return "" if match is None else f"; nearest: {match!r}"


def beside(path: Path) -> str:
    """Render the name most like that of a missing file or folder, of what lies beside it, as `hint` does."""
    try:
        return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return ""


def short_repr(value: object, most: int = 60) -> str:
    """Write a value as Python does, shortened where it is long.

    >>> short_repr("layer"), len(short_repr("x" * 1000))
    ("'layer'", 60)
    """
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits, which Python refuses to write
        return "a number of thousands of digits"
    return text if len(text) <= most else text[: most - 3] + "..."


def to_spec_error(
    error: ValidationError, where: Callable[[tuple[Any, ...]], str] | None = None, data: Any = None
) -> SpecError:
    """Turn pydantic's error into a SpecError: one line a problem, `place: path: what is wrong, got value`.

    Symbols: `where` path -> place (such as `study.yaml:3:7`); `data` the validated mapping, which tells a path's
    steps from the labels pydantic adds for the branches of a union, so that branches become one line.
    """
    lines: dict[tuple[Any, ...], list[str]] = {}
    for line in error.errors(include_url=False):
        path, said = located(line, data)
        if data is not None and line["type"] not in ("missing", "unknown_key", "unknown_kind"):
            path = _inside(path, data)
        lines.setdefault(path, []).append(said)
    problems = []
    for path, sentences in lines.items():
        place = where(path) if where is not None else ""
        parts = [place, brief(dotted(path)), ", or ".join(dict.fromkeys(sentences))]
        problems.append(": ".join(part for part in parts if part))
    return SpecError(problems)


def located(line: Any, data: Any) -> tuple[tuple[Any, ...], str]:
    """Where a line of pydantic's error belongs, and what it says.

    A check of several options says which one it blames by starting with it (`window: ...`); where `data` holds that
    option, it is the place.
    """
    path, said = line["loc"], sentence(line)
    if line["type"] == "value_error" and data is not None:
        names, rest = blamed(said)
        inner = (*path, *names)
        if names and _inside(inner, data) == inner:
            return inner, rest
    return path, said


def blamed(said: str) -> tuple[tuple[str, ...], str]:
    """The option that a sentence begins with, as a path, and the rest; the empty path where it begins with none.

    >>> blamed("train.batch_size: too large"), blamed("too large")
    ((('train', 'batch_size'), 'too large'), ((), 'too large'))
    """
    found = re.match(r"(\w+(?:\.[\w-]+)*): ", said)
    return (tuple(found[1].split(".")), said[found.end() :]) if found else ((), said)


def brief(text: str, most: int = 120) -> str:
    """Shorten a text that is long."""
    return text if len(text) <= most else text[: most - 3] + "..."


def dotted(path: Iterable[Any]) -> str:
    """Write a path as a user would: `axes.norm[0].eps`.

    >>> dotted(("axes", "norm", 0, "eps"))
    'axes.norm[0].eps'
    """
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _inside(path: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    for length, step in enumerate(path):
        try:
            data = data[step] if isinstance(data, Mapping | list | tuple) else {}[step]
        except (KeyError, IndexError, TypeError):
            return path[:length]
    return path


def sentence(line: Any) -> str:
    """Say in our words what one line of pydantic's error says."""
    if "message" in line.get("ctx", {}):
        return line["ctx"]["message"]
    if line["type"] == "missing":
        return "required, and missing"
    if line["type"] == "value_error":
        return str(line["ctx"]["error"]).replace("\n", "; ")
    message = re.sub(r"^(?:Input|String|Value) should", "must", line["msg"])
    message = WORDS.sub(lambda match: f"must be a {'mapping' if match[1] == 'dictionary' else 'list'}", message)
    value = line["input"]
    choices = re.findall(r"'([^']*)'", line["ctx"]["expected"]) if line["type"] == "literal_error" else []
    return f"{message}, got {short_repr(value)}{did_you_mean(value, choices) if isinstance(value, str) else ''}"
