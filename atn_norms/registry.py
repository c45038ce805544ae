"""Kinds: the registry of kinds, and the field of an options model that takes any kind."""

from __future__ import annotations

import importlib
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from atn_norms.errors import (
    Problem,
    SpecError,
    did_you_mean,
    dotted,
    mismatch,
    nearest,
    one_of,
    pydantic_error,
    to_spec_error,
    typed_repr,
    unknown,
)
from atn_norms.options import Options, invalid, to_dict, to_int

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

SpecType = TypeVar("SpecType", bound=type[Options])


@dataclass(frozen=True)
class Source:
    """Source of a kind: the name of its plugin, and the distribution of the plugin with its version."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.distribution, self.version) if part)


@dataclass(frozen=True)
class Entry:
    """A registered kind: its options model and its source."""

    spec: type[Options]
    distribution: str
    version: str
    plugin: str


class Registry:
    """The kinds of every family, each with its options model; a kind with two options models is unusable.

    `normalizer`, `window`, `cell` and `task` register a concrete options model of that family with a field
    `kind: Literal["name"] = "name"`, and return it, so each is a decorator too. `loader` names a function
    `"module:function"` that is called with this registry at the first look-up.

    Errors: `TypeError` for an object that cannot be registered, `SpecError` for the look-up of an unknown kind or of a
    kind that two plugins register.

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
        """Run the loader once, and return its result."""
        with self._lock:
            if self._loader is not None and not self._loading:
                self._loading = True  # set first: a look-up by a plugin that is loading must not load again
                module, _, function = self._loader.partition(":")
                try:
                    self._loaded = getattr(importlib.import_module(module), function)(self)
                except BaseException:
                    self._loading = False
                    raise
        return self._loaded

    def lookup(self, family: str, kind: str) -> type[Options]:
        """Return the options model of a kind; `SpecError` if it is unknown or if two plugins register it."""
        return self._lookup(family, kind)

    def _lookup(self, family: str, kind: str, besides: Sequence[str] = ()) -> type[Options]:
        """Look up a kind; an error lists the words `besides` too, which are allowed and no kinds."""
        entries = self._of(family).get(kind, [])
        if len(entries) == 1:
            return entries[0].spec
        if entries:
            raise SpecError.of([Problem(detail=disputed(family, kind, entries), code="disputed_kind")])
        problem = unknown(family, kind, [*self.kinds(family), *besides])
        detail = cure_of_unknown(self, family, misspelt=bool(problem.nearest))
        raise SpecError.of([replace(problem, detail=detail, code="unknown_kind")])

    def kinds(self, family: str) -> dict[str, Entry]:
        """Return the usable kinds of a family, in alphabetical order."""
        claims = self._of(family)
        return {kind: claims[kind][0] for kind in sorted(claims) if len(claims[kind]) == 1}

    def conflicts(self, family: str) -> dict[str, tuple[Entry, ...]]:
        """Return the kinds of a family that several plugins register, with every entry."""
        claims = self._of(family)
        return {kind: tuple(claims[kind]) for kind in sorted(claims) if len(claims[kind]) > 1}

    def _of(self, family: str) -> dict[str, list[Entry]]:
        if family not in FAMILIES:
            raise SpecError.of([unknown("family", family, FAMILIES)])
        self.load()
        return self._claims[family]

    @contextmanager
    def transaction(self, source: Source) -> Iterator[dict[str, type[Options]]]:
        """Assign the kinds registered inside to a source; yield them by `family:kind`; an exception removes them."""
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
            for other in entries:
                if other.spec is spec and other.plugin not in ("", entry.plugin):
                    got = f"{spec.__qualname__}, which {other.distribution} registers"
                    raise TypeError(mismatch(f"registry.{family}", got, "a class that no other plugin registers"))
            # Running a notebook cell again defines the same class again: this replaces it without a conflict.
            entries[:] = [other for other in entries if _identity(other) != _identity(entry)] + [entry]
            self._claimed[f"{family}:{kind}"] = spec
        return spec


def disputed(family: str, kind: str, entries: Iterable[Entry]) -> str:
    """Return the message for a kind that several plugins, or several classes of one plugin, register."""
    claims: dict[str, list[str]] = {}
    for entry in entries:
        claims.setdefault(entry.distribution, []).append(f"{entry.spec.__module__}.{entry.spec.__qualname__}")
    sources = " and ".join(f"{source} ({' and '.join(classes)})" for source, classes in claims.items())
    cure = "uninstall one, or block its plugin" if len(claims) > 1 else "register only one of them"
    return f"{family} {kind!r} is claimed by {sources}, so it is unusable; {cure}"


def cure_of_unknown(source: Registry, family: str, how: str = "", misspelt: bool = False) -> str:
    """Return what to do about an unknown kind, which a plugin that failed to load may have.

    `how` shows how to install a package. A kind that is probably `misspelt` needs no package.
    """
    failed = [each.name for each in source.load() or () if each.status == "failed"]
    if failed:
        return f"Plugins that failed to load: {', '.join(failed)}; `atn-norms plugins` has the reasons."
    return "" if misspelt else f"Install the package that has the {family}{how}."


def _identity(entry: Entry) -> tuple[str, str, str]:
    return entry.plugin, entry.spec.__module__, entry.spec.__qualname__


def _kind_of(family: str, spec: Any) -> str:
    name, path = getattr(spec, "__qualname__", repr(spec)), f"registry.{family}"
    if not (isinstance(spec, type) and issubclass(spec, Options)):
        raise TypeError(mismatch(path, name, "an options model (a subclass of Options)"))
    if spec.family != family:
        raise TypeError(mismatch(path, f"{name} of family {spec.family!r}", f"the options of a {family}"))
    if inspect.isabstract(spec):
        got = f"{name} without {', '.join(sorted(spec.__abstractmethods__))}"
        raise TypeError(mismatch(path, got, "a concrete options model"))
    if "family" in spec.model_fields:
        got = f"{name} with a field 'family'"
        raise TypeError(mismatch(path, got, "another name of the field, since `family` is a class attribute"))
    if not spec.model_config.get("frozen"):
        raise TypeError(
            mismatch(path, f"{name} with `frozen` set to False in its model_config", "a frozen options model")
        )
    field = spec.model_fields.get("kind")
    names = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    if field is None or len(names) != 1 or field.default != names[0]:
        expected = 'a field `kind: Literal["name"] = "name"`, with one name on both sides'
        raise TypeError(mismatch(path, f"{name} without a fixed kind", expected))
    kind = names[0]
    if not (isinstance(kind, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", kind)) or kind == "none":
        expected = "lower-case letters, digits, '-' or '_', and not 'none'"
        raise TypeError(mismatch(f"{name}.kind", repr(kind), expected))
    return kind


registry = Registry(loader="atn_norms.plugins:load")

_showing: ContextVar[frozenset[str]] = ContextVar("_showing", default=frozenset())


def _whole(schema: CoreSchema) -> CoreSchema:
    """Wrap a schema so that a JSON schema handler applies its metadata, which it skips at the top level."""
    return core_schema.definitions_schema(schema, [])


@dataclass(frozen=True, eq=False)
class KindField:
    """Accept every registered kind of a family as a field: `Annotated[NormSpec, KindField("normalizer")]`.

    The registry is read when a value is validated or a schema is written, but not when the class is built. Accepted
    values are: a spec of the family, registered or not; the name of a kind, for its default options; a mapping with
    `kind` and the options of that kind; and any value that `shorthand` converts to one of these. A field that allows
    None (`Annotated[NormSpec | None, ...]`) also accepts None and `"none"`.

    | argument | meaning |
    |---|---|
    | `family` | `normalizer`, `window`, `cell` or `task` |
    | `shorthand` | function of a value, applied to all values but specs |
    | `shorthand_schema` | JSON schema of the values that `shorthand` accepts |
    | `shorthand_kinds` | kinds that only `shorthand` accepts; messages list them with the registered kinds |
    | `source` | the registry of the kinds |
    """

    family: str
    shorthand: Callable[[Any], Any] | None = None
    shorthand_schema: Mapping[str, Any] | None = None
    shorthand_kinds: Sequence[str] = ()
    source: Registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        nullable = type(None) in get_args(source)
        return core_schema.no_info_plain_validator_function(
            lambda value: self.resolve(value, nullable),
            metadata={"pydantic_js_functions": [lambda _, handler: self._json_schema(handler, nullable)]},
        )

    def resolve(self, value: Any, nullable: bool = False) -> Options | None:
        """Turn a value into a spec of the family; errors are pydantic's, located below the field."""
        value = to_int(to_dict(value))
        if self._accepts(value, nullable):
            return value
        if self.shorthand is not None:
            value = self.shorthand(value)
            if self._accepts(value, nullable):
                return value
        number = ["an integer"] * ((self.shorthand_schema or {}).get("type") == "integer")
        if isinstance(value, str) and not (number and value.isdecimal()):
            if nullable and value == "none":
                return None
            return self._model(value, (), [*number, *["none"] * nullable]).model_validate({"kind": value})
        if isinstance(value, Mapping):
            return self._model(value.get("kind", _MISSING), ("kind",)).model_validate(dict(value))
        expected = ", ".join([*number, f"a {self.family}'s kind ({self._known()})", "a mapping or a spec"])
        raise pydantic_error(Problem(got=typed_repr(value), expected=expected))

    def _accepts(self, value: Any, nullable: bool) -> bool:
        return (value is None and nullable) or (isinstance(value, Options) and value.family == self.family)

    def _known(self) -> str:
        return one_of([*self.source.kinds(self.family), *self.shorthand_kinds])

    def _model(self, kind: Any, loc: tuple[str, ...], besides: Sequence[str] = ()) -> type[Options]:
        if isinstance(kind, str):
            try:
                return self.source._lookup(self.family, kind, [*self.shorthand_kinds, *besides])
            except SpecError as error:
                raise invalid(self.family, [replace(problem, path=loc) for problem in error.problems]) from None
        got = "nothing" if kind is _MISSING else typed_repr(kind)
        raise invalid(self.family, [Problem(loc, got, f"a {self.family}'s kind: {self._known()}", code="unknown_kind")])

    def _json_schema(self, handler: GetJsonSchemaHandler, nullable: bool) -> JsonSchemaValue:
        kinds = self.source.kinds(self.family)
        bare = [kind for kind, entry in kinds.items() if not _needs_options(entry.spec)]
        bare += ["none"] if nullable else []
        choices: list[dict[str, Any]] = [{"enum": bare}] if bare else []
        if self.family in _showing.get():  # a kind that has an option of the same family: list the kinds and stop
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
