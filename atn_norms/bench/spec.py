"""Options of a run, and the cases that they expand to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from atn_norms.backends import known
from atn_norms.bench.machine import available_memory
from atn_norms.errors import SpecError, did_you_mean
from atn_norms.layers import LayerSpec
from atn_norms.options import Options
from atn_norms.specs import validate

TORCH = "torch.nn"
TEXTBOOK = "textbook"
Positive = Annotated[int, Field(ge=1)]


class Size(NamedTuple):
    """Sizes of one call: features in, hidden units H, rows B, time steps T."""

    input: int
    hidden: int
    batch: int
    steps: int

    def __str__(self) -> str:
        return f"({', '.join(map(str, self))})"


@dataclass(frozen=True)
class Case:
    """Work that every runner does; the `size` of a stream is one row and one step."""

    cell: str
    norm: str
    size: Size
    threads: int
    mode: str
    dtype: str
    malloc: str = "default"
    input_gradient: bool = False

    def layer(self, window: int | None, backend: str = "auto") -> LayerSpec:
        """The layer of this case; no window: torch's, without a norm."""
        normed: dict[str, Any] = {} if window is None else {"norm": self.norm, "window": window, "backend": backend}
        sizes = {"input_size": self.size.input, "hidden_size": self.size.hidden}
        return LayerSpec.model_validate({"cell": self.cell, **sizes, **normed})

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        kept = ", malloc keeps its memory" if self.malloc == "keep" else ""
        return f"{self.cell}, norm {self.norm}, {self.size}, {self.mode}, {threads}, {self.dtype}{kept}"


def runners() -> list[str]:
    """Names of the runners on a CPU, slowest last."""
    return [*(name for name in known() if name not in ("torch", "triton")), TEXTBOOK]


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if not values or twice is not None:
        raise ValueError("empty; allowed: at least one" if not values else f"{twice!r} is listed twice")
    return values


def _known_runners(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in (allowed := runners()):
            raise ValueError(f"got unknown {name!r}; expected one of {', '.join(allowed)}{did_you_mean(name, allowed)}")
    return names


Mode = Literal["training", "inference", "streaming"]


class BenchSpec(Options):
    """Options of a run: every combination of cell, norm, size, threads and mode is a case, which all runners share.

    | option | meaning | unit |
    |---|---|---|
    | `sizes` | (input, hidden, batch, steps) of a call; a stream is one row, one step a call | |
    | `windows` | k of every runner but torch.nn, which has no norm | steps |
    | `modes` | `training` is forward and backward; `streaming` is batch 1, T = 1, state carried, no gradients | |
    | `runners` | what is compared with torch.nn | |
    | `budget` | approximate time for one case; a runner that is too slow for its share is skipped | seconds |
    | `memory` | whether to measure the growth of peak resident size over one training step | |
    | `malloc` | `keep`: freed memory stays in the process, for every runner; `both`: first as it is, then so | |
    | `input_gradient` | whether training includes the gradient of the input, as inside a stack | |

    Errors: `ValidationError`; `SpecError` from `cases` for a cell, norm or size that no layer has.

    >>> [str(case) for case in BenchSpec(sizes=((2, 8, 4, 10),), modes=("training",), threads=(1,)).cases()]
    ['lstm, norm layer, (2, 8, 4, 10), training, 1 thread, float32']
    """

    cells: Annotated[tuple[str, ...], AfterValidator(_each_once)] = ("lstm",)
    norms: Annotated[tuple[str, ...], AfterValidator(_each_once)] = ("layer",)
    sizes: Annotated[tuple[tuple[Positive, Positive, Positive, Positive], ...], AfterValidator(_each_once)] = (
        (2, 60, 50, 100),
    )
    windows: Annotated[tuple[Positive, ...], AfterValidator(_each_once)] = (1, 25)
    threads: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], AfterValidator(_each_once)] = (1,)
    modes: Annotated[tuple[Mode, ...], AfterValidator(_each_once)] = ("training", "inference", "streaming")
    dtype: Literal["float32", "float64"] = "float32"
    runners: Annotated[tuple[str, ...], AfterValidator(_each_once), AfterValidator(_known_runners)] = Field(
        default_factory=lambda: tuple(runners())
    )
    budget: float = Field(default=8.0, gt=0)
    memory: bool = True
    malloc: Literal["default", "keep", "both"] = "default"
    input_gradient: bool = False

    @model_validator(mode="after")
    def _a_norm(self) -> Self:
        if "none" in self.norms:
            raise ValueError("norms: 'none' leaves nothing to compare; torch.nn without a norm runs in every case")
        return self

    def cases(self) -> list[Case]:
        """Return every case in its order; malloc `keep` comes last, since it lasts until the process ends."""
        mallocs = ("default", "keep") if self.malloc == "both" else (self.malloc,)
        found: dict[Case, None] = {}
        for malloc, cell, norm, sizes, threads, mode in product(
            mallocs, self.cells, self.norms, self.sizes, self.threads, self.modes
        ):
            size = Size(*sizes)._replace(batch=1, steps=1) if mode == "streaming" else Size(*sizes)
            case = Case(cell, norm, size, threads, mode, self.dtype, malloc, self.input_gradient)
            _refuse_impossible(case)
            found[case] = None
        return list(found)


def _refuse_impossible(case: Case) -> None:
    sizes = {"input_size": case.size.input, "hidden_size": case.size.hidden}
    layer = validate(LayerSpec, {"cell": case.cell, "norm": case.norm, **sizes})
    if layer.equations().torch_name is None:
        raise SpecError(f"cells: {case.cell!r} has no torch.nn layer to compare with; allowed: lstm, gru, rnn")
    free = available_memory()
    width = max(case.size.input, layer.equations().pre_activations)
    if free is not None and 8 * prod((case.size.batch, case.size.steps, width)) > free:
        raise SpecError(f"sizes: {case.size} makes sequences that do not fit the {free / 2**30:.1f} GiB that are free")
