"""Replace operations by cheaper ones of equal result: constants, signs, factors of a whole row, and reciprocals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.traced.patterns import pattern_of
from atn_norms.backends.traced.program import REGISTER, TORCH, Op, Operand, Slot

# The operation on negated operands that replaces a comparison or a limit.
_MIRRORED = {Op.MAX: Op.MIN, Op.MIN: Op.MAX, Op.GT: Op.LT, Op.GE: Op.LE, Op.LT: Op.GT, Op.LE: Op.GE}


class Simplifier(ABC):
    """Properties of the slots of a lowering, and the simplifications that they allow.

    | attribute | meaning |
    |---|---|
    | `_slots` | every slot, by its number |
    | `_constants` | the numbers of slots of constants |
    | `_made` | register that one elementwise operation wrote -> the operation and its operands |
    | `_known` | operation, size and operands, or constant -> the slot of the result |
    """

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._constants: dict[int, tuple[float, ...]] = {}
        self._made: dict[int, tuple[Op, tuple[Operand, ...]]] = {}
        self._known: dict[Any, int] = {}

    @abstractmethod
    def constant(self, values: tuple[float, ...]) -> int:
        """Return the slot of these numbers."""

    @abstractmethod
    def _elementwise(self, op: Op, operands: tuple[Operand, ...], size: int) -> tuple[int, Tensor]:
        """Return the elements of an operation, after simplification; equal operations are computed once."""

    def _simplified(self, op: Op, operands: tuple[Operand, ...]) -> tuple[Op, tuple[Operand, ...], bool]:
        """Return a cheaper operation of equal result, and True if the result must be negated.

        A division by one number for a row or for a part of it becomes a product with the reciprocal. Signs move
        outwards. A choice between multiples of one operand, or a sum of multiples that exclude each other, becomes a
        multiple of a choice. A power with an exponent less by 1 than that of a known power becomes a quotient.
        """
        if op == Op.DIV and operands[0].length > 1 and (operands[1].length == 1 or operands[1].repeat > 1):
            divisor = operands[1]
            slot, table = self._elementwise(Op.RECIPROCAL, (replace(divisor, repeat=1),), divisor.length)
            offset = int(table[0])
            return self._simplified(Op.MUL, (operands[0], replace(divisor, slot=slot, offset=offset)))
        inner = [self._negated(operand) for operand in operands]
        if op in (Op.MUL, Op.DIV) and any(inner):
            bare = tuple(a if a is not None else b for a, b in zip(inner, operands, strict=True))
            return op, bare, inner.count(None) == 1
        if op in _MIRRORED and inner[0] is not None and len(self._constants.get(operands[1].slot, ())) == 1:
            limit = self._constants[operands[1].slot][0]
            mirrored = replace(operands[1], slot=self.constant((0.0 - limit,)), offset=0)
            return _MIRRORED[op], (inner[0], mirrored), op in (Op.MAX, Op.MIN)
        if op == Op.NEG and (chosen := self._definition(operands[0], Op.WHERE)):
            values = [self._elementwise(Op.NEG, (value,), 1)[0] for value in chosen[1:] if value.length == 1]
            if len(values) == 2:
                return Op.WHERE, (chosen[0], *(Operand(slot, 0, 1, 1) for slot in values)), False
        if op in (Op.ADD, Op.SUB) and inner[1] is not None:
            return Op.SUB if op == Op.ADD else Op.ADD, (operands[0], inner[1]), False
        if op == Op.ADD and (multiple := self._split_multiple(*operands)):
            return Op.MUL, multiple, False
        if op == Op.POW and (greater := self._greater_power(*operands)):
            return Op.DIV, (greater, operands[0]), False
        if op == Op.WHERE:
            return self._chosen(operands)
        return op, operands, False

    def _greater_power(self, base: Operand, exponent: Operand) -> Operand | None:
        """Return the power of a positive base whose exponent is greater by 1, if it is known."""
        difference = self._definition(exponent, Op.SUB)
        if not difference or self._constants.get(difference[1].slot) != (1.0,) or not self._is_positive(base):
            return None
        size = base.length
        slot = self._known.get((Op.POW, size, (base, difference[0])))
        return None if slot is None or (base.repeat, exponent.length) != (1, 1) else Operand(slot, 0, 1, size)

    def _split_multiple(self, first: Operand, second: Operand) -> tuple[Operand, Operand] | None:
        """Return vector and factors for the sum of two multiples of one vector, each 0 where the other one is not."""
        term, other_term = self._split_term(first), self._split_term(second)
        if term is None or other_term is None:
            return None
        (mask, vector, kept, one), (other_mask, other_vector, other_kept, other) = term, other_term
        if (mask, vector) != (other_mask, other_vector) or kept == other_kept:
            return None
        yes, no = (one, other) if kept else (other, one)
        pattern = pattern_of(*self._elementwise(Op.WHERE, (mask, yes, no), vector.length))
        return None if pattern is None else (vector, pattern)

    def _split_term(self, term: Operand) -> tuple[Operand, Operand, bool, Operand] | None:
        """Return mask, vector, True if the vector is kept where the mask is true, and factor of a masked multiple."""
        product = self._definition(term, Op.MUL) or ()
        for masked, factor in (product, product[::-1]) if product else ():
            chosen = self._definition(masked, Op.WHERE)
            if not chosen or factor.length != 1:
                continue
            mask, *values = chosen
            for kept, (vector, zero) in ((True, values), (False, values[::-1])):
                if self._constants.get(zero.slot) == (0.0,) and (vector.repeat, vector.length) == (1, term.length):
                    return mask, vector, kept, factor
        return None

    def _chosen(self, operands: tuple[Operand, ...]) -> tuple[Op, tuple[Operand, ...], bool]:
        mask, *values = operands
        factors = [self._definition(value, Op.MUL) for value in values]
        if factors[0] and factors[1] and factors[0][0] == factors[1][0] and factors[0][0].length > 1:
            size = factors[0][0].length
            slot, table = self._elementwise(Op.WHERE, (mask, factors[0][1], factors[1][1]), size)
            pattern = pattern_of(slot, table)
            if pattern is not None and factors[0][1].length == factors[1][1].length == 1:
                return Op.MUL, (factors[0][0], pattern), False
        return Op.WHERE, operands, False

    def _definition(self, operand: Operand, op: Op) -> tuple[Operand, ...] | None:
        """Return the operands of the operation that computed an operand, if the operand is the whole result."""
        whole = Operand(operand.slot, 0, 1, self._slots[operand.slot].length)
        made, parts = self._made.get(operand.slot, (None, ()))
        return parts if made == op and operand == whole else None

    def _is_positive(self, operand: Operand) -> bool:
        """Return True for a positive number plus a magnitude, a square or an exponential."""
        for terms in (self._definition(operand, Op.ADD) or (),):
            for term, other in (terms, terms[::-1]) if terms else ():
                number = self._constants.get(other.slot)
                factors = self._definition(term, Op.MUL)
                magnitude = self._definition(term, Op.ABS) or self._definition(term, Op.EXP)
                magnitude = magnitude or (factors and factors[0] == factors[1])
                if number is not None and min(number) > 0.0 and magnitude:
                    return True
        return False

    def _negated(self, operand: Operand) -> Operand | None:
        parts = self._definition(operand, Op.NEG)
        return parts[0] if parts else None

    def _folded(self, op: Op, operands: tuple[Operand, ...], size: int) -> tuple[int, Tensor] | None:
        """Return the elements of an operation without effect, or of constants alone."""
        values = [self._constants.get(operand.slot) if operand.length == 1 else None for operand in operands]
        scalars = [
            None if value is None else value[operand.offset] for value, operand in zip(values, operands, strict=True)
        ]
        if None not in scalars and op not in (Op.COPY,):
            result = TORCH[op](*(torch.tensor(scalar, dtype=torch.float64) for scalar in scalars))
            return self.constant((float(result),)), torch.zeros(size, dtype=torch.int64)
        one = [scalar == 1.0 for scalar in scalars]
        kept = None
        if op in (Op.EQ, Op.AND) and 0.0 in scalars:
            other = operands[1 if scalars[0] == 0.0 else 0]
            if op == Op.AND or self._is_positive(other):
                return self.constant((0.0,)), torch.zeros(size, dtype=torch.int64)
        if op == Op.WHERE and scalars[0] is not None:
            kept = operands[1 if scalars[0] != 0.0 else 2]
        if op == Op.COPY or (op in (Op.MUL, Op.DIV, Op.POW) and one[1]):
            kept = operands[0]
        elif op == Op.MUL and one[0]:
            kept = operands[1]
        return None if kept is None else (kept.slot, kept.offset + (torch.arange(size) // kept.repeat) % kept.length)

    def _outer_factor(self, operand: Operand, count: int) -> tuple[Op, Operand, Operand | None] | None:
        """Return operation, vector and factor for a sum of negatives, or of multiples by one number for a row.

        The factor stays inside for a multiple of an input, whose products may be far from 1.
        """
        negated = self._negated(operand)
        if negated is not None and negated.length == count and negated.repeat == 1:
            return Op.NEG, negated, None
        product = self._definition(operand, Op.MUL)
        for vector, factor in (product, product[::-1]) if product else ():
            if vector.length != count or vector.repeat != 1:
                continue
            if factor.length == 1:
                return Op.MUL, vector, factor
            multiple = self._definition(factor, Op.MUL)
            for inner, single in (multiple, multiple[::-1]) if multiple else ():
                if inner.length == count and single.length == 1 and self._slots[inner.slot].kind == REGISTER:
                    slot, table = self._elementwise(Op.MUL, (vector, inner), count)
                    pattern = pattern_of(slot, table)
                    return None if pattern is None else (Op.MUL, pattern, single)
        return None
