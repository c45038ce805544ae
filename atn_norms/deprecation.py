"""Old public names that still work, with a `DeprecationWarning`, for one minor version."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

STACK = 3  # frames from `warnings.warn` up to the caller's own line


def warn_renamed(old: str, new: str, stacklevel: int = STACK) -> None:
    """Warn that a name is deprecated, and name its replacement."""
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed_module(old: str, new: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Build the `__getattr__` of a renamed module: every name comes from the new one, `names` under their new names.

    >>> renamed_module("atn_norms.trees", "atn_norms.pytree", {"rows": "expand_mask"})("rows").__name__
    'expand_mask'
    """

    def look_up(name: str) -> Any:
        current = names.get(name, name)
        try:
            value = getattr(import_module(new), current)
        except AttributeError:
            raise AttributeError(f"module {old!r} has no attribute {name!r}") from None
        if not name.startswith("__"):
            warn_renamed(f"{old}.{name}", f"{new}.{current}")
        return value

    return look_up


WALKERS = ("inspect", "pydoc", "torch")  # modules that read every attribute of an object


class RenamedAttribute:
    """A class attribute under its old name: reading it warns and returns the value of the new name.

    Code that reads every attribute there is, such as `inspect.getmembers` and `torch.jit`, causes no warning.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if reader.partition(".")[0] not in WALKERS:
            warn_renamed(f"{owner.__name__}.{self.old}", self.new)
        return getattr(owner if instance is None else instance, self.new)


def adopt_renamed(cls: type) -> None:
    """Move the attributes that a subclass defines under old names to their new names, with a warning for each."""
    for base in cls.__mro__[1:]:
        for old, alias in vars(base).items():
            if isinstance(alias, RenamedAttribute) and old in vars(cls):
                warn_renamed(
                    f"{cls.__name__}.{old}", alias.new, stacklevel=STACK + 2
                )  # through `__init_subclass__` and ABCMeta
                setattr(cls, alias.new, vars(cls)[old])
                delattr(cls, old)
