"""Named points in the writing of files, where a test injects a failure through a hook; otherwise they do nothing."""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[str], object] | None = None


def failpoint(name: str) -> None:
    """Pass a point; without a hook this is one comparison."""
    if _hook is not None:
        _hook(name)


def install(hook: Callable[[str], object] | None) -> None:
    """Call `hook` with the name of every point this process passes; None removes the hook.

    >>> install(print)
    >>> failpoint("result.json:written")
    result.json:written
    >>> install(None)
    """
    global _hook
    _hook = hook
