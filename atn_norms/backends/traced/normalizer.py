"""A normalizer traced into four programs: measure, normalize, and their vector-Jacobian products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.backends.traced.linearity import check_linear
from atn_norms.backends.traced.program import Program
from atn_norms.backends.traced.recorder import Recorder, Untraceable, described, raised_at
from atn_norms.normalizers import Normalizer
from atn_norms.pytree import expand_mask
from atn_norms.statistics import Average, Moments

WRONG_SHAPE = "its measure returns leaves of another shape than [..., d]"
PROGRAMS = ("measure", "normalize", "measure_back", "normalize_back")
# Of a comparison of `pool`: size of the leaves, largest weight, entries, and axis. Leaves of 0 show an added constant.
_POOLED = (1.0, 1.0, 4, 1), (1e-3, 1e2, 4, 1), (1e3, 1e6, 3, 2), (1.0, 1e-3, 12, 1), (0.0, 1.0, 3, 1)


@dataclass(frozen=True)
class TracedNorm:
    """A normalizer as programs over rows of `features` elements.

    | field | meaning | inputs -> outputs |
    |---|---|---|
    | `measure` | one row's statistic | x, parameters -> leaves |
    | `normalize` | the normalized row | x, leaves, parameters -> y |
    | `measure_back` | vector-Jacobian product of `measure` | x, parameters, dleaves -> dx, dparameters or nothing |
    | `normalize_back` | that product of `normalize` | x, leaves, parameters, dy -> dx, dleaves, dparameters |
    | `leaves` | trailing shapes of the statistic's leaves; empty without a statistic | |
    | `centred` | the statistic is `Moments`; otherwise all leaves are weighted means | |
    | `parameters` | number of elements of all parameters and buffers | |

    The leaves of weighted means are concatenated in one input; means and variances of `Moments` are two inputs.
    """

    features: int
    leaves: tuple[tuple[int, ...], ...]
    centred: bool
    parameters: int
    measure: Program
    normalize: Program
    measure_back: Program
    normalize_back: Program

    @property
    def width(self) -> int:
        """Number of separately pooled elements: of each leaf of `Moments`, or of all leaves of weighted means."""
        sizes = [_size(leaf) for leaf in self.leaves]
        return (sizes[0] if self.centred else sum(sizes)) if sizes else 0

    @property
    def inputs(self) -> list[int]:
        """Number of elements of each input for the pooled statistic."""
        return _leaf_inputs(self.width, self.centred)

    def __post_init__(self) -> None:
        x, leaves, extra = [self.features], self.inputs, [self.parameters]
        for name, inputs, outputs in (
            ("measure", x + extra, leaves),
            ("normalize", x + leaves + extra, x),
            ("measure_back", x + extra + leaves, x + extra),
            ("normalize_back", x + leaves + extra + x, x + leaves + extra),
        ):
            program: Program = getattr(self, name)
            whole = list(program.results) == outputs or (
                name.endswith("back") and list(program.results) == outputs[:-1]
            )
            if list(program.inputs) != inputs or not whole:
                raise ValueError(
                    f"{name}: got inputs {list(program.inputs)} and outputs {list(program.results)}; "
                    f"expected {inputs} and {outputs}"
                )

    def __hash__(self) -> int:
        return hash(self._text)

    def encode(self) -> str:
        """Return a text without blanks, from which `decode` builds an equal value."""
        return self._text

    @cached_property
    def _text(self) -> str:
        shapes = ",".join("x".join(map(str, leaf)) for leaf in self.leaves)
        head = f"{self.features}|{shapes}|{int(self.centred)}|{self.parameters}"
        return "|".join([head, *(getattr(self, name).encode() for name in PROGRAMS)])

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> TracedNorm:
        """Return the traced normalizer of a text; `ValueError` for an invalid text."""
        features, shapes, centred, parameters, *programs = text.split("|")
        leaves = tuple(tuple(int(size) for size in leaf.split("x") if size) for leaf in shapes.split(",") if leaf)
        every = [Program.decode(program) for program in programs]
        return TracedNorm(int(features), leaves, centred == "1", int(parameters), *every)

    @cached_property
    def words(self) -> bytes:
        """The four programs in the form that the kernels read."""
        return b"".join(getattr(self, name).words for name in PROGRAMS)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def _leaf_inputs(width: int, centred: bool) -> list[int]:
    return [width] * (2 if centred else 1) if width else []


def tensors_of(normalizer: Normalizer) -> list[Tensor]:
    """Return the parameters and floating-point buffers of a normalizer, in the order of the programs' input."""
    every = [*normalizer.parameters(), *normalizer.buffers()]
    return [tensor for tensor in every if tensor.is_floating_point()]


def trace(normalizer: Normalizer, features: int, executed: dict[CodeType, str] | None = None) -> TracedNorm | str:
    """Return the programs of a normalizer, or the reason why there are none.

    The Python code that runs is added to `executed`, with its module.
    """
    executed = {} if executed is None else executed
    try:
        first = _traced(normalizer, features, 0, executed)
        if first != _traced(normalizer, features, 1, executed):
            return "what it computes depends on numbers in tensors in a way that only Python sees"
        return first
    except Untraceable as error:
        return str(error)


def _traced(normalizer: Normalizer, features: int, seed: int, executed: dict[CodeType, str]) -> TracedNorm:
    twin = twin_of(normalizer, seed)
    source = torch.Generator().manual_seed(seed)
    dtype = torch.float64
    x = torch.randn(1, features, generator=source, dtype=dtype)
    tensors = tensors_of(twin)
    extra = sum(tensor.numel() for tensor in tensors)

    def tracing() -> _Tracing:
        return _Tracing(twin, tensors, extra, executed)

    run = tracing()
    slot_x, slot_p = run.input(x), run.parameters()
    statistic = run.observe(lambda: twin.measure(run.leaf(slot_x)))
    leaves, centred = _checked_statistic(twin, statistic)
    width = (leaves[0].numel() if centred else sum(leaf.numel() for leaf in leaves)) if leaves else 0
    pooled = _leaf_inputs(width, centred)
    shapes = tuple(tuple(leaf.shape[1:]) for leaf in leaves)
    measure = run.finish([(size, parts) for size, parts in zip(pooled, _packed(leaves, centred), strict=True)])

    run = tracing()
    slot_x, slot_p = run.input(x), run.parameters()
    gradient = [torch.rand(leaf.shape, generator=source, dtype=leaf.dtype) + 0.5 for leaf in leaves]
    given = run.leaves(gradient, centred)
    found = run.differentiate(lambda: tuple(twin.measure(run.leaf(slot_x))), given, [slot_x, *slot_p])
    measure_back = run.finish([(features, [(0, found[0])]), *run.gradients(found[1:])])

    values = [torch.rand(leaf.shape, generator=source, dtype=leaf.dtype) + 0.5 for leaf in leaves]
    run = tracing()
    slot_x = run.input(x)
    slot_l = run.leaves(values, centred)
    run.parameters()
    y = run.observe(lambda: twin.normalize(run.leaf(slot_x), rebuilt(statistic, slot_l)))
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise Untraceable("its normalize does not return a tensor of the shape of x")
    normalize = run.finish([(features, [(0, y)])])

    run = tracing()
    slot_x = run.input(x)
    slot_l = run.leaves(values, centred)
    slot_p = run.parameters()
    dy = run.input(torch.randn(1, features, generator=source, dtype=y.dtype))
    found = run.differentiate(
        lambda: (twin.normalize(run.leaf(slot_x), rebuilt(statistic, slot_l)),), [dy], [slot_x, *slot_l, *slot_p]
    )
    of_leaves = _packed(found[1 : 1 + len(slot_l)], centred, [leaf.numel() for leaf in leaves])
    normalize_back = run.finish(
        [
            (features, [(0, found[0])]),
            *[(size, parts) for size, parts in zip(pooled, of_leaves, strict=True)],
            *run.gradients(found[1 + len(slot_l) :]),
        ]
    )
    return TracedNorm(features, shapes, centred, extra, measure, normalize, measure_back, normalize_back)


def _packed(leaves: Sequence[Any], centred: bool, sizes: Sequence[int] | None = None) -> list[list[tuple[int, Any]]]:
    """Return the leaves in each input of the statistic, with their offsets."""
    if not leaves:
        return []
    if centred:
        return [[(0, leaf)] for leaf in leaves]
    sizes = [leaf.numel() for leaf in leaves] if sizes is None else sizes
    parts, at = [], 0
    for leaf, size in zip(leaves, sizes, strict=True):
        parts.append((at, leaf))
        at += size
    return [parts]


def rebuilt(statistic: Any, leaves: Sequence[Tensor]) -> Any:
    """Return a statistic of the same class with other leaves."""
    return type(statistic)(*leaves)


class _Tracing:
    """One recording: inputs, recorded operations, and their program."""

    def __init__(self, twin: Normalizer, tensors: Sequence[Tensor], extra: int, executed: dict[CodeType, str]) -> None:
        self._tensors, self._extra = tensors, extra
        from atn_norms.backends.traced.lowering import Lowering  # most layers have no traced norm

        self._lowering, self._recorder = Lowering(), Recorder(executed)

    def input(self, value: Tensor) -> Tensor:
        tensor = value.clone().requires_grad_()
        self._lowering.bind(tensor, self._lowering.add_input(tensor.numel()))
        return tensor

    def leaf(self, tensor: Tensor) -> Tensor:
        return tensor

    def leaves(self, values: Sequence[Tensor], centred: bool) -> list[Tensor]:
        tensors = [value.clone().requires_grad_() for value in values]
        if centred:
            for tensor in tensors:
                self._lowering.bind(tensor, self._lowering.add_input(tensor.numel(), small=True))
        elif tensors:
            slot, at = self._lowering.add_input(sum(tensor.numel() for tensor in tensors), small=True), 0
            for tensor in tensors:
                self._lowering.bind(tensor, slot, at)
                at += tensor.numel()
        return tensors

    def parameters(self) -> list[Tensor]:
        slot, at = self._lowering.add_input(self._extra), 0
        for tensor in self._tensors:
            self._lowering.bind(tensor.data, slot, at)
            at += tensor.numel()
        return list(self._tensors)

    def gradients(self, found: Sequence[Tensor | None]) -> list[tuple[int, list[tuple[int, Any]]]]:
        """Return the output for the gradients of all parameters; empty if no parameter has a gradient."""
        if all(gradient is None for gradient in found):
            return []
        parts, at = [], 0
        for tensor, gradient in zip(self._tensors, found, strict=True):
            parts.append((at, gradient))
            at += tensor.numel()
        return [(self._extra, parts)]

    def observe(self, function: Callable[[], Any]) -> Any:
        return _observe(self._recorder, function)

    def differentiate(
        self, function: Callable[[], tuple[Any, ...]], gradients: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> list[Tensor | None]:
        outputs = _observe(self._recorder, function)
        pairs = [(output, g) for output, g in zip(outputs, gradients, strict=True) if output.requires_grad]
        return _differentiate(self._recorder, pairs, wanted)

    def finish(self, outputs: Sequence[tuple[int, Sequence[tuple[int, Tensor | None]]]]) -> Program:
        for call in self._recorder.calls:
            self._lowering.call(call)
        return self._lowering.finish(outputs)


def _observe(recorder: Recorder, function: Callable[[], Any]) -> Any:
    try:
        with torch.enable_grad(), recorder:
            return function()
    except RuntimeError as error:
        if "in-place" not in str(error):
            raise
        raise Untraceable(f"its input is changed in place{described(raised_at(error))}") from None


def _differentiate(
    recorder: Recorder, pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]
) -> list[Tensor | None]:
    differentiable = [tensor for tensor in wanted if tensor.requires_grad]
    if not pairs or not differentiable:
        return [None] * len(wanted)
    with recorder:
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            differentiable,
            [gradient.reshape(output.shape).detach() for output, gradient in pairs],
            allow_unused=True,
        )
    rest = iter(found)
    return [next(rest) if tensor.requires_grad else None for tensor in wanted]


def twin_of(normalizer: Normalizer, seed: int) -> Normalizer:
    """Return a copy in float64 on the CPU; all parameters are perturbed and require gradients."""
    source = torch.Generator().manual_seed(seed)
    try:
        twin = copy.deepcopy(normalizer).to(device="cpu", dtype=torch.float64)
    except (TypeError, RuntimeError, ValueError) as error:
        raise Untraceable(f"it cannot be copied: {error}") from None
    for tensor in tensors_of(twin):
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_()
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        if seed:
            tensor.data.mul_(1.0 + 0.1 * torch.rand(tensor.shape, generator=source, dtype=torch.float64))
    return twin


def _checked_statistic(twin: Normalizer, statistic: Any) -> tuple[list[Tensor], bool]:
    """Return the leaves of a statistic, and True for `Moments`; raise an error if no kernel can pool it."""
    leaves = list(statistic)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or leaf.shape[0] != 1 or leaf.numel() == 0:
            raise Untraceable(WRONG_SHAPE)
        if leaf.dtype != torch.float64:
            raise Untraceable(f"its measure returns {leaf.dtype}; statistics are float64 (use atn_norms.promoted)")
    if type(statistic) is Moments and leaves[0].shape == leaves[1].shape:
        return leaves, True
    if type(statistic) is not Average and leaves:
        reason = _unlike_weighted_mean(statistic)
        if reason is not None:
            raise Untraceable(f"its statistic {type(statistic).__name__} is not pooled by a weighted mean{reason}")
    return leaves, False


def _unlike_weighted_mean(statistic: Any) -> str | None:
    """Return None if `pool` returns weighted means of all leaves, and a reason, which may be empty, if it does not.

    Its code must be linear in the leaves, with factors that depend on the weights alone. Then a comparison of values
    and gradients on random leaves is valid for all leaves.
    """
    source = torch.Generator().manual_seed(0)
    kind, shapes = type(statistic), [leaf.shape[1:] for leaf in statistic]
    for scale, largest, entries, dim in _POOLED:
        stacked = *(2,) * dim, entries
        leaves = [scale * torch.randn(*stacked, *shape, generator=source, dtype=torch.float64) for shape in shapes]
        weights = largest * torch.rand(stacked, generator=source, dtype=torch.float64)
        weights[..., 1] = 0.0
        weights[0, ..., 0] = 0.0
        factors = [torch.rand(*stacked[:-1], *shape, generator=source, dtype=torch.float64) for shape in shapes]
        try:
            if not _is_weighted_mean(kind, leaves, weights, factors, scale):
                return ""
        except Untraceable as error:
            return f": {error}"
        except Exception:  # noqa: BLE001 - a plugin's own code may raise anything on numbers that it does not expect
            return ""
    return None


def _is_weighted_mean(
    kind: Any, leaves: Sequence[Tensor], weights: Tensor, factors: Sequence[Tensor], scale: float
) -> bool:
    """Check the code of `pool`; compare its values, and its gradients for the gradients `factors` of the values."""
    dim = weights.ndim - 1
    shares = weights / weights.sum(dim, keepdim=True)
    expected = [(expand_mask(shares, leaf) * leaf).sum(dim) for leaf in leaves]
    expected += [
        expand_mask(shares, leaf) * factor.unsqueeze(dim) for leaf, factor in zip(leaves, factors, strict=True)
    ]
    hidden = [leaf.masked_fill(expand_mask(weights == 0, leaf), float("nan")).requires_grad_() for leaf in leaves]
    check_linear(lambda: (list(kind(*hidden).pool(weights, dim)), ()), hidden, [weights])
    with torch.enable_grad():
        found = list(kind(*hidden).pool(weights, dim))
        found += torch.autograd.grad(found, hidden, factors)
    return len(found) == len(expected) and all(
        isinstance(f, Tensor) and f.shape == e.shape and torch.allclose(f, e, rtol=1e-12, atol=1e-12 * size)
        for f, e, size in zip(found, expected, [scale] * len(leaves) + [1.0] * len(leaves), strict=True)
    )
