"""The kernels' interpreter against PyTorch: every operation, every layout of operands, in float64 and narrow."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import atn_norms as an
from atn_norms.backends.native.library import Library, load
from atn_norms.backends.traced.cache import traced_norm
from atn_norms.backends.traced.normalizer import PROGRAMS, TracedNorm, tensors_of
from atn_norms.backends.traced.program import (
    ARITY,
    BINARY,
    CONSTANT,
    INPUT,
    REDUCTIONS,
    REGISTER,
    SMALL,
    SMALL_INPUT,
    TORCH,
    UNARY,
    Instruction,
    Op,
    Operand,
    Program,
    Slot,
)
from tests.compare import compare
from tests.native.strategies import needs_kernels
from tests.traced.gallery import EVERY, Scaled, built

pytestmark = needs_kernels

# Relative errors in units of the last place: one or two of most operations; y log x of x^y.
ULPS = {Op.POW: 700.0, Op.POW_LOG: 700.0, Op.SIGMOID: 4.0}


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "AVX2", "AVX-512"])
def library(request) -> Any:
    found = load()
    assert isinstance(found, Library)
    found.level(request.param)
    yield found
    found.level(2)


def elementwise(op: Op, count: int) -> Program:
    """Return a program of one operation on whole rows."""
    operands = tuple(Operand(place, 0, 1, count) for place in range(ARITY[op]))
    slots = (*[Slot(INPUT, count)] * ARITY[op], Slot(REGISTER, count))
    return Program(slots, (Instruction(op, ARITY[op], 0, count, 1, count, operands),), (ARITY[op],), ())


def numbers(seed: int, rows: int, count: int) -> Tensor:
    """Return numbers in every range that functions treat differently."""
    source = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, count, generator=source, dtype=torch.float64)
    scales = torch.tensor([1e-3, 0.1, 1.0, 3.0, 30.0], dtype=torch.float64)
    return normal * scales[torch.randint(0, 5, (rows, 1), generator=source)]


@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "narrow"])
@pytest.mark.parametrize("op", [op for op in Op if op not in REDUCTIONS], ids=lambda op: op.name)
def test_every_operation_equals_torch(library, op, narrow):
    program = elementwise(op, 37)
    inputs = [numbers(place, 19, 37) for place in range(ARITY[op])]
    if op in (Op.LOG, Op.SQRT, Op.RSQRT, Op.POW, Op.POW_LOG, Op.LOG1P):
        inputs[0] = inputs[0].abs() + 1e-3
    if op in (Op.POW, Op.POW_LOG):
        inputs[-1] = inputs[-1].clamp(-8, 8)
    if narrow:
        inputs = [tensor.float().double() for tensor in inputs]
    if op == Op.POW_LOG:
        inputs[1] = inputs[0].log()
    (found,) = library.interpret(program, inputs, narrow)
    expected = TORCH[op](*inputs)
    if narrow:
        within = expected.abs() < 1e38
        found, expected = torch.where(within, found.double(), 0.0), torch.where(within, expected, 0.0)
    unit = 2.0**-23 if narrow else 2.0**-52
    size = expected.abs()
    if op in (Op.MUL_ADD, Op.MUL_SUB, Op.SUB_MUL):  # the product is rounded where the processor has no fused operation
        size = (inputs[0] * inputs[1]).abs() + inputs[2].abs()
    error = ((found - expected).abs() / (size * unit).clamp(min=unit * 1e-3)).nan_to_num(0.0)
    assert float(error.max()) <= ULPS.get(op, 2.5)


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    float("inf"),
    float("-inf"),
    float("nan"),
    5e-324,
    1e-310,
    1e308,
    -1e308,
    800.0,
    -800.0,
]


@pytest.mark.parametrize("op", sorted(UNARY | BINARY), ids=lambda op: op.name)
def test_zeros_infinities_and_nan_equal_torch(library, op):
    pairs = torch.cartesian_prod(*[torch.tensor(SPECIAL, dtype=torch.float64)] * 2)
    inputs = [pairs[:, place : place + 1] for place in range(ARITY[op])]
    (found,) = library.interpret(elementwise(op, 1), inputs)
    expected = TORCH[op](*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-300, equal_nan=True)
    if op in UNARY:
        zero = expected == 0
        assert torch.equal(found[zero].signbit(), expected[zero].signbit())


@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 70), st.data())
def test_operands_may_repeat_and_be_parts(seed, rows, parts, data):
    """Vectors, scalars per row or part of a row, cycles and slices equal evaluation in PyTorch."""
    library = load()
    assert isinstance(library, Library)
    inner = data.draw(st.integers(1, 9))
    count = parts * inner
    views = [
        Operand(0, 0, 1, count),
        Operand(1, data.draw(st.integers(0, 2)), 1, 1),
        Operand(2, 0, inner, parts),
        Operand(2, 0, 1, parts),
        Operand(3, data.draw(st.integers(0, 2)), 1, 1),
        Operand(0, count - parts, inner, parts),
    ]
    first, second = data.draw(st.sampled_from(views)), data.draw(st.sampled_from(views))
    slots = (*(Slot(INPUT, size) for size in (count, 3, parts)), Slot(CONSTANT, 3), Slot(REGISTER, count + 2))
    start = data.draw(st.integers(0, 2))
    code = [Instruction(Op.COPY, 4, 0, count + 2, 1, count + 2, (Operand(3, 1, 1, 1),))]
    code.append(Instruction(Op.SUB, 4, start, count, 1, count, (first, second)))
    program = Program(slots, tuple(code), (4,), (1.5, -2.0, 0.25))
    inputs = [numbers(seed + place, rows, slots[place].length) for place in range(3)]
    compare(library.interpret(program, inputs)[0], program.evaluate(inputs)[0], tolerance=0.0)


@given(
    st.integers(0, 2**20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 70), st.sampled_from([Op.SUM, Op.DOT])
)
def test_sums_over_rows_and_groups(seed, rows, groups, width, op):
    library = load()
    assert isinstance(library, Library)
    count = groups * width
    operands = tuple(Operand(place, 0, 1, count) for place in range(ARITY[op]))
    for repeat in (width, 1):
        slots = (*[Slot(INPUT, count)] * ARITY[op], Slot(SMALL, groups))
        program = Program(slots, (Instruction(op, ARITY[op], 0, count, repeat, groups, operands),), (ARITY[op],), ())
        inputs = [numbers(seed + place, rows, count) for place in range(ARITY[op])]
        bound = 1e-15 * count * float(torch.stack([x.abs().max() for x in inputs]).prod())
        compare(library.interpret(program, inputs)[0], program.evaluate(inputs)[0], tolerance=bound)


EXACT_OPS = (
    Op.COPY, Op.NEG, Op.ABS, Op.SIGN, Op.ADD, Op.SUB, Op.MUL, Op.MAX, Op.MIN, Op.GT, Op.LE, Op.AND, Op.SUM, Op.DOT,
    Op.MUL_ADD, Op.MUL_SUB, Op.SUB_MUL, Op.MUL_MUL, Op.WHERE,
)  # fmt: skip
LARGEST_EXACT = 2**22  # below the integers that float32 cannot hold


def bound_of(op: Op, bounds: list[int], count: int) -> int:
    """Return the largest magnitude of a result, for integers of given magnitudes."""
    a, b, c = [*bounds, 1, 1][:3]
    if op in REDUCTIONS:
        return 4 * count * a * b
    if op in (Op.MUL_ADD, Op.MUL_SUB, Op.SUB_MUL):
        return a * b + c
    return a * b * c if op in (Op.MUL, Op.MUL_MUL) else sum(bounds)


def drawn_program(data: st.DataObject, count: int) -> Program:
    """Return instructions over whole rows, parts of rows and numbers of rows, in an order without a pattern."""
    slots = [Slot(INPUT, count), Slot(INPUT, count + 2), Slot(SMALL_INPUT, 2), Slot(CONSTANT, 2)]
    slots += [Slot(REGISTER, count)] * 3 + [Slot(REGISTER, count + 2), Slot(SMALL, 1), Slot(SMALL, 1)]
    code = [Instruction(Op.COPY, 7, 0, count + 2, 1, count + 2, (Operand(1, 0, 1, count + 2),))]
    bounds: dict[int, int] = dict.fromkeys((0, 1, 2, 3, 7), 2)
    for _ in range(data.draw(st.integers(1, 14))):
        op, operands = data.draw(st.sampled_from(EXACT_OPS)), []
        for _ in range(ARITY[op]):
            slot = data.draw(st.sampled_from([s for s in bounds if op not in REDUCTIONS or slots[s].length >= count]))
            size = count if slots[slot].length >= count else 1
            operands.append(Operand(slot, data.draw(st.integers(0, slots[slot].length - size)), 1, size))
        bound = bound_of(op, [bounds[operand.slot] for operand in operands], count)
        free = {8, 9} if op in REDUCTIONS else {4, 5, 6, 7}
        target = data.draw(st.sampled_from(sorted(free - {operand.slot for operand in operands})))
        if bound > LARGEST_EXACT:
            continue
        offset = 0 if op in REDUCTIONS else data.draw(st.integers(0, slots[target].length - count))
        sizes = (count, 1) if op in REDUCTIONS else (1, count)
        code.append(Instruction(op, target, offset, count, *sizes, tuple(operands)))
        bounds[target] = max(bound, bounds.get(target, 0) if target == 7 else 0)
    return Program(tuple(slots), tuple(code), tuple(sorted(set(bounds) - {0, 1, 2, 3})), (1.0, -2.0))


@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "narrow"])
@given(st.integers(0, 2**20), st.integers(1, 35), st.integers(3, 150), st.data())
def test_instructions_run_together_equal_torch(narrow, seed, rows, count, data):
    """Integers, for which every order of operations is exact."""
    library = load()
    assert isinstance(library, Library)
    program = drawn_program(data, count)
    source = torch.Generator().manual_seed(seed)
    inputs = [torch.randint(-2, 3, (rows, size), generator=source).double() for size in program.inputs]
    for found, expected in zip(library.interpret(program, inputs, narrow), program.evaluate(inputs), strict=True):
        assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "narrow"])
def test_a_result_is_complete_before_it_is_read_in_another_order(library, narrow):
    """A sum enters the next operation, and a vector is read one element further than it is written."""
    n = 150
    whole = Operand(0, 0, 1, n)
    slots = (
        Slot(INPUT, n),
        Slot(CONSTANT, 1),
        Slot(SMALL, 1),
        Slot(REGISTER, n),
        Slot(REGISTER, n + 1),
        Slot(REGISTER, n),
    )
    code = (
        Instruction(Op.SUM, 2, 0, n, n, 1, (whole,)),
        Instruction(Op.SUB, 3, 0, n, 1, n, (whole, Operand(2, 0, 1, 1))),
        Instruction(Op.COPY, 4, n, 1, 1, 1, (Operand(1, 0, 1, 1),)),
        Instruction(Op.NEG, 4, 0, n, 1, n, (whole,)),
        Instruction(Op.ABS, 5, 0, n, 1, n, (Operand(4, 1, 1, n),)),
    )
    program = Program(slots, code, (3, 5), (-4.0,))
    inputs = [torch.randint(-2, 3, (5, n), generator=torch.Generator().manual_seed(0)).double()]
    for found, expected in zip(library.interpret(program, inputs, narrow), program.evaluate(inputs), strict=True):
        assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("features", [3, 60, 600])
@pytest.mark.parametrize("name", EVERY)
def test_programs_of_normalizers(library, name, features):
    norm = built(name, features)
    traced = traced_norm(norm, features)
    assert isinstance(traced, TracedNorm), traced
    flat = torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors_of(norm)])
    for name in PROGRAMS:
        program: Program = getattr(traced, name)
        inputs = [numbers(place, 21, size).abs() + 0.1 for place, size in enumerate(program.inputs)]
        inputs[program.parameters] = flat.expand(21, -1)
        for found, expected in zip(library.interpret(program, inputs), program.evaluate(inputs), strict=True):
            assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)) <= 1e-12


class Cancelling(Scaled):
    """Variance as a difference of large numbers, which is inaccurate in float32."""

    def measure(self, x: Any) -> Any:
        wide = x.double()
        return an.Average(wide.square().mean(-1, keepdim=True) - wide.mean(-1, keepdim=True).square())


def test_only_accurate_programs_run_in_float32():
    cancelling, centred = traced_norm(Cancelling(240), 240), traced_norm(built("SoftClipped", 240), 240)
    assert isinstance(cancelling, TracedNorm)
    assert isinstance(centred, TracedNorm)
    assert not cancelling.measure.narrow
    assert centred.measure.narrow
    assert centred.normalize.narrow
