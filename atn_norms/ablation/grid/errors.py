"""Problems of a study at the place in its file where they are, in the form pydantic passes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from atn_norms import errors


class Problem(NamedTuple):
    """What is wrong at a path; `type` is pydantic's name for it."""

    path: tuple[str | int, ...]
    message: str
    type: str = "study"


def problems_of(error: ValidationError, data: Any = None) -> list[Problem]:
    """The problems a pydantic error tells; `data` is what was validated."""
    return [
        Problem(problem.path, errors.message(replace(problem, path=())), problem.code)
        for problem in errors.problems_of(error, data)
    ]


def invalid(title: str, problems: Iterable[Problem]) -> ValidationError:
    """One error that tells all problems; raised inside a validator, pydantic puts the outer path before each."""
    details = [
        InitErrorDetails(
            type=errors.pydantic_error(errors.Problem(detail=problem.message, code=problem.type)),
            loc=problem.path,
            input=None,
        )
        for problem in problems
    ]
    return ValidationError.from_exception_data(title, details)
