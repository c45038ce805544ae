"""Kinds and their options: the base of every options model, the registry of kinds, and the field of a kind."""

from __future__ import annotations

import importlib
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from atn_norms.errors import (
    Problem,
    SpecError,
    did_you_mean,
    dotted,
    mismatch,
    nearest,
    one_of,
    problems_of,
    pydantic_error,
    to_spec_error,
    typed_repr,
    unknown,
)

__all__ = [
    "FAMILIES",
    "Entry",
    "KindField",
    "Options",
    "Problem",
    "Registry",
    "Source",
    "SpecError",
    "did_you_mean",
    "disputed",
    "dotted",
    "nearest",
    "registry",
    "to_spec_error",
]

FAMILIES = ("normalizer", "window", "cell", "task")


def _list_to_tuple(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, tuple | str | bytes | bytearray):
        return tuple(value)
    return value


def _to_dict(value: Any) -> Any:
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


# Types of a core schema, and what converts equivalent values before strict validation.
_CONVERSIONS: dict[str, Callable[[object], object]] = {
    "tuple": _list_to_tuple,
    "dict": _to_dict,
    "int": to_int,
    "float": _to_float,
}


def _relax(schema: Any) -> Any:
    """Let a core schema take lists for tuples, any mapping for a dict, and numpy's numbers for Python's."""
    if isinstance(schema, list):
        return [_relax(item) for item in schema]
    if isinstance(schema, tuple):  # choices of a union come as (schema, label)
        return tuple(_relax(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "function-before" and schema["function"].get("function") in _CONVERSIONS.values():
        return schema  # of an options model inside this one, relaxed when that one was built
    relaxed = {key: value if key in ("metadata", "serialization") else _relax(value) for key, value in schema.items()}
    conversion = _CONVERSIONS.get(relaxed.get("type", ""))
    if conversion is not None:
        return core_schema.no_info_before_validator_function(conversion, relaxed)  # type: ignore[arg-type]
    return relaxed


def _whole(schema: CoreSchema) -> CoreSchema:
    """Wrap a schema so that a JSON schema handler minds its own metadata too, which it skips at the top."""
    return core_schema.definitions_schema(schema, [])


class Options(BaseModel):
    """A frozen, strict set of options that rejects unknown keys; the base of every options model.

    Types are strict (`True` is no integer, `"3"` is none either), numbers are finite, and lists become tuples.
    `family` is set by the base spec of each family: `"normalizer"`, `"window"`, `"cell"`, `"task"`.

    Raises `pydantic.ValidationError` (a `ValueError`); `to_spec_error` turns it into a `SpecError`.

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

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    family: ClassVar[str | None] = None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _relax(handler(source))

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        data = _to_dict(data)
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


def changed_options(spec: Options) -> dict[str, Any]:
    """Return the options of a spec, without its kind, that differ from their defaults."""
    fields = type(spec).model_fields
    options = {name: (getattr(spec, name), field) for name, field in fields.items() if name != "kind"}
    return {name: value for name, (value, field) in options.items() if value != field.get_default()}


def spec_label(spec: Options) -> str:
    """Describe a spec by its kind and the options that differ from their defaults.

    >>> class Blur(Options):
    ...     kind: Literal["blur"] = "blur"
    ...     size: int = 3
    >>> spec_label(Blur()), spec_label(Blur(size=5))
    ('blur', 'blur(size=5)')
    """
    options = changed_options(spec).items()
    labels = {name: spec_label(value) if isinstance(value, Options) else repr(value) for name, value in options}
    return kind_label(str(getattr(spec, "kind", type(spec).__name__)), labels)


def kind_label(kind: str, options: Mapping[str, object]) -> str:
    """Write a kind with its options, such as `layer(eps=0.001)`."""
    return f"{kind}({', '.join(f'{name}={value}' for name, value in options.items())})" if options else kind


def invalid(title: str, problems: Iterable[Problem]) -> ValidationError:
    """Build pydantic's error from problems; raised in a validator, pydantic puts the outer path before each."""
    details = [
        InitErrorDetails(type=pydantic_error(replace(problem, path=())), loc=problem.path, input=None)
        for problem in problems
    ]
    return ValidationError.from_exception_data(title, details)


SpecType = TypeVar("SpecType", bound=type[Options])


@dataclass(frozen=True)
class Source:
    """Where a kind comes from: the plugin's name, and the distribution that brought it with its version."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.distribution, self.version) if part)


@dataclass(frozen=True)
class Entry:
    """A registered kind: its options model and where it comes from."""

    spec: type[Options]
    distribution: str
    version: str
    plugin: str


class Registry:
    """The kinds of every family, each with its options model; a kind claimed twice is unusable.

    `normalizer`, `window`, `cell` and `task` take a concrete options model of that family with a field
    `kind: Literal["name"] = "name"` and return it, so each is a decorator too. `loader` names a function
    `"module:function"`, called with this registry at the first look-up.

    Errors: `TypeError` for what cannot be registered, `SpecError` for a look-up of an unknown or disputed kind.

    >>> class Norm(Options):
    ...     family: ClassVar[str] = "normalizer"
    >>> class Identity(Norm):
    ...     kind: Literal["identity"] = "identity"
    >>> own = Registry()
    >>> own.normalizer(Identity).__name__, list(own.kinds("normalizer"))
    ('Identity', ['identity'])
    >>> own.lookup("normalizer", "identiti")
    Traceback (most recent call last):
    ...
    atn_norms.errors.SpecError: got unknown normalizer 'identiti'; expected one of identity; did you mean 'identity'?
    """

    def __init__(self, loader: str | None = None) -> None:
        self._loader = loader
        self._loading = False
        self._loaded: Any = None
        self._claims: dict[str, dict[str, list[Entry]]] = {family: {} for family in FAMILIES}
        self._source: Source | None = None
        self._claimed: dict[str, type[Options]] = {}
        self._lock = threading.RLock()

    def normalizer(self, spec: SpecType) -> SpecType:
        """Register the options model of a normalizer."""
        return self._claim("normalizer", spec)

    def window(self, spec: SpecType) -> SpecType:
        """Register the options model of a window."""
        return self._claim("window", spec)

    def cell(self, spec: SpecType) -> SpecType:
        """Register the options model of a cell."""
        return self._claim("cell", spec)

    def task(self, spec: SpecType) -> SpecType:
        """Register the options model of a task."""
        return self._claim("task", spec)

    def load(self) -> Any:
        """Run the loader once, and return what it returned."""
        with self._lock:
            if self._loader is not None and not self._loading:
                self._loading = True  # set first: a plugin that looks something up while loading must not load again
                module, _, function = self._loader.partition(":")
                try:
                    self._loaded = getattr(importlib.import_module(module), function)(self)
                except BaseException:
                    self._loading = False
                    raise
        return self._loaded

    def lookup(self, family: str, kind: str) -> type[Options]:
        """Return the options model of a kind; SpecError when it is unknown or claimed by two distributions."""
        return self._lookup(family, kind)

    def _lookup(self, family: str, kind: str, besides: Sequence[str] = ()) -> type[Options]:
        """`lookup`, where `besides` are words that are no kind and yet allowed, for the error to name."""
        entries = self._of(family).get(kind, [])
        if len(entries) == 1:
            return entries[0].spec
        if entries:
            raise SpecError.of([Problem(detail=disputed(family, kind, entries), code="disputed_kind")])
        problem = unknown(family, kind, [*self.kinds(family), *besides])
        install = "" if problem.nearest else f"Install the package that has the {family}."
        raise SpecError.of([replace(problem, detail=install, code="unknown_kind")])

    def kinds(self, family: str) -> dict[str, Entry]:
        """Return the usable kinds of a family, in alphabetical order."""
        claims = self._of(family)
        return {kind: claims[kind][0] for kind in sorted(claims) if len(claims[kind]) == 1}

    def conflicts(self, family: str) -> dict[str, tuple[Entry, ...]]:
        """Return the kinds of a family that several distributions claim, with every claim."""
        claims = self._of(family)
        return {kind: tuple(claims[kind]) for kind in sorted(claims) if len(claims[kind]) > 1}

    def _of(self, family: str) -> dict[str, list[Entry]]:
        if family not in FAMILIES:
            raise SpecError.of([unknown("family", family, FAMILIES)])
        self.load()
        return self._claims[family]

    @contextmanager
    def transaction(self, source: Source) -> Iterator[dict[str, type[Options]]]:
        """Credit what is registered inside to a source, by `family:kind`; an exception takes it all back."""
        with self._lock:
            before = {family: {kind: list(e) for kind, e in kinds.items()} for family, kinds in self._claims.items()}
            outer = self._source, self._claimed
            self._source, self._claimed = source, {}
            try:
                yield self._claimed
            except BaseException:
                self._claims = before
                raise
            finally:
                self._source, self._claimed = outer

    def _claim(self, family: str, spec: SpecType) -> SpecType:
        kind = _kind_of(family, spec)
        source = self._source or Source("", spec.__module__, "")
        entry = Entry(spec, source.distribution, source.version, source.plugin)
        with self._lock:
            entries = self._claims[family].setdefault(kind, [])
            # Running a notebook cell again defines the same class again: this replaces it without a conflict.
            entries[:] = [other for other in entries if _identity(other) != _identity(entry)] + [entry]
            self._claimed[f"{family}:{kind}"] = spec
        return spec


def disputed(family: str, kind: str, entries: Iterable[Entry]) -> str:
    """Return the message for a kind that several plugins claim."""
    sources = " and ".join(f"{e.distribution} ({e.spec.__module__}.{e.spec.__qualname__})" for e in entries)
    return f"{family} {kind!r} is claimed by {sources}, so it is unusable; uninstall one, or block its plugin"


def _identity(entry: Entry) -> tuple[str, str, str]:
    return entry.plugin, entry.spec.__module__, entry.spec.__qualname__


def _kind_of(family: str, spec: Any) -> str:
    name = getattr(spec, "__qualname__", repr(spec))
    if not (isinstance(spec, type) and issubclass(spec, Options)):
        raise TypeError(f"registry.{family} takes an options model (a subclass of Options), got {name}")
    if spec.family != family:
        raise TypeError(f"registry.{family} takes the options of a {family}; {name} is of family {spec.family!r}")
    if inspect.isabstract(spec):
        missing = ", ".join(sorted(spec.__abstractmethods__))
        raise TypeError(f"registry.{family} takes a concrete options model; {name} does not define {missing}")
    field = spec.model_fields.get("kind")
    allowed = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    if field is None or len(allowed) != 1 or field.default != allowed[0]:
        raise TypeError(f'{name} needs a field `kind: Literal["name"] = "name"`, one name on both sides')
    kind = allowed[0]
    if not (isinstance(kind, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", kind)) or kind == "none":
        raise TypeError(f"{name}: kind {kind!r} must be lower-case letters, digits, '-' or '_', and not 'none'")
    return kind


registry = Registry(loader="atn_norms.plugins:load")

_showing: ContextVar[frozenset[str]] = ContextVar("_showing", default=frozenset())


@dataclass(frozen=True, eq=False)
class KindField:
    """Mark a field as open to every registered kind of a family: `Annotated[NormSpec, Open("normalizer")]`.

    The registry is read when a value is validated or a schema is written, and never when the class is built.
    Taken are: a spec of the family, registered or not; a kind's name, for its default options; a mapping with `kind`
    and that kind's own options; and whatever `shorthand` turns into one of these. A field that allows
    None (`Annotated[NormSpec | None, ...]`) takes None and `"none"` too.

    Symbols: `family` one of normalizer, window, cell, task; `shorthand` value -> value, applied to all but specs;
    `shorthand_schema` what it takes, as JSON schema.
    """

    family: str
    shorthand: Callable[[Any], Any] | None = None
    shorthand_schema: Mapping[str, Any] | None = None
    source: Registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        nullable = type(None) in get_args(source)
        return core_schema.no_info_plain_validator_function(
            lambda value: self.resolve(value, nullable),
            metadata={"pydantic_js_functions": [lambda _, handler: self._json_schema(handler, nullable)]},
        )

    def resolve(self, value: Any, nullable: bool = False) -> Options | None:
        """Turn a value into a spec of the family; errors are pydantic's, located below the field."""
        value = to_int(_to_dict(value))
        if self._accepts(value, nullable):
            return value
        if self.shorthand is not None:
            value = self.shorthand(value)
            if self._accepts(value, nullable):
                return value
        if isinstance(value, str):
            if nullable and value == "none":
                return None
            return self._model(value, (), ["none"] if nullable else []).model_validate({"kind": value})
        if isinstance(value, Mapping):
            return self._model(value.get("kind", _MISSING), ("kind",)).model_validate(dict(value))
        expected = f"a {self.family}'s kind ({self._known()}), a mapping or a spec"
        raise pydantic_error(Problem(got=typed_repr(value), expected=expected))

    def _accepts(self, value: Any, nullable: bool) -> bool:
        return (value is None and nullable) or (isinstance(value, Options) and value.family == self.family)

    def _known(self) -> str:
        return one_of(self.source.kinds(self.family))

    def _model(self, kind: Any, loc: tuple[str, ...], besides: Sequence[str] = ()) -> type[Options]:
        if isinstance(kind, str):
            try:
                return self.source._lookup(self.family, kind, besides)
            except SpecError as error:
                raise invalid(self.family, [replace(problem, path=loc) for problem in error.problems]) from None
        got = "nothing" if kind is _MISSING else typed_repr(kind)
        raise invalid(self.family, [Problem(loc, got, f"a {self.family}'s kind: {self._known()}", code="unknown_kind")])

    def _json_schema(self, handler: GetJsonSchemaHandler, nullable: bool) -> JsonSchemaValue:
        kinds = self.source.kinds(self.family)
        bare = [kind for kind, entry in kinds.items() if not _needs_options(entry.spec)]
        bare += ["none"] if nullable else []
        choices: list[dict[str, Any]] = [{"enum": bare}] if bare else []
        if self.family in _showing.get():  # a kind that holds another of its family: name the kinds and stop
            kind = {"properties": {"kind": {"enum": list(kinds)}}, "required": ["kind"], "type": "object"}
            return {"anyOf": [*choices, kind]}
        token = _showing.set(_showing.get() | {self.family})
        try:
            models = [handler(_whole(entry.spec.__pydantic_core_schema__)) for entry in kinds.values()]
        finally:
            _showing.reset(token)
        choices += [{"allOf": [model], "required": ["kind"]} for model in models]
        choices += [dict(self.shorthand_schema)] if self.shorthand_schema else []
        choices += [{"type": "null"}] if nullable else []
        return {"anyOf": choices}


_MISSING = object()


def _needs_options(spec: type[Options]) -> bool:
    return any(field.is_required() for field in spec.model_fields.values())
