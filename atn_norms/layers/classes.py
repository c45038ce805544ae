"""The class of a layer for each kind of cell, registered where it is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from atn_norms.layers.recurrent import Recurrent

LayerClass = TypeVar("LayerClass", bound="type[Recurrent]")
_CLASSES: dict[str, type[Recurrent]] = {}
ANY = ""  # key of the class for cells that torch does not have


def layer_class(kind: str = ANY) -> Callable[[LayerClass], LayerClass]:
    """Register a class as the layer of a kind of cell, or of all kinds that have no class."""

    def register(cls: LayerClass) -> LayerClass:
        _CLASSES[kind] = cls
        return cls

    return register


def class_of(kind: str) -> type[Recurrent]:
    """Return the layer class for a cell kind."""
    return _CLASSES.get(kind, _CLASSES[ANY])
