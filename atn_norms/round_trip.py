"""Find options that a study cannot store: a trial keeps its options as JSON and validates them when it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from atn_norms.errors import Problem, short_repr, to_spec_error, with_article
from atn_norms.options import Options

EXPECTED = (
    "text, a number, a boolean, null, a list, a tuple, a mapping with text keys, or another options model; "
    "convert other types in `build`, or with a BeforeValidator and a PlainSerializer"
)
SIMPLE = {"str", "int", "float", "bool", "none", "any", "model-ref", "definition-ref"}
PATHS = {"lax-or-strict": "strict_schema", "json-or-python": "python_schema"}
INNER = ("schema", "items_schema", "values_schema", "extras_schema")
NAMES = {"is-instance": "an instance of a Python class", "enum": "an Enum", "is-subclass": "a class"}


def unstorable_options(spec: type[Options]) -> Iterator[Problem]:
    """Yield a problem for each option whose values do not survive JSON and strict validation.

    >>> class Blur(Options):
    ...     mask: bytes
    >>> next(unstorable_options(Blur)).got
    'a bytes'
    """
    problems = list(_of_model(_model(spec.__pydantic_core_schema__), ()))
    yield from problems
    if not problems and not any(field.is_required() for field in spec.model_fields.values()):
        yield from _of_defaults(spec)


def _model(schema: Any) -> Any:
    while schema.get("type") != "model-fields":
        schema = schema["schema"]
    return schema


def _of_model(schema: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    for name, field in schema["fields"].items():
        here = (*path, name)
        if field.get("validation_alias") or field.get("serialization_alias"):
            yield Problem(here, "an alias", "the name of the field alone: dumps and files use it")
        elif field.get("serialization_exclude"):
            yield Problem(here, "a field excluded from dumps", "a field that dumps contain")
        else:
            yield from _of(field["schema"], here)


def _of(schema: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    kind = schema["type"]
    if kind in PATHS:
        yield from _of(schema[PATHS[kind]], path)
    elif kind == "model-fields":
        yield from _of_model(schema, path)
    elif kind == "literal":
        if others := [each for each in schema["expected"] if type(each) not in (str, int, bool, type(None))]:
            yield Problem(path, f"the literal {short_repr(others[0])}", EXPECTED)
    elif kind == "dict" and (keys := _kind_of_keys(schema)) not in ("str", "literal", "any"):
        yield Problem(path, f"a mapping with keys of type {keys}", EXPECTED)
    elif kind in ("union", "tagged-union"):
        choices = schema["choices"]
        for choice in choices.values() if isinstance(choices, Mapping) else choices:
            yield from _of(choice[0] if isinstance(choice, tuple) else choice, path)
    elif kind.startswith("function-"):
        if _is_ours(schema) and "schema" in schema:  # the author of any other function converts the value
            yield from _of(schema["schema"], path)
    elif inner := [schema[key] for key in INNER if key in schema]:
        for part in inner:
            for each in part if isinstance(part, list) else [part]:
                if isinstance(each, Mapping):
                    yield from _unless_container(kind, each, path)
    elif kind not in SIMPLE and kind not in ("list", "tuple", "dict"):
        yield Problem(path, NAMES.get(kind, with_article(kind)), EXPECTED)


def _unless_container(kind: str, inner: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    if kind in ("set", "frozenset", "generator"):
        yield Problem(path, with_article(kind), EXPECTED)
    else:
        yield from _of(inner, path)


def _kind_of_keys(schema: Any) -> str:
    keys = schema.get("keys_schema", {"type": "any"})
    while keys["type"].startswith("function-") and "schema" in keys:
        keys = keys["schema"]
    return keys["type"]


def _is_ours(schema: Any) -> bool:
    return getattr(schema["function"].get("function"), "__module__", "") == Options.__module__


def _of_defaults(spec: type[Options]) -> Iterator[Problem]:
    try:
        before = spec()
        after = spec.model_validate(json.loads(json.dumps(before.model_dump(mode="json"), allow_nan=False)))
    except ValidationError as error:
        yield from to_spec_error(error).problems
        return
    except (ValueError, TypeError) as error:
        yield Problem((), f"options that JSON cannot hold ({error})", EXPECTED)
        return
    for name in spec.model_fields:
        if getattr(before, name) != getattr(after, name):
            yield Problem((name,), f"{short_repr(getattr(after, name))} after JSON", short_repr(getattr(before, name)))
