"""Options of a run, and the cases that they expand to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from atn_norms.backends import known
from atn_norms.bench.machine import available_memory
from atn_norms.errors import SpecError, unknown
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


def to_text(value: Any) -> Any:
    """Return a mapping of options as JSON, which is hashable; anything else unchanged.

    >>> to_text({"kind": "rms", "eps": 1e-3}), to_text("layer"), to_text(25)
    ('{"kind": "rms", "eps": 0.001}', 'layer', 25)
    """
    return json.dumps(dict(value)) if isinstance(value, Mapping) else value


def from_text(value: Any) -> Any:
    """Return what `to_text` was given."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


@dataclass(frozen=True)
class Case:
    """Work that every runner does; the `size` of a stream is one row and one step.

    `cell` and `norm` are kinds, or options as `to_text` writes them; `placement` is options, or empty for the default.
    """

    cell: str
    norm: str
    size: Size
    threads: int
    mode: str
    dtype: str
    malloc: str = "default"
    input_gradient: bool = False
    placement: str = ""
    autocast: bool = False

    def options(self, window: int | str | None, backend: str = "auto") -> dict[str, Any]:
        """Return the options of the layer of this case; without a window: torch's, without a norm."""
        sizes = {"input_size": self.size.input, "hidden_size": self.size.hidden}
        plain = {"cell": from_text(self.cell), **sizes}
        if window is None:
            return plain
        placement = {"placement": from_text(self.placement)} if self.placement else {}
        return {**plain, "norm": from_text(self.norm), "window": from_text(window), "backend": backend, **placement}

    def layer(self, window: int | str | None, backend: str = "auto") -> LayerSpec:
        """Return the layer of this case; without a window: torch's, without a norm."""
        return LayerSpec.model_validate(self.options(window, backend))

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        kept = ", malloc keeps its memory" if self.malloc == "keep" else ""
        placed = f", placement {self.placement}" if self.placement else ""
        cast = ", autocast to bfloat16" if self.autocast else ""
        return f"{self.cell}, norm {self.norm}{placed}, {self.size}, {self.mode}, {threads}, {self.dtype}{cast}{kept}"


def runners() -> list[str]:
    """Names of the runners on a CPU, slowest last."""
    return [*(name for name in known() if name not in ("torch", "triton")), TEXTBOOK]


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if not values or twice is not None:
        got = f"{twice!r} twice" if values else "an empty list"
        raise SpecError(got=got, expected="each value once" if values else "at least one value")
    return values


def _known_runners(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in (choices := runners()):
            raise SpecError.of([unknown("runner", name, choices)])
    return names


def _a_window(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"got {value}; expected at least 1")
    return value


Mode = Literal["training", "inference", "streaming"]
Entry = Annotated[str, BeforeValidator(to_text)]
Window = Annotated[int | str, BeforeValidator(to_text), AfterValidator(_a_window)]


class BenchSpec(Options):
    """Options of a run: every combination of cell, norm, size, threads and mode is a case, which all runners share.

    | option | meaning | unit |
    |---|---|---|
    | `cells`, `norms` | kinds, or mappings with `kind` and its options; of plugins too | |
    | `placements` | mappings of placement options; an empty one is the default placement | |
    | `sizes` | (input, hidden, batch, steps) of a call; a stream is one row, one step a call | |
    | `windows` | k, a kind or a mapping, of every runner but torch.nn, which has no norm | steps |
    | `modes` | `training` is forward and backward; `streaming` is batch 1, T = 1, state carried, no gradients | |
    | `runners` | what is compared with torch.nn | |
    | `budget` | approximate time for one case; a runner that is too slow for its share is skipped | seconds |
    | `memory` | whether to measure the growth of peak resident size over one training step | |
    | `malloc` | `keep`: freed memory stays in the process, for every runner; `both`: first as it is, then so | |
    | `autocast` | whether every runner is called under autocast to bfloat16 | |
    | `input_gradient` | whether training includes the gradient of the input, as inside a stack | |

    Errors: `ValidationError`; `SpecError` from `cases` for a cell, norm or size that no layer has.

    >>> [str(case) for case in BenchSpec(sizes=((2, 8, 4, 10),), modes=("training",), threads=(1,)).cases()]
    ['lstm, norm layer, (2, 8, 4, 10), training, 1 thread, float32']
    """

    cells: Annotated[tuple[Entry, ...], AfterValidator(_each_once)] = ("lstm",)
    norms: Annotated[tuple[Entry, ...], AfterValidator(_each_once)] = ("layer",)
    placements: Annotated[tuple[Entry, ...], AfterValidator(_each_once)] = ("{}",)
    sizes: Annotated[tuple[tuple[Positive, Positive, Positive, Positive], ...], AfterValidator(_each_once)] = (
        (2, 60, 50, 100),
    )
    windows: Annotated[tuple[Window, ...], AfterValidator(_each_once)] = (1, 25)
    threads: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], AfterValidator(_each_once)] = (1,)
    modes: Annotated[tuple[Mode, ...], AfterValidator(_each_once)] = ("training", "inference", "streaming")
    dtype: Literal["float32", "float64"] = "float32"
    runners: Annotated[tuple[str, ...], AfterValidator(_each_once), AfterValidator(_known_runners)] = Field(
        default_factory=lambda: tuple(runners())
    )
    budget: float = Field(default=8.0, gt=0)
    memory: bool = True
    malloc: Literal["default", "keep", "both"] = "default"
    autocast: bool = False
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
        for malloc, cell, norm, placement, sizes, threads, mode in product(
            mallocs, self.cells, self.norms, self.placements, self.sizes, self.threads, self.modes
        ):
            size = Size(*sizes)._replace(batch=1, steps=1) if mode == "streaming" else Size(*sizes)
            placed = "" if placement == "{}" else placement
            case = Case(cell, norm, size, threads, mode, self.dtype, malloc, self.input_gradient, placed, self.autocast)
            for window in self.windows:
                _refuse_impossible(case, window)
            found[case] = None
        return list(found)


def _refuse_impossible(case: Case, window: int | str) -> None:
    layer = validate(LayerSpec, case.options(window))
    if layer.equations().torch_name is None:
        raise SpecError("cells", f"{case.cell!r}, which torch.nn does not have", "lstm, gru or rnn")
    free = available_memory()
    width = max(case.size.input, layer.equations().pre_activations)
    if free is not None and 8 * prod((case.size.batch, case.size.steps, width)) > free:
        raise SpecError("sizes", str(case.size), f"sequences that fit the {free / 2**30:.1f} GiB of free memory")
