"""Errors of a specification as records, with one function that builds their text.

position: path: got X; expected Y; did you mean Z? A further sentence, such as the command that fixes it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, LiteralString, TypeAlias, cast

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

Keys: TypeAlias = "tuple[str | int, ...]"

EXPECTED = {  # pydantic's type of an error -> the expected value, with pydantic's context filled in
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a mapping",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": "text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "tuple_type": "a list",
}
WHOLE_PATH = ("missing", "unknown_key", "unknown_kind", "disputed_kind")  # errors at a key that the data does not hold


@dataclass(frozen=True)
class Problem:
    """One fault in a specification; `str` gives its message.

    | field | meaning |
    |---|---|
    | `path` | keys and indices of the option; empty where no option is concerned |
    | `got`, `expected` | the value and the allowed values, as phrases; empty if unknown |
    | `nearest` | the valid name closest to the value, or None |
    | `position` | `file`, or `file:line:column`; empty without a file |
    | `detail` | a further sentence, such as the command that fixes it |
    | `code` | kind of fault for programs: `unknown_key`, `unknown_kind`, `missing`, or pydantic's type of the error |

    >>> print(Problem(("norm", "eps"), "-1", "at least 0", position="model.yaml:3:9"))
    model.yaml:3:9: norm.eps: got -1; expected at least 0
    """

    path: Keys = ()
    got: str = ""
    expected: str = ""
    nearest: str | None = None
    position: str = ""
    detail: str = ""
    code: str = ""

    def below(self, *keys: str | int) -> Problem:
        """Return the problem with keys put before its path."""
        return replace(self, path=(*keys, *self.path))

    def __str__(self) -> str:
        return message(self)


def message(problem: Problem) -> str:
    """Build the text of a problem: `position: path: got X; expected Y; did you mean Z? Detail`."""
    body = _got_expected(problem.got, problem.expected, problem.nearest)
    if body and problem.detail:
        body += f"{'' if body.endswith('?') else '.'} {problem.detail}"
    return ": ".join(filter(None, [problem.position, brief(dotted(problem.path)), body or problem.detail]))


def mismatch(path: str, got: str, expected: str, nearest: str | None = None) -> str:
    """Build the text of a problem for an exception that is no `SpecError`, such as a `TypeError`.

    >>> mismatch("steps", "0", "an integer of at least 1")
    'steps: got 0; expected an integer of at least 1'
    """
    return f"{path}: {_got_expected(got, expected, nearest)}"


def _got_expected(got: str, expected: str, nearest: str | None) -> str:
    parts = [f"{word} {text}" for word, text in (("got", got), ("expected", expected)) if text]
    return "; ".join(parts) + (_suggestion(nearest) if parts else "")


def _suggestion(match: str | None) -> str:
    return "" if match is None else f"; did you mean {match!r}?"


class SpecError(ValueError):
    """Report faults of a specification, each a `Problem`; the text has one line for each.

    `path` is a dotted path or a tuple of keys; the other fields are those of `Problem`, and of the first problem where
    `of` collects several. A single argument is a whole sentence (`detail`). Instances can be pickled.

    >>> error = SpecError("train.batch_size", got="64", expected="1 to 32")
    >>> str(error), error.path
    ('train.batch_size: got 64; expected 1 to 32', ('train', 'batch_size'))
    >>> SpecError("norm", got="'laier'", expected="one of batch, layer, rms", nearest="layer").nearest
    'layer'
    """

    def __init__(
        self,
        path: str | Keys = "",
        got: str = "",
        expected: str = "",
        nearest: str | None = None,
        position: str = "",
        *,
        detail: str = "",
    ) -> None:
        if isinstance(path, str) and not (got or expected or position or detail):
            path, detail = "", path
        keys = tuple(path.split(".")) if isinstance(path, str) and path else tuple(path)
        self._set((Problem(keys, got, expected, nearest, position, detail),))

    @classmethod
    def of(cls, problems: Iterable[Problem | str]) -> SpecError:
        """Collect several problems, or whole sentences, in one error.

        >>> SpecError.of([Problem(("a",), "1", "2"), Problem(("b",), "3", "4")]).problems[1].path
        ('b',)
        """
        error = cls.__new__(cls)
        error._set(tuple(Problem(detail=each) if isinstance(each, str) else each for each in problems))
        return error

    def _set(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        ValueError.__init__(self, "\n".join(map(str, problems)))

    @property
    def path(self) -> Keys:
        """Keys of the first problem's option."""
        return self.problems[0].path

    @property
    def got(self) -> str:
        """Value of the first problem, as a phrase."""
        return self.problems[0].got

    @property
    def expected(self) -> str:
        """Allowed values of the first problem, as a phrase."""
        return self.problems[0].expected

    @property
    def nearest(self) -> str | None:
        """Valid name closest to the first problem's value, or None."""
        return self.problems[0].nearest

    @property
    def position(self) -> str:
        """File position of the first problem, or an empty text."""
        return self.problems[0].position

    def __reduce__(self) -> Any:
        return type(self).of, (self.problems,)


def unknown(
    what: str, word: object, choices: Sequence[str], *, path: Keys = (), nearest_of: Iterable[str] | None = None
) -> Problem:
    """Describe a word that is none of the choices; `nearest_of` are the words to suggest from.

    >>> print(unknown("normalizer", "laier", ["batch", "layer"], path=("norm",)))
    norm: got unknown normalizer 'laier'; expected one of batch, layer; did you mean 'layer'?
    """
    near = nearest(word, choices if nearest_of is None else nearest_of)
    return Problem(path, f"unknown {what} {short_repr(word)}", one_of(choices), near)


def not_installed(packages: str, extra: str, path: str = "", cure: str = "") -> SpecError:
    """Return the error for missing packages of an extra of this package; `cure` is another way out.

    >>> str(not_installed("onnx", "export"))
    "got no package onnx; expected an installed package. Run pip install 'atn-norms[export]'"
    """
    detail = f"Run pip install 'atn-norms[{extra}]'{cure}"
    return SpecError(path, f"no package {packages}", "an installed package", detail=detail)


def one_of(choices: Iterable[str]) -> str:
    """Render the allowed words: `one of a, b`.

    >>> one_of(["a", "b"]), one_of([])
    ('one of a, b', 'none')
    """
    words = ", ".join(choices)
    return f"one of {words}" if words else "none"


def nearest(word: object, choices: Iterable[str]) -> str | None:
    """Return the choice closest to a word, or None where none is close.

    >>> nearest("laier", ["batch", "layer", "rms"]), nearest("?", ["batch"])
    ('layer', None)
    """
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """Render the nearest match as the end of a message: `; did you mean 'layer'?`, or nothing."""
    return _suggestion(nearest(word, choices))


def nearest_file(path: Path) -> str | None:
    """Return the name of another file in the folder of a path that is closest to its own, or None.

    Names with the same suffix are compared without it: a long suffix would make any two names similar.
    """
    try:
        others = sorted(other for other in path.parent.iterdir() if other.name != path.name)
    except OSError:
        return None
    alike = {other.stem: other.name for other in others if other.suffix == path.suffix}
    stem = nearest(path.stem, alike)
    return alike[stem] if stem else nearest(path.name, [other.name for other in others if other.suffix != path.suffix])


def beside(path: Path) -> str:
    """Render `nearest_file` as the end of a message."""
    return _suggestion(nearest_file(path))


def short_repr(value: object, most: int = 60) -> str:
    """Return `repr(value)`, shortened where it is long.

    >>> short_repr("layer"), len(short_repr("x" * 1000))
    ("'layer'", 60)
    """
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits, which Python refuses to write
        return "a number of thousands of digits"
    return brief(text, most)


def typed_repr(value: object) -> str:
    """Return the type and the short repr of a value.

    >>> typed_repr("3")
    "str '3'"
    """
    return f"{type(value).__name__} {short_repr(value)}"


def with_article(noun: str) -> str:
    """Put `a` or `an` before a noun, by its sound; capitals are spelled.

    >>> [with_article(noun) for noun in ("Tensor", "atn_norms.LSTM", "LSTM", "GRU", "'uniform' window", "UserDict")]
    ['a Tensor', 'an atn_norms.LSTM', 'an LSTM', 'a GRU', "a 'uniform' window", 'a UserDict']
    """
    word = noun.lstrip("'\"`")
    if re.match(r"[A-Z][A-Z0-9]", word):
        return f"{'an' if word[0] in 'AEFHILMNORSX' else 'a'} {noun}"
    return f"{'an' if re.match(r'[aeio]|u(?!ni(?!n)|s|t)', word, re.IGNORECASE) else 'a'} {noun}"


def brief(text: str, most: int = 120) -> str:
    """Shorten a long text."""
    return text if len(text) <= most else text[: most - 3] + "..."


def plural(count: int, noun: str) -> str:
    """Write a count with its noun.

    >>> plural(1, "step"), plural(2, "step")
    ('1 step', '2 steps')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def dotted(path: Iterable[Any]) -> str:
    """Write a path as in a message: `axes.norm[0].eps`.

    >>> dotted(("axes", "norm", 0, "eps"))
    'axes.norm[0].eps'
    """
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def to_spec_error(
    error: ValidationError, where: Callable[[tuple[Any, ...]], str] | None = None, data: Any = None
) -> SpecError:
    """Turn pydantic's error into a `SpecError` with one problem for each path.

    | symbol | meaning |
    |---|---|
    | `where` | path -> position, such as `study.yaml:3:7` |
    | `data` | the validated mapping, which separates keys from the labels that pydantic adds for branches of a union |
    """
    by_path: dict[Keys, list[Problem]] = {}
    for problem in problems_of(error, data):
        by_path.setdefault(problem.path, []).append(problem)
    merged = [_merged(problems) for problems in by_path.values()]
    return SpecError.of(p if where is None else replace(p, position=where(p.path)) for p in merged)


def problems_of(error: ValidationError, data: Any = None) -> list[Problem]:
    """Return the problems of pydantic's error; `data` as in `to_spec_error`."""
    return [
        problem.below(*(line["loc"] if data is None or line["type"] in WHOLE_PATH else _inside(line["loc"], data)))
        for line in error.errors(include_url=False)
        for problem in _of_line(line)
    ]


def pydantic_error(problem: Problem) -> PydanticCustomError:
    """Wrap a problem, with a path relative to the field, for pydantic; `problems_of` returns it unchanged."""
    # The text travels as a value, never as the template: it may hold braces that a user typed.
    context = {"message": message(problem), "problem": problem}
    return PydanticCustomError(cast(LiteralString, problem.code or "spec"), "{message}", context)


def _number(limit: Any) -> Any:
    return int(limit) if isinstance(limit, float) and limit.is_integer() and abs(limit) < 1e15 else limit


def _merged(problems: Sequence[Problem]) -> Problem:
    """Join the problems of one path, such as those of every branch of a union."""
    first = problems[0]
    expected, details = (
        list(dict.fromkeys(filter(None, texts)))
        for texts in ([p.expected for p in problems], [p.detail for p in problems])
    )
    near = next((p.nearest for p in problems if p.nearest is not None), None)
    return replace(first, expected=", or ".join(expected), detail="; ".join(details), nearest=near)


def _inside(path: Keys, data: Any) -> Keys:
    """Return the steps of a path that are keys of the data.

    The others are labels of branches of a union: tags, which are skipped, or types, which end the path.
    """
    keys: Keys = ()
    for step in path:
        try:
            data = data[step] if isinstance(data, Mapping | list | tuple) else {}[step]  # pyright: ignore
        except (KeyError, IndexError, TypeError):
            if str(step).isidentifier():
                continue
            return keys
        keys += (step,)
    return keys


def _of_line(line: Any) -> Sequence[Problem]:
    """Turn one line of pydantic's error into problems with paths below the line's own."""
    kind, context = line["type"], line.get("ctx", {})
    if "problem" in context:
        return [context["problem"]]
    if kind == "missing":
        return [Problem(got="nothing", expected="a value", code=kind)]
    if kind == "value_error":
        cause = context["error"]
        return (
            cause.problems
            if isinstance(cause, SpecError)
            else [Problem(detail=str(cause).replace("\n", "; "), code=kind)]
        )
    value = line["input"]
    if kind not in EXPECTED:
        return [Problem(got=short_repr(value), expected=line["msg"][:1].lower() + line["msg"][1:], code=kind)]
    expected = EXPECTED[kind].format_map({name: _number(limit) for name, limit in context.items()})
    choices = re.findall(r"'([^']*)'", expected) if kind == "literal_error" and isinstance(value, str) else []
    return [Problem(got=short_repr(value), expected=expected, nearest=nearest(value, choices), code=kind)]
