"""Positions of tensor elements: storages, slots, and the patterns of operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from atn_norms.backends.traced.program import Operand

MOST_PIECES = 256  # largest number of parts of one operation


@dataclass(frozen=True)
class Place:
    """Position of a storage: its element i is element `table[i]` of a slot."""

    slot: int
    table: Tensor


def storage_of(tensor: Tensor) -> int:
    """Return a key that is equal for all views of one storage."""
    return tensor.untyped_storage().data_ptr()


def storage_places(tensor: Tensor) -> Tensor:
    """Return the index in the storage of each element of a tensor, in logical order."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    places = torch.arange(size)
    return places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)


def is_dense(tensor: Tensor) -> bool:
    """Return True if no two elements of a tensor share memory."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() >= tensor.numel() and (
        tensor.numel() == len(set(storage_places(tensor).tolist()))
    )


def runs_of(values: Tensor) -> list[tuple[int, int]]:
    """Return start and end of every stretch of equal values."""
    cuts = [0, *(torch.nonzero(values.diff()).flatten() + 1).tolist(), len(values)]
    return list(pairwise(cuts))


def pattern_of(slot: int, table: Tensor) -> Operand | None:
    """Return the operand whose elements are these indices of a slot, or None if they have no pattern."""
    count, offset = len(table), int(table.min())
    places = table - offset
    changes = torch.nonzero(places != places[0]).flatten()
    if len(changes) == 0:
        return Operand(slot, offset, 1, 1)
    repeat = int(changes[0])
    first = places[::repeat]
    again = torch.nonzero(first == first[0]).flatten()
    length = int(again[1]) if len(again) > 1 else len(first)
    fitted = (torch.arange(count) // repeat) % length
    return Operand(slot, offset, repeat, length) if torch.equal(fitted, places) else None


@dataclass(frozen=True)
class Expression:
    """A value of a shape: element i in logical order is element `table[i]` of a slot."""

    slot: int
    table: Tensor
    shape: tuple[int, ...]


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the common shape of shapes that fit; `torch.broadcast_shapes` imports half a second of other modules."""
    rank = max(map(len, shapes))
    aligned = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*aligned, strict=True))


def expanded(value: Expression, shape: Sequence[int]) -> Tensor:
    """Return the indices of a value's elements, broadcast to a shape."""
    return value.table.reshape(value.shape).expand(tuple(shape)).reshape(-1)
