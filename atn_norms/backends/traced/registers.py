"""From slots that are written once to as few registers as hold what is still needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atn_norms.backends.traced.program import INPUT, REGISTER, Instruction, Program, ProgramError, Slot
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
    code = _needed(draft)
    last: dict[int, int] = dict.fromkeys(draft.outputs, len(code))
    for place, instruction in enumerate(code):
        for operand in instruction.operands:
            last[operand.slot] = max(last.get(operand.slot, -1), place)
    slots = [slot for slot in draft.slots if slot.kind == INPUT]
    names = {place: place for place in range(len(slots))}
    constants: list[float] = []
    free: dict[int, list[int]] = {}
    final = []
    needed = {operand.slot for instruction in code for operand in instruction.operands} | set(draft.outputs)
    for place in sorted(needed & set(draft.constants)):
        names[place] = len(slots)
        slots.append(draft.slots[place])
        constants += draft.constants[place]
    for place, instruction in enumerate(code):
        if instruction.target not in names:
            length = draft.slots[instruction.target].length
            names[instruction.target] = free[length].pop() if free.get(length) else len(slots)
            if names[instruction.target] == len(slots):
                slots.append(Slot(REGISTER, length))
        operands = tuple(replace(operand, slot=names[operand.slot]) for operand in instruction.operands)
        final.append(replace(instruction, target=names[instruction.target], operands=operands))
        for slot in {operand.slot for operand in instruction.operands}:
            if draft.slots[slot].kind == REGISTER and last[slot] == place:
                free.setdefault(draft.slots[slot].length, []).append(names[slot])
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
