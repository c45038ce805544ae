"""Run the programs of a normalizer in float32 where they keep the digits of float64, in layers of float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from atn_norms.backends.native.library import Library, load
from atn_norms.backends.traced.normalizer import PROGRAMS, TracedNorm, tensors_of
from atn_norms.backends.traced.program import Program
from atn_norms.modes import on_cpu
from atn_norms.normalizers import Normalizer
from atn_norms.statistics import Average, Moments

# Largest difference relative to an element, and to the root mean square of all elements, or of this element in all rows
# if that is larger (a sum over a row has the errors of many terms): a dozen roundings of float32.
LARGEST = 1e-6
RANGE = 1e-4  # the same for large and small rows, which show an overflow or an underflow
COUNT = 32
# Mean and deviation of the rows of a comparison, and the largest difference.
ROWS = (0.0, 1.0, LARGEST), (1e4, 1e-2, LARGEST), (0.0, 0.0, LARGEST)
ROWS += (0.0, 1e-10, RANGE), (0.0, 1e2, RANGE), (0.0, 1e10, RANGE)
# The same for all programs in turn: a sum of random signs may be near 0, and cancelled digits give errors above 1e-3.
COMBINED = 1e-5
COMBINED_ROWS = tuple((mean, deviation, max(largest, COMBINED)) for mean, deviation, largest in ROWS)
COMBINED_ROWS += ((1e2, 1e-2, COMBINED),)  # where functions saturate at 1e4
MOVE = 0.25  # of parameters, relative and absolute: a learned parameter may start where it hides lost digits, as at 0
# The sets of programs that may need float64: the smallest first, and those of the statistic before the others.
_STATISTIC_FIRST = "measure_back", "measure", "normalize_back", "normalize"
_WIDENED = [each for size in range(len(PROGRAMS) + 1) for each in combinations(_STATISTIC_FIRST, size)]

_Case: TypeAlias = tuple[float, float, float, Tensor]  # mean, deviation, largest difference, parameters


def narrowed(normalizer: Normalizer, traced: TracedNorm) -> TracedNorm:
    """Return the programs; in layers of float32, those that are exact enough run in float32.

    The comparison uses rows of mean 0 and deviations from 1e-10 to 1e10, and rows of mean 1e4 and deviation 1e-2, which
    keep their digits only if the subtraction of the mean is exact. Each program is compared alone. Then all programs
    are compared in turn, since `normalize` may cancel digits of the statistic, as in E[x^2] - E[x]^2. Where digits
    count, both comparisons are repeated with other parameters, since training changes them.
    """
    library = load()
    if isinstance(library, str):
        return traced
    with on_cpu(), torch.no_grad():
        parameters = [tensor.detach().cpu().float().reshape(-1) for tensor in tensors_of(normalizer)]
        flat = torch.cat([torch.zeros(0), *parameters])
        exact = {name for name in PROGRAMS if _keeps_digits(library, traced, name, _cases(ROWS, flat))}
        if traced.leaves:
            runs = _Runs(library, traced, _cases(COMBINED_ROWS, flat))
            exact = next(exact - {*wide} for wide in _WIDENED if runs.keep_digits(exact - {*wide}))
    return replace(traced, **{name: replace(getattr(traced, name), narrow=name in exact) for name in PROGRAMS})


def _cases(rows: Sequence[tuple[float, float, float]], flat: Tensor) -> list[_Case]:
    """Return the comparisons of these rows, those that count digits also with parameters near the given ones."""
    factor, term = MOVE * (2 * torch.rand(2, *flat.shape, generator=torch.Generator().manual_seed(12)) - 1)
    own, moved = (each.double().expand(COUNT, -1) for each in (flat, flat * (1 + factor) + term))
    return [(*row, own) for row in rows] + [(*row, moved) for row in rows if row[2] != RANGE and len(flat)]


def _keeps_digits(library: Library, traced: TracedNorm, name: str, cases: Sequence[_Case]) -> bool:
    """Check one program, with the exact statistic or random gradients of the statistic as inputs."""
    program: Program = getattr(traced, name)
    if not program.narrowable:
        return False
    source = torch.Generator().manual_seed(11)
    for mean, deviation, largest, flat in cases:
        x = (mean + deviation * torch.randn(COUNT, traced.features, generator=source)).double()
        spread = torch.rand(COUNT, traced.width, generator=source, dtype=torch.float64)
        leaves = traced.measure.evaluate([x, flat]) if traced.leaves else []
        if name == "measure_back":
            leaves = [spread.clone() for _ in leaves]
        dy = torch.randn(COUNT, traced.features, generator=source).double()
        inputs = {
            "measure": [x, flat],
            "normalize": [x, *leaves, flat],
            "measure_back": [x, flat, *leaves],
            "normalize_back": [x, *leaves, flat, dy],
        }[name]
        wide, narrow = (library.interpret(program, inputs, is_narrow) for is_narrow in (False, True))
        if not all(_close(a, b, _size(b), largest) for a, b in zip(narrow, wide, strict=True)):
            return False
    return True


class _Runs:
    """Runs of all four programs in turn, with statistics that are pooled over two rows; each run is kept."""

    def __init__(self, library: Library, traced: TracedNorm, cases: Sequence[_Case]) -> None:
        self._library, self._traced, self._cases = library, traced, cases
        source = torch.Generator().manual_seed(13)
        shape = COUNT, traced.features
        self._rows = [
            ((mean + deviation * torch.randn(shape, generator=source)).double(), torch.randn(shape, generator=source))
            for mean, deviation, *_ in cases
        ]
        self._exact = [self._results(place, frozenset()) for place in range(len(cases))]

    def keep_digits(self, narrow: set[str]) -> bool:
        """Check results and gradients if these programs are narrow."""
        for place, (*_, largest, _) in enumerate(self._cases):
            exact, found = self._exact[place], self._results(place, frozenset(narrow))
            for (a, _), (b, size) in zip(found, exact, strict=True):
                if not _close(a, b, size, largest):
                    return False
        return True

    def _results(self, place: int, narrow: frozenset[str]) -> list[tuple[Tensor, Tensor]]:
        """Return the result and the gradients of x and of the parameters, with the size of their terms."""
        (x, dy), flat = self._rows[place], self._cases[place][-1]
        own = self._run("measure", [x, flat], narrow)
        with torch.enable_grad():
            own = [leaf.double().requires_grad_() for leaf in own]
            pooled = _pooled(own, self._traced.centred)
        leaves = [leaf.detach() for leaf in pooled]
        (y,) = self._run("normalize", [x, *leaves, flat], narrow)
        dx, *rest = self._run("normalize_back", [x, *leaves, flat, dy.double()], narrow)
        spread, parameters = rest[: len(leaves)], rest[len(leaves) :]
        given = torch.autograd.grad(pooled, own, [each.double() for each in spread])
        more, *others = self._run("measure_back", [x, flat, *given], narrow)
        results = [(y, _size(y)), (dx + more, _size(dx) + _size(more))]
        return results + [(each, _size(each)) for each in (*parameters, *others)]

    def _run(self, name: str, inputs: Sequence[Tensor], narrow: frozenset[str]) -> list[Tensor]:
        return self._library.interpret(getattr(self._traced, name), inputs, name in narrow)


def _pooled(leaves: Sequence[Tensor], centred: bool) -> list[Tensor]:
    """Return the statistics of every row and the row before it, with equal weights."""
    weights = torch.ones(COUNT, 2, dtype=torch.float64)
    both = [torch.stack([leaf, leaf.roll(1, 0)], 1) for leaf in leaves]
    return list(Moments(*both).pool(weights, 1) if centred else Average(*both).pool(weights, 1))


def _size(exact: Tensor) -> Tensor:
    """Return the magnitude to which a difference is relative, for each element."""
    squares = torch.where(exact.isfinite(), exact, 0.0).double().square()
    return exact.double().abs() + torch.maximum(squares.mean(), squares.mean(0)).sqrt()


def _close(found: Tensor, exact: Tensor, size: Tensor, largest: float) -> bool:
    close = (found.double() - exact).abs() <= largest * size
    return bool((close | (found == exact) | (found.isnan() & exact.isnan())).all())
