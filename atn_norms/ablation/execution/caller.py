"""Compare the globals of a function in the process that starts a study with those of its trials."""

from __future__ import annotations

import argparse
import ast
import datetime
import dis
import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from enum import Enum
from numbers import Number
from pathlib import Path, PurePath
from types import CodeType, FunctionType, ModuleType, NoneType, SimpleNamespace
from typing import Any

import torch

from atn_norms.ablation.execution.function import contained, loaded
from atn_norms.ablation.execution.random_state import random_state, restore_random_state
from atn_norms.ablation.execution.trial import isolated
from atn_norms.ablation.grid.functions import FunctionSpec, hash_code
from atn_norms.ablation.grid.imports import local_modules, syntax_tree, uncounted
from atn_norms.ablation.grid.starts import READS
from atn_norms.errors import Problem, SpecError, brief, short_repr, with_article

PLAIN = (str, bytes, NoneType, Number, PurePath, Enum, range, datetime.date, torch.device, torch.dtype)
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
MISSING = object()


def refuse_different_globals(function: Callable[..., Any], task: FunctionSpec) -> None:
    """Raise `SpecError` for each setting that a function reads, and that has another value in its trials.

    The settings are globals, defaults and closures of the function, and of the functions and classes of its file that
    it names. Plain values, and lists, mappings, namespaces, partial functions and dataclasses of them, are compared by
    value; others by type. A study file needs no check: it names a file, which every trial executes, and no function of
    a running process.

    Errors: `SpecError` too where trials could not load the function.
    """
    state, file, code = random_state(), Path(task.file), hash_code(Path(task.file))
    try:
        with isolated(), contained(lambda line: None, task.function), local_modules(file):
            theirs = loaded(task, code)
    finally:
        restore_random_state(state)
    for warning in uncounted(theirs, file, task.files):
        warnings.warn(warning, stacklevel=3)
    comparison = _Comparison(function, theirs, file.name, syntax_tree(file))
    comparison.compare(function.__name__, function, theirs)
    if comparison.problems:
        raise SpecError.of(comparison.problems.values())


class _Comparison:
    """Compare a function in this process with the function as trials load it; `problems` are by name."""

    def __init__(self, mine: Any, theirs: Any, file: str, tree: ast.AST) -> None:
        self.problems: dict[str, Problem] = {}
        self._spaces = mine.__globals__, theirs.__globals__
        self._definitions = Counter(each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef))
        self._file, self._seen = file, set[tuple[int, int]]()

    def compare(self, name: str, mine: Any, theirs: Any) -> None:
        """Compare two values, and their parts."""
        if mine is theirs or (id(mine), id(theirs)) in self._seen:
            return
        if self._is_own(mine) and self._is_own(theirs):
            self._compare_definitions(name, mine, theirs)
            paths = set(_reads(mine.__code__)) & set(_reads(theirs.__code__))
            here, there = _values(name, mine, paths), _values(name, theirs, paths)
        else:
            here, there = self._parts(name, mine), self._parts(name, theirs)
        if here is None or there is None or type(mine).__name__ != type(theirs).__name__:
            if _text(mine) != _text(theirs):
                self._add(name, _text(mine), None if theirs is MISSING else _text(theirs))
            return
        self._seen.add((id(mine), id(theirs)))
        for each in dict.fromkeys([*here, *there]):
            self.compare(each, here.get(each, MISSING), there.get(each, MISSING))

    def _is_own(self, value: Any) -> bool:
        """Check for a function of the file."""
        return isinstance(value, FunctionType) and any(value.__globals__ is each for each in self._spaces)

    def _compare_definitions(self, name: str, mine: FunctionType, theirs: FunctionType) -> None:
        """Compare the names of two functions, and their lines where the file defines several of this name."""
        here, there = (f"{each.__qualname__} at line {each.__code__.co_firstlineno}" for each in (mine, theirs))
        if mine.__name__ != theirs.__name__ or (here != there and self._definitions[mine.__name__] > 1):
            self._add(name, here, there)

    def _parts(self, name: str, value: Any) -> dict[str, Any] | None:
        """Return what a value consists of; None for a value that is compared as a whole."""
        if isinstance(value, functools.partial):
            return {f"{name}.{each}": getattr(value, each) for each in ("func", "args", "keywords")}
        if isinstance(value, Mapping):
            return {f"{name}[{short_repr(key)}]": each for key, each in value.items()}
        if (inner := getattr(value, "__wrapped__", None)) is not None:
            return {name: inner}  # of a method or a decorated function
        kind = value if isinstance(value, type) else type(value)
        is_own = kind.__module__ in [each["__name__"] for each in self._spaces]
        if isinstance(value, type) and is_own:
            members = {key: each for key, each in vars(value).items() if key[:2] != "__" or self._is_own(each)}
            return {each.__name__: each for each in value.__bases__} | {
                f"{name}.{key}": members[key] for key in members
            }
        items: dict[str, Any] = {}
        if isinstance(value, list | tuple) and (is_own or not all(isinstance(each, PLAIN) for each in value)):
            items = {f"{name}[{place}]": each for place, each in enumerate(value)}
        if isinstance(value, argparse.Namespace | SimpleNamespace) or is_dataclass(kind) or is_own:
            fields = dict(_slots(value)) | (vars(value) if hasattr(value, "__dict__") else {})
            return items | {kind.__name__: kind} | {f"{name}.{key}": each for key, each in fields.items()}
        return items or None

    def _add(self, name: str, got: str, expected: str | None) -> None:
        cure = f"Pass {name} as an axis or in `arguments`."
        if expected is None:
            cure = f"Define {name} above that call and outside of that block, or pass it as an axis or in `arguments`."
        trials = f"Trials execute {self._file} again, up to its first call of ablate, without the block under __main__"
        detail = f"{trials} and without arguments of the command line. {cure}"
        wanted = "a name that the trials define" if expected is None else f"{brief(expected)}, as in the trials"
        self.problems.setdefault(name, Problem((name,), f"{brief(got)} in this process", wanted, detail=detail))


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object that are in `__slots__`."""
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            attribute = f"_{base.__name__.lstrip('_')}{name}" if is_private else name
            if name != "__dict__" and hasattr(value, attribute):
                yield name, getattr(value, attribute)


def _reads(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Yield the globals that a function's code reads, each with the attributes read from it.

    A global, or an attribute of one, that the code sets is no setting.
    """
    paths: list[tuple[str, ...]] = []
    stored, is_path = set[tuple[str, ...]](), False
    for each in dis.get_instructions(code):
        if is_path and each.opname == "STORE_ATTR":
            stored.add((*paths[-1], each.argval))
        if is_path and each.opname in ATTRIBUTES:
            paths[-1] = (*paths[-1], each.argval)
            continue
        is_path = each.opname in READS
        paths += [(each.argval,)] if is_path else []
        stored |= {(each.argval,)} if each.opname == "STORE_GLOBAL" else set()
    inner = [path for each in code.co_consts if isinstance(each, CodeType) for path in _reads(each)]
    for path in paths + inner:
        if path[0].isidentifier() and not any(path[: len(each)] == each for each in stored):
            yield path


def _values(name: str, function: FunctionType, paths: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """Return the globals at some paths, the defaults and the closure of a function, by name."""
    values: dict[str, Any] = {}
    for first, *attributes in sorted(paths):
        value, path = function.__globals__.get(first, MISSING), first
        while attributes and isinstance(value, ModuleType):
            path = f"{path}.{attributes[0]}"
            value = vars(value).get(attributes.pop(0), MISSING)
        if attributes and isinstance(value, FunctionType) and attributes[0] in vars(value):
            values[f"{path}.{attributes[0]}"] = vars(value)[attributes[0]]
        if value is not MISSING and not first.startswith("__"):
            values[path] = value
    for each in inspect.signature(function, follow_wrapped=False).parameters.values():
        if each.default is not each.empty:
            values[f"{name}({each.name})"] = each.default
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            values[f"{name}({variable})"] = cell.cell_contents
    return values


def _text(value: Any) -> str:
    """Return a text that is equal for equal plain values, and for others of the same name or type."""
    if isinstance(value, list | tuple | set | frozenset):
        first, last = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        texts = sorted(map(_text, value)) if first == "{" else map(_text, value)
        return f"{first}{', '.join(texts)}{last}"
    if value is MISSING or isinstance(value, PLAIN):
        return "nothing" if value is MISSING else repr(value)
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else with_article(type(value).__name__)
