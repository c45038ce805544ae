"""Named points in the code that writes files, where a hook of a test injects failures."""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[str], object] | None = None


def failpoint(name: str) -> None:
    """Call the hook with the name of a point; without a hook this is one comparison."""
    if _hook is not None:
        _hook(name)


def install(hook: Callable[[str], object] | None) -> None:
    """Install a hook, which is called with the name of every point; None removes the hook.

    >>> install(print)
    >>> failpoint("result.json:written")
    result.json:written
    >>> install(None)
    """
    global _hook
    _hook = hook
