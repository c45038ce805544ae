"""Options: the frozen, strict base of every options model, with its labels and its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from atn_norms.errors import Problem, mismatch, nearest, one_of, problems_of, pydantic_error, typed_repr


def _list_to_tuple(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, tuple | str | bytes | bytearray):
        return tuple(value)
    return value


def to_dict(value: Any) -> Any:
    """Convert a mapping of another type to a `dict`; return anything else unchanged."""
    return dict(value) if isinstance(value, Mapping) and not isinstance(value, dict) else value


def to_int(value: Any) -> Any:
    """Convert an integer of another library, such as numpy's, to Python's; return anything else unchanged."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, int) else value


def checked_count(path: str, value: Any) -> int:
    """Return `value` as an `int` of at least 1.

    Errors: `TypeError` if it is no integer, `ValueError` if it is below 1.
    """
    value = to_int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(mismatch(path, typed_repr(value), "an integer of at least 1"))
    if value < 1:
        raise ValueError(mismatch(path, str(value), "an integer of at least 1"))
    return value


def _to_float(value: object) -> object:
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


# Type of a core schema -> conversion of equivalent values before strict validation.
_CONVERSIONS: dict[str, Callable[[object], object]] = {
    "tuple": _list_to_tuple,
    "dict": to_dict,
    "int": to_int,
    "float": _to_float,
}


def _relax(schema: Any) -> Any:
    """Extend a core schema: accept lists as tuples, any mapping as a dict, and numpy's numbers as Python's."""
    if isinstance(schema, list):
        return [_relax(item) for item in schema]
    if isinstance(schema, tuple):  # choices of a union come as (schema, label)
        return tuple(_relax(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "function-before" and schema["function"].get("function") in _CONVERSIONS.values():
        return schema  # of a nested options model, extended when its class was built
    relaxed = {key: value if key in ("metadata", "serialization") else _relax(value) for key, value in schema.items()}
    conversion = _CONVERSIONS.get(relaxed.get("type", ""))
    if conversion is not None:
        return core_schema.no_info_before_validator_function(conversion, relaxed)  # type: ignore[arg-type]
    return relaxed


class Options(BaseModel):
    """A frozen, strict set of options that rejects unknown keys; the base of every options model.

    Types are strict (neither `True` nor `"3"` is an integer), numbers are finite, and lists become tuples.
    `family` is set by the base spec of each family: `"normalizer"`, `"window"`, `"cell"`, `"task"`.

    Raises `pydantic.ValidationError` (a `ValueError`); `to_spec_error` turns it into a `SpecError`.

    >>> from atn_norms.errors import to_spec_error
    >>> class Blur(Options):
    ...     sizes: tuple[int, ...] = (3,)
    >>> Blur(sizes=[3, 5])
    Blur(sizes=(3, 5))
    >>> try:
    ...     Blur.model_validate({"size": 3})
    ... except ValidationError as error:
    ...     print(to_spec_error(error))
    size: got an unknown key; expected one of sizes; did you mean 'sizes'?
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)
    family: ClassVar[str | None] = None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _relax(handler(source))

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        data = to_dict(data)
        known = list(cls.model_fields)
        unknown = [key for key in data if key not in known] if isinstance(data, Mapping) else []
        if not unknown:
            return handler(data)
        problems = [
            Problem(
                (key if type(key) in (str, int) else str(key),),
                "an unknown key",
                one_of(known),
                cls.nearest_key(key),
                code="unknown_key",
            )
            for key in unknown
        ]
        try:  # report the other problems at the same time
            handler({key: value for key, value in data.items() if key in known})
        except ValidationError as error:
            problems += problems_of(error)
        raise invalid(cls.__name__, problems)

    @classmethod
    def nearest_key(cls, key: object) -> str | None:
        """Return the valid key closest to an unknown one; a model may suggest keys of other sections."""
        return nearest(key, cls.model_fields)


def option_schemas(spec: type[Options]) -> dict[str, Any]:
    """Return the JSON schema of each option of a model, by name."""
    schema = spec.model_json_schema()
    if "$ref" in schema:  # a kind with an option of its family: pydantic puts the model among the definitions
        schema = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema["properties"]


def changed_options(spec: Options) -> dict[str, Any]:
    """Return the options of a spec, without its kind, that differ from their defaults."""
    values = {name: getattr(spec, name) for name in type(spec).model_fields}
    changed = {}
    for name, field in type(spec).model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data=values)
        if name != "kind" and values[name] != default:
            changed[name] = values[name]
    return changed


def spec_kind(spec: Options) -> str:
    """Return the kind of a spec; the name of its class for a group of options without a kind."""
    return str(getattr(spec, "kind", type(spec).__name__))


def spec_label(spec: Options) -> str:
    """Describe a spec by its kind and the options that differ from their defaults.

    >>> from typing import Literal
    >>> class Blur(Options):
    ...     kind: Literal["blur"] = "blur"
    ...     size: int = 3
    >>> spec_label(Blur()), spec_label(Blur(size=5))
    ('blur', 'blur(size=5)')
    """
    options = changed_options(spec).items()
    labels = {name: spec_label(value) if isinstance(value, Options) else repr(value) for name, value in options}
    return kind_label(spec_kind(spec), labels)


def kind_label(kind: str, options: Mapping[str, object]) -> str:
    """Write a kind with its options, such as `layer(eps=0.001)`."""
    return f"{kind}({', '.join(f'{name}={value}' for name, value in options.items())})" if options else kind


def invalid(title: str, problems: Iterable[Problem]) -> ValidationError:
    """Build pydantic's error from problems; if a validator raises it, pydantic puts the outer path before each."""
    details = [
        InitErrorDetails(type=pydantic_error(replace(problem, path=())), loc=problem.path, input=None)
        for problem in problems
    ]
    return ValidationError.from_exception_data(title, details)
