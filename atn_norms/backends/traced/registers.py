"""Allocate registers: map slots that are written once to registers that are used again."""

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
    """An unlimited number of slots, the instructions that write them, and the output slots."""

    slots: list[Slot]
    code: list[Instruction]
    constants: dict[int, tuple[float, ...]]
    outputs: list[int]


def allot(draft: Draft) -> Program:
    """Return the program of a draft, without instructions that no output needs, and with registers used again."""
    code = _shared_logarithms(draft, _needed(draft))
    code = _scheduled(draft, _without_copies(draft, _fused_products(draft, _fused_sums(draft, code))))
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
            # An output may be computed in place, so it shares its register with no other value.
            shared = free.get(slot) and instruction.target not in draft.outputs
            names[instruction.target] = free[slot].pop() if shared else len(slots)
            if names[instruction.target] == len(slots):
                slots.append(slot)
        operands = tuple(replace(operand, slot=names[operand.slot]) for operand in instruction.operands)
        final.append(replace(instruction, target=names[instruction.target], operands=operands))
        for used in dict.fromkeys(operand.slot for operand in instruction.operands):
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


def _scheduled(draft: Draft, code: list[Instruction]) -> list[Instruction]:
    """Order instructions for the kernels: results of statistics first, then operations on whole rows together.

    The kernels keep the result of an operation on rows for the next one, which therefore reads it where possible. A sum
    comes first among the readers, since it keeps the result too. Only operations on equally many elements run together.
    """
    kinds, needs = _kinds(draft, code), _needs(draft, code)
    small = {i for i, instruction in enumerate(code) if kinds[instruction.target] == SMALL and not _is_sum(instruction)}
    left = dict.fromkeys(range(len(code)))
    order: list[int] = []
    held = -1
    while left:
        ready = [place for place in left if needs[place].isdisjoint(left.keys())]
        of_rows = [place for place in ready if place not in small]
        last_of_rows = bool(order) and order[-1] not in small
        if not of_rows or (len(of_rows) < len(ready) and not last_of_rows):
            chosen = next(place for place in ready if place in small)
        else:
            readers = [place for place in of_rows if held in [operand.slot for operand in code[place].operands]]
            sums = [place for place in readers if _is_sum(code[place])]
            of_one_size = [place for place in of_rows if order and code[place].count == code[order[-1]].count]
            chosen = (sums or readers or of_one_size or of_rows)[0]
            held = held if sums else code[chosen].target
        del left[chosen]
        order.append(chosen)
    return [code[place] for place in order]


def _is_sum(instruction: Instruction) -> bool:
    return instruction.op in REDUCTIONS


def _needs(draft: Draft, code: list[Instruction]) -> list[set[int]]:
    """Return the places of the instructions that must run before each instruction.

    The first output is written after the last input was read, so that it can replace this input.
    """
    writers: dict[int, list[int]] = {}
    needs: list[set[int]] = []
    every: list[set[int]] = []  # also indirectly
    for place, instruction in enumerate(code):
        needs.append({writer for operand in instruction.operands for writer in writers.get(operand.slot, [])})
        needs[-1] |= {other for other in writers.get(instruction.target, []) if _share(code[other], instruction)}
        every.append(set().union(needs[-1], *(every[earlier] for earlier in needs[-1])))
        writers.setdefault(instruction.target, []).append(place)
    inputs = sum(slot.kind in INPUTS for slot in draft.slots)
    firsts = writers.get(draft.outputs[0], []) if draft.outputs else []
    for place, instruction in enumerate(code):
        reads = inputs - 1 in [operand.slot for operand in instruction.operands]
        if reads and place not in firsts and every[place].isdisjoint(firsts):
            for first in firsts:
                needs[first].add(place)
    return needs


def _share(one: Instruction, other: Instruction) -> bool:
    """Return True if two instructions write a common element of a register."""
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


def _kinds(draft: Draft, code: list[Instruction]) -> dict[int, int]:
    """Return the kind of every register, of rows or small; sums of rows are small."""
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


def _shared_logarithms(draft: Draft, code: list[Instruction]) -> list[Instruction]:
    """Share the logarithm between several powers of one base, or between a power and a logarithm."""
    users: dict[tuple[Operand, int], list[Instruction]] = {}
    for instruction in code:
        if instruction.op in (Op.LOG, Op.POW):
            users.setdefault((instruction.operands[0], instruction.count), []).append(instruction)
    logarithms: dict[tuple[Operand, int], int] = {}
    shared = []
    for instruction in code:
        key = (instruction.operands[0], instruction.count)
        if instruction.op not in (Op.LOG, Op.POW) or len(users[key]) < 2:
            shared.append(instruction)
            continue
        if key not in logarithms:
            own = [user.target for user in users[key] if user.op == Op.LOG and _is_whole(draft, user)]
            if not own:
                draft.slots.append(Slot(REGISTER, instruction.count))
            logarithms[key] = own[0] if own else len(draft.slots) - 1
            target = logarithms[key]
            count = instruction.count
            shared.append(Instruction(Op.LOG, target, 0, count, 1, count, instruction.operands[:1]))
        if instruction.op == Op.POW:
            base, exponent = instruction.operands
            logarithm = Operand(logarithms[key], 0, 1, instruction.count)
            instruction = replace(instruction, op=Op.POW_LOG, operands=(base, logarithm, exponent))
        elif instruction.target == logarithms[key]:
            continue
        shared.append(instruction)
    return shared


def _is_whole(draft: Draft, instruction: Instruction) -> bool:
    return (instruction.offset, instruction.length) == (0, draft.slots[instruction.target].length)


def _read_once(draft: Draft, code: list[Instruction]) -> dict[int, Instruction]:
    """Return instructions that alone write a register that is read once, by register."""
    uses: dict[int, int] = dict.fromkeys(draft.outputs, 2)
    writers: dict[int, list[Instruction]] = {}
    for instruction in code:
        writers.setdefault(instruction.target, []).append(instruction)
        for operand in instruction.operands:
            uses[operand.slot] = uses.get(operand.slot, 0) + 1
    return {
        slot: own[0]
        for slot, own in writers.items()
        if len(own) == 1 and uses.get(slot) == 1 and own[0].op not in REDUCTIONS and _is_whole(draft, own[0])
    }


def _without_copies(draft: Draft, code: list[Instruction]) -> list[Instruction]:
    """Remove copies: compute a value, which is only copied into a part of a register, in that part."""
    kinds, single = _kinds(draft, code), _read_once(draft, code)
    moved = {}
    for instruction in code:
        operand = instruction.operands[0]
        if (
            instruction.op == Op.COPY
            and operand.slot in single
            and single[operand.slot].op != Op.COPY
            and _is_vector(operand, instruction.count)
            and instruction.count == draft.slots[operand.slot].length > 1
            and kinds[operand.slot] == kinds[instruction.target]
        ):
            moved[operand.slot] = instruction
    kept = [instruction for instruction in code if not (instruction.op == Op.COPY and instruction in moved.values())]
    return [
        replace(i, target=moved[i.target].target, offset=moved[i.target].offset) if i.target in moved else i
        for i in kept
    ]


_WITH_PRODUCT = {(Op.ADD, 0): Op.MUL_ADD, (Op.ADD, 1): Op.MUL_ADD, (Op.SUB, 0): Op.MUL_SUB, (Op.SUB, 1): Op.SUB_MUL}
_WITH_PRODUCT |= {(Op.MUL, 0): Op.MUL_MUL, (Op.MUL, 1): Op.MUL_MUL}


def _fused_products(draft: Draft, code: list[Instruction]) -> list[Instruction]:
    """Fuse a product of vectors into the sum or product that alone reads it."""
    kinds, products = _kinds(draft, code), _read_once(draft, code)
    dropped: set[int] = set()
    fused = []
    for instruction in code:
        for place, operand in enumerate(instruction.operands):
            op, product = _WITH_PRODUCT.get((instruction.op, place)), products.get(operand.slot)
            if (
                op is None
                or product is None
                or product.op != Op.MUL
                or operand.slot in dropped
                or product.target in dropped
                or any(part.slot in dropped for part in product.operands)
                or not _is_vector(operand, instruction.count)
                or instruction.count == 1
                or kinds[operand.slot] != kinds[instruction.target]
            ):
                continue
            other = instruction.operands[1 - place]
            operands = (*product.operands, other)
            if all(part.length == 1 or _is_vector(part, instruction.count) for part in operands):
                dropped.add(operand.slot)
                fused.append(replace(instruction, op=op, operands=operands))
                break
        else:
            fused.append(instruction)
    return [instruction for instruction in fused if instruction.target not in dropped]


def _fused_sums(draft: Draft, code: list[Instruction]) -> list[Instruction]:
    """Fuse a product into the sum or difference that alone reads it."""
    products = _read_once(draft, code)
    dropped: set[int] = set()
    fused = []
    for instruction in code:
        if instruction.op == Op.SUM:
            (operand,) = instruction.operands
            product = products.get(operand.slot)
            if (
                product is not None
                and product.op == Op.MUL
                and all(_is_vector(part, instruction.count) for part in (*product.operands, operand))
            ):
                dropped.add(operand.slot)
                instruction = replace(instruction, op=Op.DOT, operands=product.operands)
        fused.append(instruction)
    return [instruction for instruction in fused if instruction.target not in dropped]


def _is_vector(operand: Operand, count: int) -> bool:
    return (operand.repeat, operand.length) == (1, count)
