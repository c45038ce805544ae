"""Problems of a study at the place in its file where they are, in the form pydantic passes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, LiteralString, NamedTuple, cast

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from atn_norms.errors import located


class Problem(NamedTuple):
    """What is wrong at a path; `type` is pydantic's name for it."""

    path: tuple[str | int, ...]
    message: str
    type: str = "study"


def problems_of(error: ValidationError, data: Any = None) -> list[Problem]:
    """The problems a pydantic error tells; `data` is what was validated."""
    return [Problem(*located(line, data), line["type"]) for line in error.errors(include_url=False)]


def invalid(title: str, problems: Iterable[Problem]) -> ValidationError:
    """One error that tells all problems; raised inside a validator, pydantic puts the outer path before each."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError(cast(LiteralString, problem.type), "{message}", {"message": problem.message}),
            loc=problem.path,
            input=None,
        )
        for problem in problems
    ]
    return ValidationError.from_exception_data(title, details)
