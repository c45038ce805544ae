"""Programs: recording, results, and rejection of malformed programs."""

import re
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

import atn_norms as an
from atn_norms.backends.traced.cache import fingerprint, traced_norm
from atn_norms.backends.traced.comparison import differences
from atn_norms.backends.traced.normalizer import PROGRAMS, TracedNorm, trace
from atn_norms.backends.traced.program import (
    CONSTANT,
    INPUT,
    REGISTER,
    SMALL,
    SMALL_INPUT,
    Instruction,
    Op,
    Operand,
    Program,
    ProgramError,
    Slot,
)
from atn_norms.statistics import promoted
from tests.compare import compare
from tests.traced.gallery import EVERY, L1, GallerySpec, PowerMean, Scaled, built

EXACT = 1e-12  # for a dozen features; sums in another order differ by their length times 1e-16


def traced(normalizer: an.Normalizer, features: int = 12) -> TracedNorm:
    found = trace(normalizer, features)
    assert isinstance(found, TracedNorm), found
    return found


@pytest.mark.parametrize("features", [3, 12, 30])
@pytest.mark.parametrize("name", EVERY)
def test_programs_equal_the_normalizer(name, features):
    normalizer = built(name, features)
    worst = differences(normalizer, traced(normalizer, features))
    stateless = set() if normalizer.stateless else {"statistic", "gradient of the statistic"}
    assert set(worst) == stateless | {"result", "gradient of the result"}
    assert all(value <= EXACT for value in worst.values()), worst


@pytest.mark.parametrize("name", EVERY)
def test_a_program_is_restored_from_its_text(name):
    found = traced(built(name, 6), 6)
    assert TracedNorm.decode(found.encode()) == found
    assert not set(found.encode()) & set(" ;")


@pytest.mark.parametrize("norm", [an.LayerNorm(7), an.RMSNorm(7, bias=True)])
def test_built_in_normalizers_can_be_traced_too(norm):
    assert all(value <= EXACT for value in differences(norm, traced(norm, 7)).values())


class Median(Scaled):
    def measure(self, x: Any) -> Any:
        return an.Average(x.double().median(-1, keepdim=True).values)


class Noisy(Scaled):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return x + torch.rand_like(x)


class Branching(Scaled):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return x if bool(pooled.mean.sum() > 0) else -x


class Counting(Scaled):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("seen", torch.zeros(1))

    def normalize(self, x: Any, pooled: Any) -> Any:
        self.seen += 1
        return x


GLOBAL = torch.ones(4)


class Captured(Scaled):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return x * GLOBAL


class Largest(an.Average):
    def pool(self, weights: Any, dim: int) -> Any:
        return Largest(self.mean.amax(dim))


class Maximal(Scaled):
    def measure(self, x: Any) -> Any:
        return an.Average(x.double().abs().amax(-1, keepdim=True))


class Single(Scaled):
    def measure(self, x: Any) -> Any:
        return an.Average(x.float().abs().mean(-1, keepdim=True))


UNTRACEABLE = {
    Median: ("median has no native instruction (test_programs.py, line ", "x.double().median(-1"),
    Noisy: ("rand_like is random (test_programs.py, line ", "torch.rand_like(x)"),
    Branching: ("a number is read out of a tensor (test_programs.py, line ", "bool(pooled.mean.sum() > 0)"),
    Counting: ("add_ changes an input, a parameter or a buffer in place (test_programs.py, line ", "self.seen += 1"),
    Captured: ("mul reads a tensor that is neither a parameter nor a buffer", "x * GLOBAL"),
    Maximal: ("amax has no native instruction", "amax(-1, keepdim=True)"),
    Single: ("its measure returns torch.float32; statistics are float64", "promoted"),
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_an_unsupported_operation_is_named_with_its_line(kind):
    found = trace(kind(4), 4)
    assert isinstance(found, str)
    assert all(part in found for part in UNTRACEABLE[kind]), found


def test_a_pool_that_is_not_a_weighted_mean_is_named():
    class Peak(Scaled):
        def measure(self, x: Any) -> Any:
            return Largest(x.double().abs().mean(-1, keepdim=True))

    assert str(trace(Peak(4), 4)).startswith(
        "its statistic Largest is not pooled by a weighted mean: amax is not linear"
    )


def test_numbers_that_leave_torch_are_detected():
    class Hidden(Scaled):
        def normalize(self, x: Any, pooled: Any) -> Any:
            return x * float(x.detach().numpy().sum())

    found = trace(Hidden(4), 4)
    assert isinstance(found, str)
    assert "a number is read out of a tensor (test_programs.py, line " in found


# -- the cache


def test_options_and_code_are_part_of_the_fingerprint_and_elements_are_not():
    first, second = PowerMean(4), PowerMean(4)
    with torch.no_grad():
        second.weight.add_(1)
    assert fingerprint(first) == fingerprint(second)
    second.p = 2.0
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) != fingerprint(L1(4))
    second.p = 3.0
    assert fingerprint(first) != fingerprint(second.eval())


@pytest.mark.parametrize(("power", "size"), [(5.0, 1e9), (8.0, 1e5)])
def test_rows_that_overflow_float32_are_float64(power, size):
    native, reference = (an.GRU(3, 4, norm=GallerySpec(name="PowerMean"), backend=b) for b in ("native", "reference"))
    for layer in (native, reference):
        torch.manual_seed(0)
        layer.reset_parameters()
        for norm in layer.modules():
            if isinstance(norm, PowerMean):
                norm.p = power
    x = size * torch.randn(5, 2, 3)
    compare(native(x)[0], reference(x)[0], tolerance=1e-5)


class Tiny(Scaled):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return x / (pooled.mean + 1e-40)


class TinySpec(an.NormSpec):
    kind: Literal["tiny"] = "tiny"

    def build(self, features: int) -> Any:
        return Tiny(features)


def test_a_row_of_zeros_does_not_overflow_float32():
    """The state starts at 0, and 1 / 1e-40 is infinite in float32."""
    for backend in ("native", "reference"):
        layer = an.GRU(3, 4, bias=False, norm=TinySpec(), window=3, backend=backend)
        assert layer(torch.randn(6, 2, 3))[0].isfinite().all()


def _epsilon(x: Any) -> float:
    return torch.finfo(x.dtype).eps


class Typed(Scaled):
    def measure(self, x: Any) -> Any:
        return an.Average.of(promoted(x).square())

    def normalize(self, x: Any, pooled: Any) -> Any:
        return x * torch.rsqrt(pooled.mean + _epsilon(x))


class Branched(Typed):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return x * torch.rsqrt(pooled.mean + (1e-2 if x.dtype == torch.float32 else 1e-8))


class Rounded(Typed):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return x * torch.rsqrt(pooled.mean.to(x.dtype) + 1e-5)


@pytest.mark.parametrize("kind", [Typed, Branched])
def test_a_result_that_depends_on_the_type_of_x_has_no_program(kind):
    assert traced_norm(kind(4), 4) == "its result depends on the type of x in another way than by rounding"


def test_code_that_rounds_to_the_type_of_x_has_a_program():
    assert not isinstance(traced_norm(Rounded(4), 4), str)


@pytest.mark.parametrize("axis", [-1, 0])
def test_a_statistic_without_a_row_for_each_row_has_no_program(axis):
    class Flat(Typed):
        def measure(self, x: Any) -> Any:
            return an.Average(promoted(x).square().mean(axis, keepdim=axis == 0))

    assert traced_norm(Flat(4), 4) == "its measure returns leaves of another shape than [..., d]"


def test_a_changed_option_has_another_program():
    normalizer = PowerMean(4)
    normalizer.p = 3.0
    cubed = traced_norm(normalizer, 4)
    normalizer.p = 2.0
    assert traced_norm(normalizer, 4) != cubed
    normalizer.p = 3.0
    assert traced_norm(normalizer, 4) is cubed


def test_a_changed_class_attribute_has_another_program(monkeypatch):
    normalizer = PowerMean(4)
    cubed = traced_norm(normalizer, 4)
    monkeypatch.setattr(PowerMean, "p", 2.0)
    assert traced_norm(normalizer, 4) != cubed


def test_an_attribute_that_cannot_be_tracked_has_no_program():
    normalizer = L1(4)
    object.__setattr__(normalizer, "settings", object())
    assert traced_norm(normalizer, 4) == "its attribute 'settings' is an object, which may change unnoticed"


@pytest.mark.parametrize("base", [str, float, int, tuple])
def test_a_value_that_carries_attributes_has_no_program(base):
    normalizer, kind = L1(4), type("Carrying", (base,), {})
    normalizer.settings = kind()
    assert "may change unnoticed" in str(traced_norm(normalizer, 4))


class Frozen(Scaled):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return x / self._scale(pooled) if self.weight.requires_grad else x

    def _scale(self, pooled: Any) -> Any:
        return pooled.mean + 0.1


def _dropped(x: Any) -> Any:
    return next(value if torch.is_grad_enabled() else value.abs() for value in (x,))


class Moody(Scaled):
    def normalize(self, x: Any, pooled: Any) -> Any:
        return self._helped(x) / (pooled.mean + 0.1)

    def _helped(self, x: Any) -> Any:
        return _dropped(x)


@pytest.mark.parametrize(
    ("kind", "place"), [(Frozen, "requires_grad in Frozen.normalize"), (Moody, "is_grad_enabled in _dropped")]
)
def test_code_that_reads_a_mode_has_no_program(kind, place):
    assert traced_norm(kind(4), 4) == f"it reads {place}, which may change between two calls of a program"


def test_a_measure_that_changes_its_input_in_place_has_no_program():
    """In float32 `promoted` copies, so the reference runs it; a trace in float64 has no copy."""

    class InPlace(Scaled):
        def measure(self, x: Any) -> Any:
            return an.Average.of(promoted(x).square_())

    place = r"test_programs.py, line \d+: return an.Average.of\(promoted\(x\).square_\(\)\)"
    assert re.fullmatch(rf"its input is changed in place \({place}\)", str(traced_norm(InPlace(4), 4)))


def test_a_program_that_differs_from_its_python_is_a_warning_with_numbers():
    class Coupled(Scaled):
        """Mean over rows, which is not visible with one row."""

        def normalize(self, x: Any, pooled: Any) -> Any:
            return x - x.mean(0, keepdim=True)

    with pytest.warns(RuntimeWarning, match=r"Coupled: its native program differs .*result by \d.*reference runs it"):
        found = traced_norm(Coupled(4), 4)
    assert isinstance(found, str)


# -- malformed programs

GOOD = Program(
    (Slot(INPUT, 4), Slot(REGISTER, 4), Slot(SMALL, 2), Slot(CONSTANT, 1)),
    (
        Instruction(Op.MUL, 1, 0, 4, 1, 4, (Operand(0, 0, 1, 4), Operand(3, 0, 1, 1))),
        Instruction(Op.SUM, 2, 0, 4, 2, 2, (Operand(1, 0, 1, 4),)),
    ),
    (2,),
    (3.0,),
)


def changed(place: int, **fields: Any) -> Any:
    code = list(GOOD.instructions)
    code[place] = replace(code[place], **fields)
    return {"instructions": tuple(code)}


def test_a_good_program_runs():
    (found,) = GOOD.evaluate([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
    assert found.tolist() == [[9.0, 21.0]]


MALFORMED = {
    "target out of range": changed(0, target=9),
    "target is an input": changed(0, target=0),
    "target is negative": changed(0, target=-1),
    "result beyond its register": changed(0, offset=1),
    "operand out of range": changed(0, operands=(Operand(7, 0, 1, 4), Operand(3, 0, 1, 1))),
    "operand beyond its slot": changed(0, operands=(Operand(0, 1, 1, 4), Operand(3, 0, 1, 1))),
    "operand not written": changed(0, operands=(Operand(2, 0, 1, 2), Operand(3, 0, 1, 1))),
    "operand is the target": changed(1, operands=(Operand(2, 0, 1, 2),)),
    "too few operands": changed(0, operands=(Operand(0, 0, 1, 4),)),
    "repeat of zero": changed(0, operands=(Operand(0, 0, 0, 4), Operand(3, 0, 1, 1))),
    "length of zero": changed(0, operands=(Operand(0, 0, 1, 0), Operand(3, 0, 1, 1))),
    "no elements": changed(0, count=0, length=0),
    "elements of another number": changed(0, length=3),
    "sums that do not divide": changed(1, repeat=3),
    "unknown operation": changed(0, op=99),
    "a size that is no integer": changed(0, count=4.0),
    "a bool as a size": changed(0, target=True),
    "too many elements": changed(0, count=2**31),
    "constants missing": {"constants": ()},
    "constants that are no floats": {"constants": (3,)},
    "an unknown kind of slot": {"slots": (*GOOD.slots[:3], Slot(5, 1))},
    "an empty register": {"slots": (*GOOD.slots[:3], Slot(REGISTER, 0), Slot(CONSTANT, 1))},
    "an input behind a register": {"slots": (*GOOD.slots, Slot(INPUT, 1))},
    "a huge register": {"slots": (*GOOD.slots, Slot(REGISTER, 2**30))},
    "too many slots": {"slots": (*GOOD.slots, *[Slot(REGISTER, 1)] * 600)},
    "output out of range": {"outputs": (12,)},
    "output not written": {"slots": (*GOOD.slots, Slot(REGISTER, 1)), "outputs": (4,)},
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_program_cannot_be_built(fault):
    with pytest.raises(ProgramError, match=r"got .*; expected "):
        replace(GOOD, **MALFORMED[fault])


@pytest.mark.parametrize("text", ["", "[]", "[[],[],[],[]", "[[[9,1]],[],[],[]]", '[[["a"]],[],[],[]]', "{}"])
def test_an_invalid_text_is_rejected(text):
    with pytest.raises(ProgramError):
        Program.decode(text)


def test_incompatible_programs_are_rejected():
    found = traced(L1(4), 4)
    for name in PROGRAMS:
        with pytest.raises(ValueError, match=r"got inputs .*; expected"):
            replace(found, **{name: GOOD})


def test_parametrized_parameters_are_traced_through():
    class Positive(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.exp()

    normalizer = L1(5)
    nn.utils.parametrize.register_parametrization(normalizer, "weight", Positive())
    assert all(value <= EXACT for value in differences(normalizer, traced(normalizer, 5)).values())


def operations(name: str, program: str) -> list[Op]:
    return [instruction.op for instruction in getattr(traced(built(name, 6), 6), program).instructions]


def test_the_gradient_of_a_power_reuses_the_power():
    found = operations("LearnablePower", "measure_back")
    assert [op for op in found if op in (Op.POW, Op.POW_LOG)] == [Op.POW_LOG]
    assert not {Op.EQ, Op.WHERE} & set(found)  # an exponent of 1 plus an exponential is not 0


def test_the_gradient_of_a_choice_between_multiples_is_one_multiple():
    assert Op.MUL_ADD not in operations("TwoSided", "normalize_back")


@pytest.mark.parametrize("name", ["L1", "LearnablePower", "Geometric", "TwoSided", "DynamicTanh"])
def test_an_output_that_replaces_an_input_is_written_last(name):
    program = traced(built(name, 6), 6).normalize_back
    last = sum(slot.kind in (INPUT, SMALL_INPUT) for slot in program.slots) - 1
    reads = [place for place, i in enumerate(program.instructions) if last in [o.slot for o in i.operands]]
    writes = [place for place, i in enumerate(program.instructions) if i.target == program.outputs[0]]
    assert max(reads) <= min(writes)
