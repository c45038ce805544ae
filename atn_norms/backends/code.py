"""The code of a plugin's class, with the globals and closures that it reads; a fast backend keeps results of it."""

from __future__ import annotations

import dis
import enum
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property, lru_cache, partial
from importlib.util import resolve_name
from itertools import count
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atn_norms.backends.native.library import constant_to_compilers
from atn_norms.errors import with_article

KNOWN = {"torch", "atn_norms", *sys.stdlib_module_names}  # packages whose code does not change
NORM = "measure", "normalize", "forward"
WINDOW = "push", "scan", "initial", "layout", "weight_at", "detaches_past"
MOST = 1024  # number of classes that are kept
APPLIED = "forward", "backward", "setup_context", "vjp", "jvp"  # methods that `torch.autograd.Function.apply` calls
# Special methods that compute nothing, those that run before a normalizer is traced, and those that `dataclass` writes.
_UNRELATED = {"__repr__", "__str__", "__hash__", "__eq__", "__del__", "__init_subclass__", "__class_getitem__"}
_UNRELATED |= {"__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"}
_CONSTRUCTORS = {"__init__", "__new__", "__post_init__"}
_GENERATED = {"__init__", "__repr__", "__hash__", "__eq__", "__lt__", "__le__", "__gt__", "__ge__"}


class Reads(NamedTuple):
    """The functions and names that the methods of a class read besides their arguments.

    | field | meaning |
    |---|---|
    | `functions` | every function that they may call, with its code, its defaults and its keyword defaults |
    | `names` | a function that looks up a global, a class attribute or the content of a cell, and its name |
    """

    functions: tuple[tuple[types.FunctionType, types.CodeType, Any, Any], ...]
    names: tuple[tuple[Callable[[str], Any], str], ...]


class Snapshot:
    """The values of what a class reads, at one time.

    `state` is a number that no other snapshot has, or the reason why a value could change unnoticed. `codes` are the
    code objects of all functions that are followed, with those inside them.
    """

    def __init__(self, reads: Reads) -> None:
        self.functions = reads.functions
        self.codes = frozenset(each for _, code, *_ in reads.functions for each in _codes(code))
        self._same: list[tuple[Callable[[str], Any], str, Any]] = []  # objects that are compared by identity first
        self._equal: list[tuple[Callable[[str], Any], str, Any]] = []  # frozen
        self.state: int | str = next(_numbers)
        for look_up, name in reads.names:
            value = look_up(name)
            try:
                content = frozen(value)
            except TypeError:
                self.state = f"it reads {name!r}, {with_article(type(value).__name__)}, which may change unnoticed"
                self._same.append((look_up, name, value))
                continue
            if type(value) in _CONSTANT:
                self._same.append((look_up, name, value))
            else:
                self._equal.append((look_up, name, content))

    def is_current(self) -> bool:
        """Return True if nothing has changed."""
        for function, code, defaults, keywords in self.functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ is not keywords:
                return False
        try:
            for look_up, name, value in self._same:
                if look_up(name) is not value and frozen(look_up(name)) != frozen(value):
                    return False
            return all(frozen(look_up(name)) == content for look_up, name, content in self._equal)
        except TypeError:  # another value, which cannot be frozen
            return False


@constant_to_compilers
def norm_state(kind: type) -> int | str:
    """Return a number that changes with the code of a normalizer's class and all that the code reads.

    If something could change unnoticed, return this reason.
    """
    return _state(kind, NORM)


@constant_to_compilers
def module_state(kind: type) -> int | str:
    """Return such a number, or such a reason, for all methods of a module inside a normalizer."""
    return _state(kind, ())


@constant_to_compilers
def window_state(kind: type) -> int | str:
    """Return such a number, or such a reason, for the class of a window."""
    return _state(kind, WINDOW)


@constant_to_compilers
def held_states(value: Any, kind: type) -> tuple[int | str, ...]:
    """Return the states of all functions and classes of a plugin in the value of an attribute of `kind`."""
    return tuple(snapshot.state for snapshot in held(value, kind))


def held(value: Any, kind: type) -> Iterator[Snapshot]:
    """Yield the snapshots of all functions and classes of a plugin in the value of an attribute of `kind`."""
    if type(value) in SIMPLE:
        return
    function = _function(value)
    if function is not None or isinstance(value, type):
        if _root((function or value).__module__) not in KNOWN:
            yield _snapshot(function or value, (), kind)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from held(part, kind)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from held(part, kind)
    elif _root(type(value).__module__) not in KNOWN:
        yield _snapshot(type(value), (), kind)
        for part in getattr(value, "__dict__", {}).values():
            yield from held(part, kind)


_states: dict[Any, Snapshot] = {}
_numbers = count(1)


def _state(kind: type, start: tuple[str, ...]) -> int | str:
    return snapshot_of(kind, start).state if is_followed(kind) else 0


def is_followed(kind: type) -> bool:
    """Return True for a class of a plugin; the code of others does not change."""
    return _root(kind.__module__) not in KNOWN


def snapshot_of(kind: type, start: tuple[str, ...]) -> Snapshot:
    """Return the snapshot of the methods `start` of a class; of all its methods without `start`."""
    return _snapshot(kind, start, kind)


def is_own(module: str, kind: type) -> bool:
    """Return True for a module whose code can change, as seen from a class: its packages, and modules not installed."""
    return _Walk(kind).is_own(module)


def _snapshot(value: type | types.FunctionType, start: tuple[str, ...], kind: type) -> Snapshot:
    key = value, start, kind
    snapshot = _states.get(key)
    if snapshot is None or not snapshot.is_current():
        snapshot = Snapshot(_reads_of(value, start, kind))
        if len(_states) >= MOST:
            _states.clear()
        _states[key] = snapshot
    return snapshot


def _reads_of(value: type | types.FunctionType, start: tuple[str, ...], kind: type) -> Reads:
    """Return what a function, or the methods `start` of a class, read, with every function that they name.

    For a class, all its attributes are read; without `start`, all its methods may be called.
    """
    walk = _Walk(kind)
    owners = [each for each in value.__mro__ if walk.is_own(each.__module__)] if isinstance(value, type) else []
    if owners and not start:
        start = tuple(name for owner in owners for name in _names_of(owner))
    walk.visit(value, start, set())
    for owner in owners:
        for name in _names_of(owner):
            if not _is_slot(getattr(value, name)):
                walk.names[0, name] = partial(_inherited, value), name
                if _function(getattr(value, name)) is None:  # a table may hold functions
                    walk.visit(getattr(value, name), start, set())
    return Reads(tuple(walk.functions.values()), tuple(walk.names.values()))


def _names_of(owner: type) -> list[str]:
    """Return the attributes of a class that its author wrote, without special methods."""
    return [name for name in vars(owner) if not name.startswith("__") and name not in ("_abc_impl", "_defined")]


class _Walk:
    """Follow functions from the methods of a class."""

    def __init__(self, kind: type) -> None:
        self.kind, self._packages = kind, {_root(base.__module__) for base in kind.__mro__}
        self.functions: dict[types.FunctionType, tuple[types.FunctionType, types.CodeType, Any, Any]] = {}
        self.names: dict[tuple[int, str], tuple[Callable[[str], Any], str]] = {}
        self._methods: set[tuple[type, types.FunctionType]] = set()

    def visit(self, value: Any, attributes: tuple[str, ...], seen: set[int]) -> None:
        """Follow a value that some code reads; `attributes` are the names of all attributes in the code."""
        function = _function(value)
        if function is not None:
            self.follow(function)
            for name in set(attributes) & vars(function).keys():
                self.names[id(function), name] = partial(_attribute, function), name
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            for part in value.values() if isinstance(value, Mapping) else value:
                self.visit(part, attributes, seen)
        elif isinstance(value, types.ModuleType):
            if self.is_own(value.__name__):
                self._visit_attributes(value, attributes, seen)
        elif isinstance(value, type):
            for owner in value.__mro__:
                if self.is_own(owner.__module__):
                    self._visit_attributes(owner, (*attributes, *self._called(owner)), seen)
        elif type(value) not in SIMPLE:
            self.visit(type(value), attributes, seen)

    def _called(self, owner: type) -> list[str]:
        """Return the methods of a class that run without their name; the kernels pool the statistics of the code."""
        skipped = _UNRELATED | (_CONSTRUCTORS if owner in self.kind.__mro__ else set())
        names = [name for name in vars(owner) if name.startswith("__") and name not in skipped]
        special = [name for name in names if _is_written(vars(owner)[name])]
        return [*special, "pool", *(APPLIED if issubclass(owner, torch.autograd.Function) else ())]

    def _visit_attributes(self, owner: type | types.ModuleType, names: tuple[str, ...], seen: set[int]) -> None:
        for name in names:
            if name in vars(owner):
                inner = vars(owner)[name]
                if not _is_slot(inner):
                    self.names[id(owner), name] = partial(_attribute, owner), name
                self.visit(inner, names, seen)
                function = _function(inner)
                if function is not None and isinstance(owner, type) and (owner, function) not in self._methods:
                    self._methods.add((owner, function))
                    attributes = tuple(code_names(function.__code__))  # which it may read from its class
                    self._visit_attributes(owner, attributes, seen)

    def follow(self, function: types.FunctionType) -> None:
        """Follow the globals, the variables of outer functions and the attributes that a function reads."""
        if function in self.functions or _root(function.__module__) in KNOWN:
            return
        code = function.__code__
        self.functions[function] = function, code, function.__defaults__, function.__kwdefaults__
        attributes, seen = tuple(dict.fromkeys((*code_names(code), *_named_by_text(code)))), set[int]()
        self.visit(self.kind, attributes, seen)
        pairs = [
            (id(function.__globals__), partial(_global, function.__globals__), name) for name in _global_names(code)
        ]
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        pairs += [(id(cell), partial(_content, cell), name) for name, cell in cells]
        pairs += [(id(function), partial(_default, function), name) for name in _defaults(function)]
        pairs += [(id(sys.modules), sys.modules.get, name) for name in _imports(function)]
        for owner, look_up, name in pairs:
            if self.is_own(function.__module__):
                self.names[owner, name] = look_up, name
            self.visit(look_up(name), attributes, seen)

    def is_own(self, module: str) -> bool:
        """Return True for a module of a package of the class or its bases, and for one that is not installed."""
        root = _root(module)
        if root in KNOWN or root.startswith("namedtuple_"):
            return False
        file = getattr(sys.modules.get(root), "__file__", None) or ""
        return root in self._packages or "site-packages" not in PurePath(file).parts


class _Missing:
    pass


def _global(names: dict[str, Any], name: str) -> Any:
    return names.get(name, _Missing)


def _attribute(owner: Any, name: str) -> Any:
    return vars(owner).get(name, _Missing)


def _default(function: types.FunctionType, name: str) -> Any:
    return _defaults(function).get(name, _Missing)


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    """Return the defaults of a function's parameters."""
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(names, values, strict=True)), **(function.__kwdefaults__ or {})}


def _imports(function: types.FunctionType) -> Iterator[str]:
    """Yield the modules that a function imports when it is called."""
    for each in _codes(function.__code__):
        steps = list(dis.get_instructions(each))
        for place, step in enumerate(steps):
            if step.opname == "IMPORT_NAME":
                dots = "." * (steps[place - 2].argval or 0)
                package = function.__globals__.get("__package__")
                yield resolve_name(dots + step.argval, package) if dots and package else step.argval


def _inherited(kind: Any, name: str) -> Any:
    return getattr(kind, name, _Missing)


def _content(cell: types.CellType, name: str) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _Missing


def _function(value: Any) -> types.FunctionType | None:
    """Return the function of a method, a property or a cached function."""
    for name in ("fget", "__func__", "func", "__wrapped__"):
        if name in vars(type(value)) and _root(type(value).__module__) in KNOWN:
            value = getattr(value, name)
    return value if isinstance(value, types.FunctionType) else None


def _is_slot(value: Any) -> bool:
    """Return True for a descriptor without Python code, such as a field of a named tuple."""
    return hasattr(value, "__get__") and _function(value) is None and _root(type(value).__module__) in KNOWN


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def code_names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of attributes and globals in a piece of code, with the functions inside it."""
    for each in _codes(code):
        yield from each.co_names


def _global_names(code: types.CodeType) -> Iterator[str]:
    for each in _codes(code):
        yield from (step.argval for step in dis.get_instructions(each) if step.opname == "LOAD_GLOBAL")


def _named_by_text(code: types.CodeType) -> Iterator[str]:
    """Yield the constant names of attributes in code that uses `getattr`."""
    for each in _codes(code):
        if "getattr" in each.co_names:
            yield from (value for value in each.co_consts if isinstance(value, str) and value.isidentifier())


def is_generated(code: types.CodeType) -> bool:
    """Return True for a special method that `dataclass` wrote."""
    return code.co_filename == "<string>" and code.co_name in _GENERATED


def _is_written(value: Any) -> bool:
    """Return True for a function of a class that its author wrote."""
    function = _function(value)
    return function is not None and not is_generated(function.__code__)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


_PLAIN = (
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    torch.dtype,
    torch.device,
    PurePath,
    enum.Enum,
    range,
    slice,
)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, property, cached_property)
_NAMED += (staticmethod, classmethod, types.MethodType, types.GenericAlias, torch.jit.ScriptFunction)
_NAMED += (type(lru_cache(lambda: None)),)
SIMPLE = {*_PLAIN}  # exact types
_CONSTANT = {*_PLAIN, *_NAMED}


def frozen(value: Any) -> Any:
    """Return a hashable value that changes with all that code may read of this value; `TypeError` if there is none."""
    kind = type(value)
    if kind is float:
        return "float", value.hex()
    if (
        isinstance(value, (*_PLAIN, list, tuple, set))
        and hasattr(value, "__dict__")
        and not isinstance(value, enum.Enum)
    ):
        raise TypeError  # a subclass that carries attributes
    if isinstance(value, _PLAIN):
        return kind, value
    if isinstance(value, Tensor):  # an operation that reads its elements has no program
        return "tensor", value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, (list, tuple)):
        return (kind, *map(frozen, value))
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(frozen, value))
    if isinstance(value, Mapping):
        return (kind, *((name, frozen(part)) for name, part in value.items()))
    parameters = getattr(kind, "__dataclass_params__", None)
    config = getattr(kind, "model_config", {})
    if parameters is not None and parameters.frozen:  # not by `==`, which may leave fields out
        return (kind, *((field.name, frozen(getattr(value, field.name, _Missing))) for field in fields(value)))
    if isinstance(value, _NAMED) or config.get("frozen"):
        hash(value)
        return value
    raise TypeError
