"""Run the conformance tests of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atn_norms.commands.console import Json, print_json, print_table
from atn_norms.commands.output import emit
from atn_norms.errors import (
    Problem,
    SpecError,
    brief,
    dotted,
    not_installed,
    one_of,
    to_spec_error,
    unknown,
    with_article,
)

if TYPE_CHECKING:
    from atn_norms.testing import CheckResult

BACKEND, FUNCTION = "backend", "python"


def check(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="A normalizer, window, cell, task or backend.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="Set an option; may be repeated.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="Family of KIND, if two families have the kind.")
    ] = None,
    expected: Annotated[
        list[str] | None,
        typer.Option(
            "--expect-failure", metavar="LAW=REASON", help="Require this law to fail, for a reason; may be repeated."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance tests of one kind; exit code 1 if one fails."""

    reasons = _reasons(expected or [])
    found = _family(kind, family)
    plugin = _plugin(found, kind, settings or [])
    try:
        from atn_norms.testing import checks
        from atn_norms.testing.engine import need_hypothesis

        need_hypothesis()
    except ModuleNotFoundError as error:
        raise not_installed(str(error.name), "testing") from None
    results = getattr(checks, f"check_{found}")(plugin, expected_failures=reasons)
    failed = [result for result in results if result.status == "failed"]
    if as_json:
        options = {} if found == BACKEND else plugin.model_dump(mode="json")
        print_json({"family": found, "kind": kind, "options": options, "results": [asdict(each) for each in results]})
    else:
        _show(found, kind, results)
    if failed:
        raise typer.Exit(1)


def _reasons(expected: Sequence[str]) -> dict[str, str]:
    reasons = {}
    for each in expected:
        law, equals, reason = each.partition("=")
        if not (law.strip() and equals and reason.strip()):
            raise SpecError("--expect-failure", repr(brief(each)), "LAW=REASON")
        reasons[law.strip()] = reason.strip()
    return reasons


def _show(family: str, kind: str, results: Sequence[CheckResult]) -> None:
    rows = []
    for result in results:
        rows.append((result.law, result.status, result.message))
        if result.example:
            rows.append(("", "", f"smallest example: {result.example}"))
    print_table(f"{family} {kind!r}: {len(results)} laws", ("law", "status", "why"), rows)
    statuses = ("passed", "failed", "expected", "skipped")
    counts = {status: sum(result.status == status for result in results) for status in statuses}
    if counts["failed"]:
        emit("\nThe page docs/when-a-law-fails.md lists the usual causes of each failure.")
    emit("\n" + ", ".join(f"{count} {status}" for status, count in counts.items() if count))


def _family(kind: str, family: str | None) -> str:
    """Return the family of a kind.

    Errors: `SpecError` for an unknown kind, and for a kind of several families where `family` is None.
    """
    from atn_norms.backends.base import known
    from atn_norms.registry import FAMILIES, cure_of_unknown, registry

    families = (*FAMILIES, BACKEND)
    if family is not None and family not in families:
        raise SpecError.of([unknown("family", family, families, path=("--family",))])
    kinds = {name: (*registry.kinds(name), *registry.conflicts(name)) for name in FAMILIES} | {BACKEND: tuple(known())}
    having = [name for name, names in kinds.items() if kind in names and family in (None, name)]
    if len(having) > 1:
        raise SpecError("--family", f"the kind {kind!r} of several families", one_of(having))
    if kind == FUNCTION and family in (None, "task"):
        detail = "It has no conformance tests, because its function belongs to the study."
        raise SpecError("KIND", f"{FUNCTION!r}, the task of a function", "a kind with conformance tests", detail=detail)
    if not having:
        choices = sorted({each for name, names in kinds.items() if family in (None, name) for each in names})
        cure = cure_of_unknown(registry, "kind", ", such as pip install -e FOLDER")
        raise SpecError.of([replace(unknown(family or "kind", kind, choices), detail=cure)])
    return having[0]


def _plugin(family: str, kind: str, settings: Sequence[str]) -> Any:
    """Return a backend, or the spec of a kind with options set."""
    from pydantic import ValidationError

    from atn_norms.backends.base import known
    from atn_norms.commands.list import type_text
    from atn_norms.options import option_schemas
    from atn_norms.registry import registry
    from atn_norms.specs import value as yaml_value

    if family == BACKEND:
        if settings:
            raise SpecError((f"--set {brief(settings[0])}",), "an option of a backend", "no options")
        return known()[kind]
    data: dict[str, Any] = {"kind": kind}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise SpecError((f"--set {brief(setting)}",), "no OPTION=VALUE", "OPTION=VALUE, such as eps=1e-3")
        data[name.strip()] = yaml_value(text, f"--set {name}: not a YAML value")
    spec = registry.lookup(family, kind)

    def completed(problem: Problem) -> Problem:
        """Name the type of a missing option, and how to set it."""
        name = dotted(problem.path)
        schema = option_schemas(spec).get(name)
        expected = problem.expected if schema is None else with_article(type_text(schema))
        return replace(problem, expected=expected, detail=f"Set it with --set {name}=VALUE")

    try:
        return spec.model_validate(data)
    except ValidationError as error:
        problems = to_spec_error(error, data=data).problems
        raise SpecError.of(completed(each) if each.code == "missing" else each for each in problems) from None
