"""One wrong plugin, and the law that must catch it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import atn_norms as an
from atn_norms.backends.reference import Reference
from atn_norms.cells import Cell
from atn_norms.cells.base import refuse
from atn_norms.tasks import Task, TaskSpec


@dataclass(frozen=True)
class Wrong:
    """A `mistake` as a sentence, the `law` that must catch the result of `make`, and the context `around` it."""

    name: str
    mistake: str
    law: str
    family: str
    make: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


GALLERY: dict[str, Wrong] = {}


def wrong(law: str, **options: Any) -> Callable[[Any], Any]:
    """Add a class to the gallery: a normalizer, window, cell, task or backend, or the spec of one."""

    def enter(kind: type) -> type:
        assert kind.__name__ not in GALLERY, kind
        mistake = " ".join((kind.__doc__ or "").split())
        family, make = made(kind)
        GALLERY[kind.__name__] = Wrong(kind.__name__, mistake, law, family, make, **options)
        return kind

    return enter


def made(kind: Any) -> tuple[Any, Callable[[], Any]]:
    """Return the family of a class, and a function that builds the wrong plugin."""
    if issubclass(kind, an.NormSpec | an.WindowSpec | an.CellSpec | TaskSpec):
        factory: Any = getattr(kind, "wrong", kind)
        return kind.family, factory
    if issubclass(kind, an.Normalizer):
        return "normalizer", lambda: norm_spec(kind)
    if issubclass(kind, an.Window):
        return "window", lambda: window_spec(kind)
    if issubclass(kind, Cell):
        return "cell", lambda: cell_spec(kind)
    if issubclass(kind, Task):
        return "task", lambda: task_spec(kind)
    assert issubclass(kind, Reference), kind
    return "backend", kind


def norm_spec(kind: Any) -> an.NormSpec:
    """Return an unregistered, locally defined spec of a normalizer class."""

    class Spec(an.NormSpec):
        kind: Literal["gallery"] = "gallery"

        def build(self, features: int) -> an.Normalizer:
            return built(features)

    built = kind
    return Spec()


def window_spec(kind: Any) -> an.WindowSpec:
    class Spec(an.WindowSpec):
        kind: Literal["gallery"] = "gallery"

        def build(self) -> an.Window:
            return built()

    built = kind
    return Spec()


def cell_spec(kind: Any) -> an.CellSpec:
    class Spec(an.CellSpec):
        kind: Literal["gallery"] = "gallery"

        def build(self, hidden_size: int, placement: Any) -> Cell:
            refuse(placement, "gallery", **dict.fromkeys(getattr(built, "refused", ()), "it has no such site"))
            return built(hidden_size, placement)

    built = kind
    return Spec()


def task_spec(kind: Any) -> TaskSpec:
    class Spec(TaskSpec):
        kind: Literal["gallery"] = "gallery"

        def build(self, seed: int) -> Task:
            return built(seed)

    built = kind
    return Spec()
