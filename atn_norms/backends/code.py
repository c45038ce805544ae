"""The code of a plugin's class, with the globals and closures that it reads; a fast backend keeps results of it."""

from __future__ import annotations

import dis
import enum
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from itertools import count
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atn_norms.backends.native.library import constant_to_compilers

KNOWN = {"torch", "atn_norms", *sys.stdlib_module_names}  # packages whose code does not change
NORM = "measure", "normalize", "forward"
WINDOW = "push", "scan", "initial", "layout", "weight_at", "detaches_past"
MOST = 1024  # number of classes that are kept


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

    `state` is a number that no other snapshot has, or the reason why a value could change unnoticed.
    """

    def __init__(self, reads: Reads) -> None:
        self.functions = reads.functions
        self._same: list[tuple[Callable[[str], Any], str, Any]] = []  # objects that are compared by identity first
        self._equal: list[tuple[Callable[[str], Any], str, Any]] = []  # frozen
        self.state: int | str = next(_numbers)
        for look_up, name in reads.names:
            value = look_up(name)
            try:
                content = frozen(value)
            except TypeError:
                self.state = f"it reads {name!r}, a {type(value).__name__}, which may change unnoticed"
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
def window_state(kind: type) -> int | str:
    """Return such a number, or such a reason, for the class of a window."""
    return _state(kind, WINDOW)


_states: dict[type, Snapshot] = {}
_numbers = count(1)


def _state(kind: type, start: tuple[str, ...]) -> int | str:
    if _root(kind.__module__) in KNOWN:
        return 0
    snapshot = _states.get(kind)
    if snapshot is None or not snapshot.is_current():
        snapshot = Snapshot(reads_of(kind, start))
        if len(_states) >= MOST:
            _states.clear()
        _states[kind] = snapshot
    return snapshot.state


def reads_of(kind: type, start: tuple[str, ...]) -> Reads:
    """Return what the methods `start` of a class read, with every function that they name and all class attributes."""
    walk = _Walk(kind)
    walk.visit(kind, start, set())
    for owner in filter(lambda owner: walk.is_own(owner.__module__), kind.__mro__):
        for name in vars(owner):
            if (
                not name.startswith("__")
                and name not in ("_abc_impl", "_defined")
                and not _is_slot(getattr(kind, name))
            ):
                walk.names[0, name] = partial(_inherited, kind), name
    return Reads(tuple(walk.functions.values()), tuple(walk.names.values()))


class _Walk:
    """Follow functions from the methods of a class."""

    def __init__(self, kind: type) -> None:
        self.kind, self._packages = kind, {_root(base.__module__) for base in kind.__mro__}
        self.functions: dict[types.FunctionType, tuple[types.FunctionType, types.CodeType, Any, Any]] = {}
        self.names: dict[tuple[int, str], tuple[Callable[[str], Any], str]] = {}

    def visit(self, value: Any, attributes: tuple[str, ...], seen: set[int]) -> None:
        """Follow a value that some code reads; `attributes` are the names of all attributes in the code."""
        function = _function(value)
        if function is not None:
            self.follow(function)
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        for owner in value.__mro__ if isinstance(value, type) else (value,):
            if isinstance(owner, (type, types.ModuleType)) and self.is_own(_module_of(owner)):
                for name in (*attributes, "pool"):  # the kernels pool the statistics that the code makes
                    if name in vars(owner):
                        inner = vars(owner)[name]
                        if not _is_slot(inner):
                            self.names[id(owner), name] = partial(_attribute, owner), name
                        self.visit(inner, attributes, seen)

    def follow(self, function: types.FunctionType) -> None:
        """Follow the globals, the variables of outer functions and the attributes that a function reads."""
        if function in self.functions or _root(function.__module__) in KNOWN:
            return
        code = function.__code__
        self.functions[function] = function, code, function.__defaults__, function.__kwdefaults__
        attributes, seen = tuple(dict.fromkeys(code_names(code))), set[int]()
        self.visit(self.kind, attributes, seen)
        pairs = [
            (id(function.__globals__), partial(_global, function.__globals__), name) for name in _global_names(code)
        ]
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        pairs += [(id(cell), partial(_content, cell), name) for name, cell in cells]
        for owner, look_up, name in pairs:
            if self.is_own(function.__module__):
                self.names[owner, name] = look_up, name
            self.visit(look_up(name), attributes, seen)

    def is_own(self, module: str) -> bool:
        """Return True for a module of a package of the class or its bases, and for one that is not installed."""
        root = _root(module)
        file = getattr(sys.modules.get(root), "__file__", None) or ""
        return root not in KNOWN and (root in self._packages or "site-packages" not in PurePath(file).parts)


class _Missing:
    pass


def _global(names: dict[str, Any], name: str) -> Any:
    return names.get(name, _Missing)


def _attribute(owner: type | types.ModuleType, name: str) -> Any:
    return vars(owner).get(name, _Missing)


def _inherited(kind: type, name: str) -> Any:
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


def _module_of(value: Any) -> str:
    return value.__name__ if isinstance(value, types.ModuleType) else value.__module__


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def code_names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of attributes and globals in a piece of code, with the functions inside it."""
    for each in _codes(code):
        yield from each.co_names


def _global_names(code: types.CodeType) -> Iterator[str]:
    for each in _codes(code):
        yield from (step.argval for step in dis.get_instructions(each) if step.opname == "LOAD_GLOBAL")


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
_CONSTANT = {*_PLAIN, *_NAMED}  # exact types


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
    if isinstance(value, Tensor):
        return "tensor"  # an operation that reads such a tensor has no program
    if isinstance(value, (list, tuple)):
        return (kind, *map(frozen, value))
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(frozen, value))
    if isinstance(value, Mapping):
        return (kind, *((name, frozen(part)) for name, part in value.items()))
    parameters = getattr(kind, "__dataclass_params__", None)
    config = getattr(kind, "model_config", {})
    if isinstance(value, _NAMED) or (parameters is not None and parameters.frozen) or config.get("frozen"):
        hash(value)
        return value
    raise TypeError
