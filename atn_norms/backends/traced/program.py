"""A short list of instructions over rows, which is checked when it is built and interpreted by the kernels."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

TILE_DOUBLES = 4096  # numbers of the longest register in one tile
TILE_ROWS = 16  # largest number of rows of a tile
MOST_DOUBLES = 1 << 22  # numbers in all registers of a row
MOST_SLOTS = 512  # the same as in program.h


class Op(IntEnum):
    """Operations of the interpreter, with their numbers in program.h."""

    COPY = 0
    NEG = 1
    ABS = 2
    SIGN = 3
    RECIPROCAL = 4
    SQRT = 5
    RSQRT = 6
    EXP = 7
    LOG = 8
    TANH = 9
    SIGMOID = 10
    ROUND = 11
    NOT = 12
    LOG1P = 13
    EXPM1 = 14
    ERF = 15
    SIN = 16
    COS = 17
    ADD = 18
    SUB = 19
    MUL = 20
    DIV = 21
    POW = 22
    MAX = 23
    MIN = 24
    GT = 25
    GE = 26
    LT = 27
    LE = 28
    EQ = 29
    NE = 30
    AND = 31
    OR = 32
    WHERE = 33
    SUM = 34
    DOT = 35
    MUL_ADD = 36  # a b + c
    MUL_SUB = 37  # a b - c
    SUB_MUL = 38  # c - a b
    MUL_MUL = 39  # a b c
    POW_LOG = 40  # a to the power c; b is log a


UNARY = frozenset(op for op in Op if op <= Op.COS)
BINARY = frozenset(op for op in Op if Op.ADD <= op <= Op.OR)
TERNARY = frozenset((Op.WHERE, Op.MUL_ADD, Op.MUL_SUB, Op.SUB_MUL, Op.MUL_MUL, Op.POW_LOG))
ARITY = {**dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY, 2), **dict.fromkeys(TERNARY, 3), Op.SUM: 1, Op.DOT: 2}
REGISTER, CONSTANT, INPUT, SMALL, SMALL_INPUT = range(5)
REGISTERS, INPUTS, ROWS = (REGISTER, SMALL), (INPUT, SMALL_INPUT), (REGISTER, INPUT)
REDUCTIONS = (Op.SUM, Op.DOT)


@dataclass(frozen=True)
class Slot:
    """Numbers that an instruction uses: a register or an input of each row, or constants for all rows.

    Registers and inputs hold numbers of rows, or, if they are small, of statistics. In a narrow program numbers of rows
    are float32, and numbers of statistics float64.
    """

    kind: int
    length: int


@dataclass(frozen=True)
class Operand:
    """Element i of an operand is element `offset + (i // repeat) % length` of a slot."""

    slot: int
    offset: int
    repeat: int
    length: int


@dataclass(frozen=True)
class Instruction:
    """One operation on `count` elements of every row.

    Element i of the result is stored in element `offset + (i // repeat) % length` of the register `target`; `SUM` adds
    it to that element.
    """

    op: Op
    target: int
    offset: int
    count: int
    repeat: int
    length: int
    operands: tuple[Operand, ...]


class ProgramError(ValueError):
    """An invalid program, which the kernels cannot run."""


@dataclass(frozen=True)
class Program:
    """Instructions over one row: from inputs, through registers, to outputs.

    | field | meaning |
    |---|---|
    | `slots` | the inputs first, then registers and constants in any order |
    | `instructions` | in the order in which they run |
    | `outputs` | slots that hold the results |
    | `constants` | numbers of all constant slots, one slot after the other |
    | `narrow` | True: in layers of float32, numbers of rows are float32; False: all numbers are float64 |

    Errors: `ProgramError` for an access outside a slot, or a read before the first write.
    """

    slots: tuple[Slot, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    constants: tuple[float, ...]
    narrow: bool = False

    def __post_init__(self) -> None:
        self._check_slots()
        # Plain bytes, since a compiler decodes programs while tensors have no elements.
        written = [bytearray([slot.kind not in REGISTERS]) * slot.length for slot in self.slots]
        for place, instruction in enumerate(self.instructions):
            self._check_instruction(f"instruction {place}", instruction, written)
        if self.narrow and not self.narrowable:
            raise ProgramError("narrow: got a program that mixes numbers of rows and of statistics; expected none")
        for output in self.outputs:
            if not (_is_size(output) and output < len(self.slots)):
                raise ProgramError(f"outputs: got slot {output!r}; expected 0 to {len(self.slots) - 1}")
            if not all(written[output]):
                raise ProgramError(f"outputs: got slot {output}, which is not written; expected a complete register")

    def _check_slots(self) -> None:
        if len(self.slots) > MOST_SLOTS:
            raise ProgramError(f"slots: got {len(self.slots)}; expected at most {MOST_SLOTS}")
        for place, slot in enumerate(self.slots):
            if slot.kind not in range(5) or not _is_size(slot.length):
                raise ProgramError(f"slot {place}: got {slot}; expected a kind from 0 to 4 and a length of at least 0")
            if slot.length == 0 and slot.kind not in INPUTS:
                raise ProgramError(f"slot {place}: got length 0; expected at least 1")
        given = [slot.kind in INPUTS for slot in self.slots]
        if any(given[sum(given) :]):
            raise ProgramError("slots: got an input after another slot; expected all inputs first")
        if self.row_doubles > MOST_DOUBLES:
            raise ProgramError(f"slots: got {self.row_doubles} numbers a row; expected at most {MOST_DOUBLES}")
        wanted = sum(slot.length for slot in self.slots if slot.kind == CONSTANT)
        if len(self.constants) != wanted or not all(isinstance(value, float) for value in self.constants):
            raise ProgramError(f"constants: got {len(self.constants)} values; expected {wanted} floats")

    def _check_instruction(self, name: str, instruction: Instruction, written: list[bytearray]) -> None:
        op, target, count = instruction.op, instruction.target, instruction.count
        if not isinstance(op, Op):
            raise ProgramError(f"{name}: got operation {op!r}; expected an Op")
        if len(instruction.operands) != ARITY[op]:
            raise ProgramError(f"{name}: got {len(instruction.operands)} operands; expected {ARITY[op]} for {op.name}")
        if not (_is_size(target) and target < len(self.slots)) or self.slots[target].kind not in REGISTERS:
            raise ProgramError(f"{name}: got target {target!r}; expected a register")
        if not _is_size(count) or count < 1:
            raise ProgramError(f"{name}: got count {count!r}; expected at least 1")
        result = Operand(target, instruction.offset, instruction.repeat, instruction.length)
        self._check_operand(f"{name}, target", result)
        if op not in REDUCTIONS and (instruction.repeat, instruction.length) != (1, count):
            raise ProgramError(f"{name}: got a result of {instruction.length} elements; expected {count}")
        if op in REDUCTIONS and count != instruction.repeat * instruction.length * (
            count // (instruction.repeat * instruction.length)
        ):
            raise ProgramError(f"{name}: got {count} elements; expected a multiple of repeat times length")
        for operand in instruction.operands:
            self._check_operand(name, operand)
            if operand.slot == target:
                raise ProgramError(f"{name}: got slot {target} as operand and as target; expected two registers")
            if not all(written[operand.slot][operand.offset : operand.offset + operand.length]):
                raise ProgramError(f"{name}: got slot {operand.slot} as operand; expected one that was written before")
        if op in REDUCTIONS and self.slots[target].kind != SMALL:
            raise ProgramError(f"{name}: got a sum into a register of rows; expected a small one")
        if op in REDUCTIONS and any(written[target]) and not instruction.length == self.slots[target].length:
            raise ProgramError(f"{name}: got a sum into a part of a register; expected a whole one")
        written[target][instruction.offset : instruction.offset + instruction.length] = b"\1" * instruction.length

    def _check_operand(self, name: str, operand: Operand) -> None:
        numbers = operand.slot, operand.offset, operand.repeat, operand.length
        if not all(map(_is_size, numbers)) or operand.repeat < 1 or operand.length < 1:
            raise ProgramError(f"{name}: got {operand}; expected sizes of at least 0, repeat and length of at least 1")
        if operand.slot >= len(self.slots):
            raise ProgramError(f"{name}: got slot {operand.slot}; expected 0 to {len(self.slots) - 1}")
        if operand.offset + operand.length > self.slots[operand.slot].length:
            raise ProgramError(
                f"{name}: got {operand}; expected to stay within {self.slots[operand.slot].length} elements"
            )

    @property
    def inputs(self) -> tuple[int, ...]:
        """Number of elements of every input."""
        return tuple(slot.length for slot in self.slots if slot.kind in INPUTS)

    @property
    def results(self) -> tuple[int, ...]:
        """Number of elements of every output."""
        return tuple(self.slots[output].length for output in self.outputs)

    @property
    def narrowable(self) -> bool:
        """Return True if statistics enter operations on rows only as one number for a row, or for a part of a row."""
        return all(map(self._meets_singly, self.instructions))

    def _meets_singly(self, instruction: Instruction) -> bool:
        of_rows = self.slots[instruction.target].kind in ROWS
        for operand in instruction.operands:
            slot, vector = self.slots[operand.slot], operand.repeat == 1 and operand.length > 1
            if instruction.op in REDUCTIONS:
                continue
            if vector and (slot.kind in ROWS) != of_rows:
                return False
            shared = slot.kind == INPUT and operand.slot == self.parameters
            if not vector and slot.kind in ROWS and not shared:
                return False
        return True

    @property
    def parameters(self) -> int:
        """The slot of the parameters: the last input of rows except the first, or None."""
        places = [place for place, slot in enumerate(self.slots) if slot.kind == INPUT]
        return places[1] if len(places) > 1 else -1

    @property
    def row_doubles(self) -> int:
        """Number of elements in all registers of one row."""
        return sum(slot.length for slot in self.slots if slot.kind in REGISTERS)

    @property
    def tile_rows(self) -> int:
        """Number of rows of a tile."""
        longest = max((slot.length for slot in self.slots), default=1)
        return max(1, min(TILE_ROWS, TILE_DOUBLES // max(longest, 1)))

    def encode(self) -> str:
        """Return a text without blanks, from which `decode` builds an equal program."""
        return self._text

    @cached_property
    def _text(self) -> str:
        slots = [[slot.kind, slot.length] for slot in self.slots]
        code = [
            [
                i.op,
                i.target,
                i.offset,
                i.count,
                i.repeat,
                i.length,
                *[[o.slot, o.offset, o.repeat, o.length] for o in i.operands],
            ]
            for i in self.instructions
        ]
        constants = [value.hex() for value in self.constants]
        return json.dumps([slots, code, list(self.outputs), constants, int(self.narrow)], separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Program:
        """Return the program of a text; `ProgramError` for an invalid text."""
        try:
            slots, code, outputs, constants, narrow = json.loads(text)
            return Program(
                tuple(Slot(*slot) for slot in slots),
                tuple(map(_instruction, code)),
                tuple(outputs),
                tuple(float.fromhex(value) for value in constants),
                bool(narrow),
            )
        except (TypeError, ValueError, KeyError) as error:
            if isinstance(error, ProgramError):
                raise
            raise ProgramError(f"program: got {text[:60]!r}; expected what Program.encode returns ({error})") from None

    @cached_property
    def words(self) -> bytes:
        """The program in the form of `Program` in program.h."""
        at, constant, slots = 0, 0, []
        for place, slot in enumerate(self.slots):
            start = place if slot.kind in INPUTS else constant if slot.kind == CONSTANT else at
            slots += [slot.kind, start, slot.length]
            at += slot.length if slot.kind in REGISTERS else 0
            constant += slot.length if slot.kind == CONSTANT else 0
        code = b"".join(map(_packed, self.instructions))
        sizes = len(self.instructions), len(self.slots), len(self.outputs), len(self.constants)
        body = struct.pack(f"={len(slots) + len(self.outputs)}q", *slots, *self.outputs)
        body += struct.pack(f"={len(self.constants)}d", *self.constants)
        total = 9 + (len(code) + len(body)) // 8
        head = total, *sizes, self.row_doubles, self.tile_rows, len(self.inputs), int(self.narrow)
        return struct.pack("=9q", *head) + code + body

    def evaluate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the program in PyTorch, differentiably: inputs `[R, length]` each, outputs `[R, length]` each."""
        return evaluate(self, inputs)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _instruction(fields: list[Any]) -> Instruction:
    op, target, offset, count, repeat, length, *operands = fields
    return Instruction(Op(op), target, offset, count, repeat, length, tuple(Operand(*operand) for operand in operands))


def _packed(instruction: Instruction) -> bytes:
    operands = [*instruction.operands, *[Operand(0, 0, 1, 1)] * (3 - len(instruction.operands))]
    numbers = [number for o in operands for number in (o.slot, o.offset, o.repeat, o.length)]
    head = (
        instruction.op,
        instruction.target,
        instruction.offset,
        instruction.count,
        instruction.repeat,
        instruction.length,
    )
    return struct.pack("=18i", *head, *numbers)


def _truth(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors).to(tensors[0].dtype)


TORCH: dict[Op, Callable[..., Tensor]] = {
    Op.COPY: torch.Tensor.clone,
    Op.NEG: torch.neg,
    Op.ABS: torch.abs,
    Op.SIGN: torch.sgn,
    Op.RECIPROCAL: torch.reciprocal,
    Op.SQRT: torch.sqrt,
    Op.RSQRT: torch.rsqrt,
    Op.EXP: torch.exp,
    Op.LOG: torch.log,
    Op.TANH: torch.tanh,
    Op.SIGMOID: torch.sigmoid,
    Op.ROUND: lambda x: x.to(torch.float32).to(x.dtype),
    Op.NOT: _truth(torch.logical_not),
    Op.LOG1P: torch.log1p,
    Op.EXPM1: torch.expm1,
    Op.ERF: torch.erf,
    Op.SIN: torch.sin,
    Op.COS: torch.cos,
    Op.ADD: torch.add,
    Op.SUB: torch.sub,
    Op.MUL: torch.mul,
    Op.DIV: torch.div,
    Op.POW: torch.pow,
    Op.MAX: torch.maximum,
    Op.MIN: torch.minimum,
    Op.GT: _truth(torch.gt),
    Op.GE: _truth(torch.ge),
    Op.LT: _truth(torch.lt),
    Op.LE: _truth(torch.le),
    Op.EQ: _truth(torch.eq),
    Op.NE: _truth(torch.ne),
    Op.AND: _truth(torch.logical_and),
    Op.OR: _truth(torch.logical_or),
    Op.WHERE: lambda mask, a, b: torch.where(mask != 0, a, b),
    Op.MUL_ADD: lambda a, b, c: a * b + c,
    Op.MUL_SUB: lambda a, b, c: a * b - c,
    Op.SUB_MUL: lambda a, b, c: c - a * b,
    Op.MUL_MUL: lambda a, b, c: a * b * c,
    Op.POW_LOG: lambda a, b, c: torch.pow(a, c),
}


def evaluate(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a program in PyTorch, slower than the interpreter, for double backward and for tests."""
    rows, like = inputs[0].shape[0], inputs[0]
    values: list[Tensor] = []
    constant = 0
    for place, slot in enumerate(program.slots):
        if slot.kind in INPUTS:
            values.append(inputs[place].to(like.dtype).expand(rows, slot.length))
        elif slot.kind in REGISTERS:
            values.append(like.new_zeros(rows, slot.length))
        else:
            own = program.constants[constant : constant + slot.length]
            values.append(like.new_tensor(own).expand(rows, slot.length))
            constant += slot.length
    for instruction in program.instructions:
        operands = [
            values[o.slot][:, _places(o.offset, o.repeat, o.length, instruction.count)] for o in instruction.operands
        ]
        target = _places(instruction.offset, instruction.repeat, instruction.length, instruction.count)
        if instruction.op in REDUCTIONS:
            zeros = like.new_zeros(rows, program.slots[instruction.target].length)
            terms = operands[0] if instruction.op == Op.SUM else operands[0] * operands[1]
            values[instruction.target] = zeros.index_add(1, target, terms)
        elif instruction.length == program.slots[instruction.target].length:
            values[instruction.target] = TORCH[instruction.op](*operands)
        else:
            values[instruction.target] = values[instruction.target].index_copy(
                1, target, TORCH[instruction.op](*operands)
            )
    return [values[output] for output in program.outputs]


@lru_cache(maxsize=1024)
def _places(offset: int, repeat: int, length: int, count: int) -> Tensor:
    return offset + (torch.arange(count) // repeat) % length
