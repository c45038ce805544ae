"""Lower recorded operations to a program: element patterns, common subexpressions, registers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.traced.assembly import STRUCTURAL
from atn_norms.backends.traced.patterns import (
    MOST_PIECES,
    Expression,
    Place,
    broadcast,
    expanded,
    is_dense,
    pattern_of,
    runs_of,
    storage_of,
    storage_places,
)
from atn_norms.backends.traced.program import (
    CONSTANT,
    INPUT,
    REGISTER,
    SMALL_INPUT,
    Instruction,
    Op,
    Operand,
    Program,
    Slot,
)
from atn_norms.backends.traced.recorder import Call, Untraceable
from atn_norms.backends.traced.registers import Draft, allot
from atn_norms.backends.traced.rules import RULES
from atn_norms.backends.traced.simplifier import Simplifier


class Lowering(Simplifier):
    """Build the program of recorded calls, from input tensors to output tensors.

    The number of slots is unlimited, and each is written once (by a concatenation once per part); `finish` allocates
    registers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._code: list[Instruction] = []
        self._places: dict[int, Place] = {}
        self._given: set[int] = set()
        self._alive: list[Tensor] = []
        self._inputs = 0

    # -- inputs and outputs

    def add_input(self, length: int, small: bool = False) -> int:
        """Return the slot of a new input of `length` elements; all inputs are added before other slots."""
        self._slots.append(Slot(SMALL_INPUT if small else INPUT, length))
        self._inputs += 1
        return len(self._slots) - 1

    def bind(self, tensor: Tensor, slot: int, offset: int = 0) -> None:
        """Bind a contiguous tensor to the elements of an input from `offset` on."""
        self._alive.append(tensor)
        self._given.add(storage_of(tensor))
        self._places[storage_of(tensor)] = Place(slot, torch.arange(offset, offset + tensor.numel()))

    def finish(self, outputs: Sequence[tuple[int, Sequence[tuple[int, Tensor | None]]]]) -> Program:
        """Return the program of these outputs: for each, its length, and its tensors with their offsets.

        A tensor of None gives zeros. Elements without a tensor are zeros too.
        """
        slots = []
        for length, parts in outputs:
            tensors = [(at, tensor) for at, tensor in parts if tensor is not None]
            if len(tensors) == 1 and tensors[0][1].numel() == length:
                slots.append(self._whole(tensors[0][1], length))
                continue
            target = self._register(length)
            free = 0
            for at, tensor in sorted(tensors, key=lambda part: part[0]):
                self._fill(target, free, at - free)
                for operand, count, start in self._pieces(self._elements(tensor), None):
                    self._emit(Op.COPY, target, at + start, count, (operand,))
                free = at + tensor.numel()
            self._fill(target, free, length - free)
            slots.append(target)
        return allot(Draft(self._slots, self._code, self._constants, slots))

    def _fill(self, target: int, at: int, count: int) -> None:
        if count > 0:
            self._emit(Op.COPY, target, at, count, (self._scalar(0.0),))

    def _whole(self, tensor: Tensor, length: int) -> int:
        """Return a slot that holds exactly the elements of a tensor in order."""
        place, table = self._elements(tensor)
        if (
            self._slots[place].length == length
            and torch.equal(table, torch.arange(length))
            and self._slots[place].kind == REGISTER
        ):
            return place
        target = self._register(length)
        for operand, count, start in self._pieces((place, table), None):
            self._emit(Op.COPY, target, start, count, (operand,))
        return target

    # -- calls

    def call(self, call: Call) -> None:
        """Lower one recorded operation."""
        self._alive += [*call.tensors, *call.results]
        if call.constant is not None:
            return self._constant(call)
        for tensor in call.tensors:
            if storage_of(tensor) not in self._places:
                if tensor.is_floating_point():
                    raise call.unsupported("reads a tensor that is neither a parameter nor a buffer of the normalizer")
                raise call.unsupported(f"reads a tensor of {tensor.dtype}; a program reads floating-point tensors")
        if any(tensor.numel() == 0 for tensor in (*call.tensors, *call.results)):
            raise call.unsupported("makes or reads an empty tensor")
        is_view = bool(call.results) and all(storage_of(result) in self._places for result in call.results)
        mutable = call.function._schema.is_mutable
        if not is_view and call.name not in STRUCTURAL and call.name not in RULES and not mutable:
            raise call.unsupported()
        for tensor in (*call.tensors, *call.results):
            if tensor.dtype not in _NUMBERS:
                raise call.unsupported(f"works on {tensor.dtype}")
        if mutable:
            return self._in_place(call)
        if is_view:
            return None
        if call.name in STRUCTURAL:
            return STRUCTURAL[call.name](self, call)
        value = self._value(call.name, call, call.args, call.kwargs)
        self._store(call.results[0], value)
        return None

    def _value(self, name: str, call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> Expression:
        rule = RULES.get(name)
        if rule is None:
            raise call.unsupported()
        builder = self.builder(call)
        return builder.wrap(rule(builder, *args, **kwargs))

    def builder(self, call: Call) -> Builder:
        """Return the builder that the rule of a call uses."""
        return Builder(self, call, tuple(call.results[0].shape))

    def _constant(self, call: Call) -> None:
        (result,), value = call.results, call.constant
        assert value is not None
        if value.numel() == 0:
            raise call.unsupported("makes an empty tensor")
        flat = value.detach().to(torch.float64).as_strided((value.numel(),), (1,)).tolist() if is_dense(value) else None
        if flat is None:
            raise call.unsupported("makes a tensor that is not contiguous")
        if len(set(map(str, flat))) == 1:
            slot, table = self.constant((flat[0],)), torch.zeros(len(flat), dtype=torch.int64)
        else:
            slot, table = self.constant(tuple(flat)), torch.arange(len(flat))
        self._places[storage_of(result)] = Place(slot, table)

    def _in_place(self, call: Call) -> None:
        target = call.args[0]
        if not isinstance(target, Tensor) or not call.name.endswith("_"):
            raise call.unsupported("writes to a list of tensors or to `out`")
        if storage_of(target) in self._given:
            raise call.unsupported("changes an input, a parameter or a buffer in place")
        name = call.name.removesuffix("_")
        shaped = replace(call, results=[target])
        if name in ("copy", "fill", "zero"):
            value = self.builder(shaped).wrap(0.0 if name == "zero" else call.args[1])
        else:
            value = self._value(name, shaped, call.args, call.kwargs)
        value = Expression(value.slot, expanded(value, target.shape), tuple(target.shape))
        old, changed = self._places[storage_of(target)], storage_places(target)
        # All views of the storage change: each element of the storage is an old or a new one.
        slot = self._register(len(old.table))
        kept = torch.ones(len(old.table), dtype=torch.bool)
        kept[changed] = False
        source = old.table.clone()
        source[changed] = value.table
        for start, end in runs_of(kept.long()):
            origin = old.slot if kept[start] else value.slot
            for operand, count, at in self._pieces((origin, source[start:end]), call):
                self._emit(Op.COPY, slot, start + at, count, (operand,))
        self._places[storage_of(target)] = Place(slot, torch.arange(len(old.table)))

    # -- values

    def constant(self, values: tuple[float, ...]) -> int:
        """Return the slot of these numbers."""
        key = ("constant", tuple(value.hex() for value in values))
        if key not in self._known:
            self._slots.append(Slot(CONSTANT, len(values)))
            self._constants[len(self._slots) - 1] = values
            self._known[key] = len(self._slots) - 1
        return self._known[key]

    def _scalar(self, value: float) -> Operand:
        return Operand(self.constant((float(value),)), 0, 1, 1)

    def _register(self, length: int) -> int:
        self._slots.append(Slot(REGISTER, length))
        return len(self._slots) - 1

    def _emit(
        self,
        op: Op,
        target: int,
        offset: int,
        count: int,
        operands: tuple[Operand, ...],
        repeat: int = 1,
        length: int = 0,
    ) -> None:
        self._code.append(Instruction(op, target, offset, count, repeat, length or count, operands))

    def _elements(self, tensor: Tensor) -> tuple[int, Tensor]:
        """Return the slot of a tensor, and the index in the slot of each element in logical order."""
        place = self._places[storage_of(tensor)]
        return place.slot, place.table[storage_places(tensor)]

    def _pieces(self, elements: tuple[int, Tensor], call: Call | None) -> list[tuple[Operand, int, int]]:
        """Return the operands of the parts of a list of elements, with the count and the start of each part."""
        slot, table = elements
        whole = pattern_of(slot, table)
        if whole is not None:
            return [(whole, len(table), 0)]
        cuts = [0, *(torch.nonzero(table.diff() != 1).flatten() + 1).tolist(), len(table)]
        if len(cuts) > MOST_PIECES:
            raise (call.unsupported if call else Untraceable)("reads elements in an order that no instruction has")
        parts = []
        for start, end in pairwise(cuts):
            parts.append((Operand(slot, int(table[start]), 1, end - start), end - start, start))
        return parts

    def materialized(self, slot: int, table: Tensor, call: Call) -> tuple[int, Tensor]:
        """Return elements with a pattern; elements without a pattern are copied."""
        if pattern_of(slot, table) is not None:
            return slot, table
        target = self._register(len(table))
        for operand, count, start in self._pieces((slot, table), call):
            self._emit(Op.COPY, target, start, count, (operand,))
        return target, torch.arange(len(table))

    def compute(self, op: Op, operands: Sequence[tuple[int, Tensor]], call: Call) -> tuple[int, Tensor]:
        """Return the elements of an elementwise operation; repeated elements are computed once."""
        count = len(operands[0][1])
        patterned = [self.materialized(slot, table, call) for slot, table in operands]
        patterns = [pattern_of(slot, table) for slot, table in patterned]
        repeat = count
        for pattern in patterns:
            assert pattern is not None
            if pattern.length > 1:
                repeat = math.gcd(repeat, pattern.repeat)
        if repeat > 1 and count % repeat == 0:
            patterns = [pattern_of(slot, table[::repeat]) for slot, table in patterned]
            if None in patterns:
                repeat, patterns = 1, [pattern_of(slot, table) for slot, table in patterned]
        else:
            repeat = 1
        size = count // repeat
        inputs = tuple(pattern for pattern in patterns if pattern is not None)
        slot, table = self._elementwise(op, inputs, size)
        return slot, table[torch.arange(count) // repeat]

    def _elementwise(self, op: Op, operands: tuple[Operand, ...], size: int) -> tuple[int, Tensor]:
        """Return the elements of an operation, after simplification; equal operations are computed once."""
        op, operands, negative = self._simplified(op, operands)
        if negative:
            slot, table = self._elementwise(op, operands, size)
            pattern = pattern_of(slot, table)
            assert pattern is not None
            op, operands = Op.NEG, (pattern,)
        folded = self._folded(op, operands, size)
        if folded is not None:
            return folded
        key = (op, size, operands)
        if key not in self._known:
            target = self._register(size)
            self._emit(op, target, 0, size, operands)
            self._known[key] = target
            self._made[target] = op, operands
        return self._known[key], torch.arange(size)

    def total(self, slot: int, table: Tensor, repeat: int, length: int, call: Call) -> tuple[int, Tensor]:
        """Return sums: element i is added to sum `(i // repeat) % length`."""
        count = len(table)
        if count == length:
            return slot, table
        slot, table = self.materialized(slot, table, call)
        operand = pattern_of(slot, table)
        assert operand is not None
        outer = self._outer_factor(operand, count)
        if outer is not None:
            op, inner, factor = outer
            total = self.total(inner.slot, inner.offset + torch.arange(count), repeat, length, call)
            pattern = pattern_of(*total)
            assert pattern is not None
            return self._elementwise(op, (pattern, factor) if factor is not None else (pattern,), length)
        key = (Op.SUM, count, repeat, length, operand)
        if key not in self._known:
            target = self._register(length)
            self._emit(Op.SUM, target, 0, count, (operand,), repeat, length)
            self._known[key] = target
        return self._known[key], torch.arange(length)

    def _store(self, result: Tensor, value: Expression) -> None:
        """Bind a dense tensor to the elements of a value in logical order."""
        slot, table = value.slot, value.table
        index = storage_places(result)
        if len(index) and int(index.max()) >= len(index):
            raise Untraceable(f"a result of shape {list(result.shape)} is not contiguous")
        by_storage = torch.empty_like(table)
        by_storage[index] = table
        self._places[storage_of(result)] = Place(slot, by_storage)


_NUMBERS = (torch.float64, torch.float32, torch.bool)


class Builder:
    """Expressions for the rules of operations; shapes broadcast as in torch."""

    def __init__(self, lowering: Lowering, call: Call, shape: tuple[int, ...]) -> None:
        self._lowering, self.call, self.shape = lowering, call, shape

    def wrap(self, value: Any) -> Expression:
        """Return the expression of a tensor, a number or an expression."""
        if isinstance(value, Expression):
            return value
        if isinstance(value, Tensor):
            slot, table = self._lowering._elements(value)
            return Expression(slot, table, tuple(value.shape))
        if isinstance(value, (bool, int, float)):
            return Expression(self._lowering.constant((float(value),)), torch.zeros(1, dtype=torch.int64), ())
        raise self.call.unsupported(f"has an argument {value!r} that no instruction has")

    def __call__(self, op: Op, *values: Any) -> Expression:
        """Return the elementwise operation of values, broadcast against each other."""
        wrapped = [self.wrap(value) for value in values]
        shape = broadcast([value.shape for value in wrapped])
        operands = [(value.slot, expanded(value, shape)) for value in wrapped]
        slot, table = self._lowering.compute(op, operands, self.call)
        return Expression(slot, table, tuple(shape))

    def sum(self, value: Any, dims: Any = None, keepdim: bool = False) -> Expression:
        """Return sums over axes."""
        value = self.wrap(value)
        rank = len(value.shape)
        axes = (
            sorted({axis % rank for axis in (range(rank) if not dims else [dims] if isinstance(dims, int) else dims)})
            if rank
            else []
        )
        kept = [axis for axis in range(rank) if axis not in axes]
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
        large = [axis for axis in axes if value.shape[axis] > 1]
        order = range(rank)
        if large and large != list(range(large[0], large[-1] + 1)):
            raise self.call.unsupported("sums over axes that are not neighbours")
        length = math.prod(value.shape[axis] for axis in order if axis not in large)
        table, repeat = value.table, 1
        if large:
            after = math.prod(value.shape[large[-1] + 1 :])
            before = math.prod(value.shape[: large[0]])
            if after > 1 and before > 1:
                # Move the summed axes to the front, so that the index of the sum is periodic.
                table = table.reshape(before, -1, after).transpose(0, 1).reshape(-1)
                repeat = 1
            else:
                repeat = math.prod(value.shape[axis] for axis in large) if after == 1 else 1
        slot, result = self._lowering.total(value.slot, table, repeat, length, self.call)
        final = shape if keepdim else tuple(value.shape[axis] for axis in kept)
        return Expression(slot, result, final)

    def mean(self, value: Any, dims: Any = None, keepdim: bool = False) -> Expression:
        """Return means over axes."""
        value = self.wrap(value)
        total = self.sum(value, dims, keepdim)
        return self(Op.DIV, total, float(math.prod(value.shape) / max(math.prod(total.shape), 1)))
