"""Public names of a package that are imported on first access."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def deferred_names(package: str, home: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """Return the names that modules of a package define, and the package's `__getattr__`; `home` lists names by module.

    >>> names, look_up = deferred_names("atn_norms", {"pytree": ["detach"]})
    >>> names, look_up("detach").__name__
    (['detach'], 'detach')
    """
    module_of = {name: module for module, names in home.items() for name in names}

    def look_up(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        vars(sys.modules[package])[name] = value
        return value

    return sorted(module_of), look_up
