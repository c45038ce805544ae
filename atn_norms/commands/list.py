"""List kinds with their options, plugins, and JSON schemas."""

from __future__ import annotations

import inspect
import itertools
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from atn_norms.commands.console import Json, Strict, at_home, print_json, print_table
from atn_norms.commands.output import emit
from atn_norms.errors import unknown
from atn_norms.options import option_schemas

if TYPE_CHECKING:
    from atn_norms.registry import Entry, Options

FAMILIES = {"normalizers": "normalizer", "windows": "window", "cells": "cell", "tasks": "task"}
STUDIES = "studies"


def list_kinds(
    families: Annotated[
        list[str] | None,
        typer.Argument(metavar="[normalizers|windows|cells|tasks|studies]...", help="Families; default: all kinds."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the usable kinds with their distribution and options, or the ready-made studies."""
    from atn_norms.errors import SpecError
    from atn_norms.registry import disputed, registry

    known = [*FAMILIES, STUDIES]
    for family in families or ():
        if family not in known:
            raise SpecError.of([unknown("family", family, known)])
    chosen = {plural: FAMILIES[plural] for plural in (families or FAMILIES) if plural in FAMILIES}
    studies = _ready_made() if STUDIES in (families or ()) else []
    if as_json:
        print_json(
            {
                plural: [
                    {
                        "kind": kind,
                        "summary": summary(entry.spec),
                        "distribution": entry.distribution,
                        "version": entry.version,
                        "plugin": entry.plugin,
                        "options": options(entry.spec),
                    }
                    for kind, entry in _kinds(family).items()
                ]
                for plural, family in chosen.items()
            }
            | ({STUDIES: studies} if studies else {})
        )
        return
    for plural, family in chosen.items():
        rows = [
            (kind, entry.distribution, "\n".join(map(_option, options(entry.spec).items())), summary(entry.spec))
            for kind, entry in _kinds(family).items()
        ]
        print_table(plural, ("kind", "from", "options", "description"), list(_unfolded(rows)))
        for kind, entries in registry.conflicts(family).items():
            emit(disputed(family, kind, entries))
        emit()
    if studies:
        print_table(STUDIES, ("name", "description"), [tuple(each.values()) for each in studies])


def _kinds(family: str) -> dict[str, Entry]:
    """Return the kinds of a family, in alphabetical order, with the task `python`, which only studies have."""
    from atn_norms.plugins import BUILT_IN, report
    from atn_norms.registry import Entry, registry

    kinds = registry.kinds(family)
    if family == "task":
        with suppress(ModuleNotFoundError):  # without the extra of studies
            from atn_norms.ablation.grid.functions import KIND, FunctionSpec

            (own,) = [record for record in report() if record.name == BUILT_IN]
            kinds[KIND] = Entry(FunctionSpec, own.distribution, own.version, own.name)
    return dict(sorted(kinds.items()))


def _ready_made() -> list[dict[str, str]]:
    from atn_norms.ablation.grid import presets  # imported late: it requires the extra of studies

    return [{"name": name, "summary": presets.summary(name)} for name in presets.names()]


def plugins(as_json: Json = False, strict: Strict = False) -> None:
    """List every plugin: loaded, blocked or failed, with the reason."""
    from atn_norms.plugins import report

    records = report()
    if as_json:
        print_json([asdict(record) for record in records])
    else:
        columns = ("plugin", "distribution", "version", "status", "seconds", "kinds", "reason")
        rows = [
            (r.name, r.distribution, r.version, r.status, f"{r.seconds:.1f}", "\n".join(r.kinds), r.reason)
            for r in records
        ]
        print_table("plugins", columns, list(_unfolded(rows)))
    if strict and any(record.faulty for record in records):
        raise typer.Exit(1)


def schema(
    what: Annotated[str, typer.Argument(metavar="[study|model]", help="The file that the schema describes.")] = "study",
    out: Annotated[
        Path | None, typer.Option(help="Write the schema to this file instead of printing it.", callback=at_home)
    ] = None,
) -> None:
    """Print the JSON schema of a study file or a model file, with every installed kind, for editors."""
    from atn_norms.commands.files import schema_text, write_new

    text = schema_text(what)
    if out is None:
        emit(text, end="")
    else:
        write_new(out, text, force=True)
        emit(f"wrote {out}")


def summary(spec: type[Options]) -> str:
    """Return the first paragraph of the docstring of the built class, or of the options where it has none."""
    try:
        built = get_type_hints(spec.build)["return"]  # type: ignore[attr-defined]
    except (AttributeError, KeyError, NameError, TypeError):  # annotations are optional in a plugin
        built = None
    built = get_origin(built) or built
    if isinstance(built, type) and not inspect.isabstract(built):
        return _first_paragraph(built) or _first_paragraph(spec)
    return _first_paragraph(spec)


def _first_paragraph(described: type) -> str:
    text = inspect.cleandoc(vars(described).get("__doc__") or "").partition("\n\n")[0]
    return " ".join(text.split())


def options(spec: type[Options]) -> dict[str, Any]:
    """Return the JSON schema and the default of each option of a kind."""
    return {name: option for name, option in option_schemas(spec).items() if name != "kind"}


def _option(item: tuple[str, Any]) -> str:
    name, option = item
    default = option.get("default")
    note = f"default {'none' if default is None else default}" if "default" in option else "required"
    return f"{name}: {type_text(option)} ({note})"


def type_text(option: dict[str, Any]) -> str:
    """Return the type of an option by its JSON schema, with its limits, such as `integer >= 1`."""
    if "anyOf" in option:
        return " | ".join(dict.fromkeys(type_text(each) for each in option["anyOf"]))
    if "enum" in option:
        return " | ".join(map(str, option["enum"]))
    if "const" in option:
        return str(option["const"])
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {option[key]}" for key, sign in bounds.items() if key in option)
    return " ".join(filter(None, [option.get("type", "mapping").replace("null", "none"), limits]))


def _unfolded(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Split cells of several lines into several rows, for plain tables."""
    unfolded = []
    for row in rows:
        columns = [cell.split("\n") for cell in row]
        unfolded += itertools.zip_longest(*columns, fillvalue="")
    return unfolded
