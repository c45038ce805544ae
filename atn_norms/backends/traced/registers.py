"""From slots that are written once to as few registers as hold what is still needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atn_norms.backends.traced.program import (
    INPUT,
    INPUTS,
    REDUCTIONS,
    REGISTER,
    SMALL,
    Instruction,
    Op,
    Operand,
    Program,
    ProgramError,
    Slot,
)
from atn_norms.backends.traced.recorder import Untraceable


@dataclass(frozen=True)
class Draft:
    """Slots without limit, what fills them, and which of them are results."""

    slots: list[Slot]
    code: list[Instruction]
    constants: dict[int, tuple[float, ...]]
    outputs: list[int]


def allot(draft: Draft) -> Program:
    """Return the program of a draft without what no output needs, and with registers used again."""
    code = _fused(draft, _needed(draft))
    kinds = _kinds(draft, code)
    last: dict[int, int] = dict.fromkeys(draft.outputs, len(code))
    for place, instruction in enumerate(code):
        for operand in instruction.operands:
            last[operand.slot] = max(last.get(operand.slot, -1), place)
    slots = [slot for slot in draft.slots if slot.kind in INPUTS]
    names = {place: place for place in range(len(slots))}
    constants: list[float] = []
    free: dict[Slot, list[int]] = {}
    final = []
    needed = {operand.slot for instruction in code for operand in instruction.operands} | set(draft.outputs)
    for place in sorted(needed & set(draft.constants)):
        names[place] = len(slots)
        slots.append(draft.slots[place])
        constants += draft.constants[place]
    for place, instruction in enumerate(code):
        if instruction.target not in names:
            slot = Slot(kinds[instruction.target], draft.slots[instruction.target].length)
            names[instruction.target] = free[slot].pop() if free.get(slot) else len(slots)
            if names[instruction.target] == len(slots):
                slots.append(slot)
        operands = tuple(replace(operand, slot=names[operand.slot]) for operand in instruction.operands)
        final.append(replace(instruction, target=names[instruction.target], operands=operands))
        for used in {operand.slot for operand in instruction.operands}:
            if used in kinds and last[used] == place:
                free.setdefault(slots[names[used]], []).append(names[used])
    try:
        return Program(tuple(slots), tuple(final), tuple(names[output] for output in draft.outputs), tuple(constants))
    except ProgramError as error:
        raise Untraceable(f"it is too large for a program ({error})") from None


def _needed(draft: Draft) -> list[Instruction]:
    wanted, kept = set(draft.outputs), []
    for instruction in reversed(draft.code):
        if instruction.target in wanted:
            wanted |= {operand.slot for operand in instruction.operands}
            kept.append(instruction)
    return kept[::-1]


def _kinds(draft: Draft, code: list[Instruction]) -> dict[int, int]:
    """Return for every register whether it is of rows or small; sums of rows are small."""
    kinds: dict[int, int] = {}
    for instruction in code:
        own = SMALL
        for operand in instruction.operands:
            slot = draft.slots[operand.slot]
            of_rows = slot.kind == INPUT or kinds.get(operand.slot) == REGISTER
            if of_rows and operand.repeat == 1 and operand.length > 1 and instruction.op not in REDUCTIONS:
                own = REGISTER
        kinds[instruction.target] = REGISTER if REGISTER in (own, kinds.get(instruction.target)) else SMALL
    return kinds


def _fused(draft: Draft, code: list[Instruction]) -> list[Instruction]:
    """Return instructions in which a sum of products that nothing else reads is one instruction."""
    uses: dict[int, int] = dict.fromkeys(draft.outputs, 1)
    writers: dict[int, list[Instruction]] = {}
    for instruction in code:
        writers.setdefault(instruction.target, []).append(instruction)
        for operand in instruction.operands:
            uses[operand.slot] = uses.get(operand.slot, 0) + 1
    dropped: set[int] = set()
    fused = []
    for instruction in code:
        if instruction.op == Op.SUM:
            (operand,) = instruction.operands
            product = writers.get(operand.slot, [])
            if (
                len(product) == 1
                and product[0].op == Op.MUL
                and uses[operand.slot] == 1
                and product[0].count == instruction.count == draft.slots[operand.slot].length
                and all(_is_vector(part, instruction.count) for part in (*product[0].operands, operand))
            ):
                dropped.add(operand.slot)
                instruction = replace(instruction, op=Op.DOT, operands=product[0].operands)
        fused.append(instruction)
    return [instruction for instruction in fused if instruction.target not in dropped]


def _is_vector(operand: Operand, count: int) -> bool:
    return (operand.repeat, operand.length) == (1, count)
