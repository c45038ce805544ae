"""Locate the problems of a study in its file, as errors of pydantic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from atn_norms import errors


class Problem(NamedTuple):
    """A problem at a path; `type` is pydantic's name for it."""

    path: tuple[str | int, ...]
    message: str
    type: str = "study"


def problems_of(error: ValidationError, data: Any = None) -> list[Problem]:
    """Return the problems of a pydantic error; `data` is the validated value."""
    return [
        Problem(problem.path, errors.message(replace(problem, path=())), problem.code)
        for problem in errors.problems_of(error, data)
    ]


def invalid(title: str, problems: Iterable[Problem]) -> ValidationError:
    """Make one error of all problems; where a validator raises it, pydantic prepends the outer path to each."""
    details = [
        InitErrorDetails(
            type=errors.pydantic_error(errors.Problem(detail=problem.message, code=problem.type)),
            loc=problem.path,
            input=None,
        )
        for problem in problems
    ]
    return ValidationError.from_exception_data(title, details)
