"""The conformance suite: the laws that every normalizer, window, cell, backend and task keeps, and their checks."""

from atn_norms.testing.checks import check_backend, check_cell, check_normalizer, check_task, check_window
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.engine import CheckResult
from atn_norms.testing.law import GROUPS, LAWS, Case, Law
from atn_norms.testing.with_pytest import parametrize_checks

__all__ = [
    "GROUPS",
    "LAWS",
    "Case",
    "CheckResult",
    "Law",
    "check_backend",
    "check_cell",
    "check_normalizer",
    "check_task",
    "check_window",
    "compare",
    "demand",
    "parametrize_checks",
]
