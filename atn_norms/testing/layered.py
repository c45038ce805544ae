"""Subjects that are tested inside a layer: cells, backends, and any plugin among built-in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from atn_norms.backends import CellInputs, Program, Unsupported, prepared
from atn_norms.backends.base import Backend
from atn_norms.backends.description import describe
from atn_norms.backends.reference import Reference
from atn_norms.cells import CellSpec, GRUSpec, LSTMSpec, RNNSpec
from atn_norms.layers import LayerSpec, Recurrent
from atn_norms.normalizers import BatchNormSpec, LayerNormSpec, NormSpec, RMSNormSpec
from atn_norms.options import spec_label
from atn_norms.pytree import Tree, tree_leaves
from atn_norms.testing.law import Case
from atn_norms.testing.subjects import SEEDS, WINDOWS, SpecSubject, Subject, noise, stirred
from atn_norms.windows import WindowSpec

CELLS: tuple[CellSpec, ...] = (RNNSpec(), GRUSpec(), LSTMSpec())
NORMS: tuple[NormSpec, ...] = (LayerNormSpec(), RMSNormSpec(), BatchNormSpec())
HIDDEN = tuple(range(1, 17))
INPUTS = 2


def layer_spec(case: Case, **options: Any) -> LayerSpec:
    """Return the options of the layer of a case."""
    fields = {name: case.drawn[name] for name in ("norm", "window", "placement", "backend") if name in case.drawn}
    if fields.get("norm", ...) is None:
        fields.pop("window", None)  # a window pools the statistics of a norm
    return LayerSpec(cell=case.cell, input_size=INPUTS, hidden_size=case.hidden, **fields | options)


def built_layer(case: Case, **options: Any) -> Recurrent:
    """Return a new layer in float64 with every parameter perturbed."""
    torch.manual_seed(case.seed)
    layer = layer_spec(case, **options).build(dtype=torch.float64)
    stirred(layer, case.seed)
    return layer


def first_refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message of a call's `ValueError` (pydantic's included) in one line; empty if it raises none."""
    try:
        function(*arguments, **options)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    except ValueError as error:
        return str(error)
    return ""


class LayerSubject(Subject):
    """A normalizer, window or cell in a layer whose other parts are built in."""

    family = "layer"

    def __init__(
        self,
        label: str,
        cells: Iterable[CellSpec] = CELLS,
        norms: Iterable[NormSpec | None] = NORMS,
        windows: Iterable[WindowSpec] = WINDOWS,
        broken: str = "",
    ) -> None:
        self.label, self.broken = label, broken
        cells, norms = tuple(cells), tuple(norms)
        self.couples = False
        self.axes = {}
        if broken:
            return
        refusal = ""
        sizes: list[int] = []
        for hidden in HIDDEN:
            small = [Case({"cell": cell, "norm": norm, "hidden": hidden}) for cell in cells for norm in norms]
            reasons = [
                reason for case in small for gates in GATES if (reason := first_refusal(layer_spec, case, **gates))
            ]
            refusal = reasons[0] if reasons else refusal
            sizes += [] if reasons else [hidden]
        if not sizes:
            self.broken = f"no hidden size up to {HIDDEN[-1]} fits every site: {refusal}"
            return
        fitting = [
            window
            for window in windows
            if not any(
                first_refusal(layer_spec, Case({"cell": cells[0], "norm": norm, "hidden": sizes[0]}), window=window)
                for norm in norms
                if norm is not None
            )
        ]
        self.axes = {
            "seed": SEEDS,
            "steps": (1, 2, 3, 4, 5),
            "batch": (2, 3),
            "hidden": tuple(sizes[:3]),
            "cell": cells,
            "norm": norms,
            "window": fitting,
            "gates": ("joint", "per_gate"),
        }

    @property
    def unbuilt(self) -> str:
        return self.broken

    def layer(self, case: Case, **options: Any) -> Recurrent:
        """Return a new layer of a case."""
        return built_layer(case, placement={"gates": case.gates}, **options)

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        return (noise(case.seed + seed, case.steps, case.batch, INPUTS),)


GATES: tuple[dict[str, Any], ...] = ({"placement": {"gates": "joint"}}, {"placement": {"gates": "per_gate"}})


class CellSubject(SpecSubject):
    """A cell: its spec, run by the reference with and without norms at its sites."""

    family = "cell"

    def __init__(self, spec: CellSpec) -> None:
        self.spec, self.label = spec, spec_label(spec)
        self.axes = {}
        refusal = ""
        sizes = []
        for hidden in HIDDEN:
            try:
                refusal = first_refusal(layer_spec, Case({"cell": spec, "hidden": hidden, "norm": LayerNormSpec()}))
            except Exception as error:  # noqa: BLE001  any error of a plugin
                self.broken = f"build({hidden}, Placement()) raises {type(error).__name__}: {error}"
                return
            sizes += [] if refusal else [hidden]
        if not sizes:
            self.broken = f"build accepts no hidden size up to {HIDDEN[-1]}: {refusal}"
            return
        self.axes = {
            "seed": SEEDS,
            "steps": (1, 2, 3, 4),
            "batch": (1, 2, 3),
            "hidden": tuple(sizes[:4]),
            "norm": (None, LayerNormSpec(), RMSNormSpec()),
            "window": WINDOWS[:2],
            "cell": (spec,),
        }

    def make(self, case: Case, **options: Any) -> Recurrent:
        return built_layer(case, backend="reference", **options)

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        cell = layer_spec(case).equations()
        sizes = cell.carried_sizes()
        carried = (0.5 * noise(case.seed + seed + 20 + i, case.batch, size) for i, size in enumerate(sizes))
        return noise(case.seed + seed, case.steps, case.batch, INPUTS), *carried

    def run(self, made: Recurrent, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        xs, *carried = inputs
        ys, state = run_cell(Reference(), made, xs, tuple(carried))
        return ys, *tree_leaves(state)

    def result_of(self, spec: CellSpec) -> Any:
        case = self.sample().but(cell=spec)
        return self.run(self.make(case), self.inputs(case))[0].detach()

    def built(self, spec: CellSpec) -> Any:
        return layer_spec(self.sample().but(cell=spec)).equations()


def run_cell(
    backend: Any, layer: Recurrent, xs: Tensor, carried: tuple[Tensor, ...], lengths: Tensor | None = None
) -> tuple[Tensor, Tree]:
    """Run one cell of a layer over a sequence with a backend, from carried tensors and empty windows."""
    state = layer.cell.initial(layer.cell_weights("_l0"), xs.shape[1], carried)
    return continue_cell(backend, layer, xs, state, lengths)


def continue_cell(
    backend: Any, layer: Recurrent, xs: Tensor, state: Tree, lengths: Tensor | None = None
) -> tuple[Tensor, Tree]:
    """Run one cell of a layer over a sequence with a backend, from a state."""
    weights = layer.cell_weights("_l0")
    description, declared = describe(layer.cell, weights)
    program = backend.prepare(layer.cell, description)
    return program.run(CellInputs(xs, weights, declared), state, lengths)


class BackendSubject(Subject):
    """A backend, on every built-in cell, norm and window that it supports."""

    family = "backend"

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.label = str(getattr(backend, "name", type(backend).__name__))
        self.axes = {
            "seed": SEEDS,
            "steps": (1, 2, 3, 4, 5, 6),
            "batch": (2, 3, 4),
            "hidden": (1, 2, 3, 5),
            "cell": CELLS,
            "norm": (None, *NORMS),
            "window": WINDOWS,
        }
        accepted, self.refusals = self._grid()
        self.tried = len(accepted) + len(self.refusals)
        if not accepted:
            return
        for name in ("cell", "norm", "window"):
            values = [case.drawn[name] for case in accepted]
            self.axes[name] = [value for value in self.axes[name] if value in values]

    def _grid(self) -> tuple[list[Case], list[tuple[Case, Any]]]:
        """Return the supported combinations, and the unsupported ones with their reasons."""
        accepted, unsupported = [], []
        for cell in CELLS:
            for norm in (None, *NORMS):
                for window in WINDOWS if norm is not None else WINDOWS[:1]:
                    case = Case({"seed": 0, "hidden": 2, "cell": cell, "norm": norm, "window": window})
                    try:
                        program: Any = self.prepare(self.make(case))
                    except Exception as error:  # noqa: BLE001  a law reports it
                        program = error
                    if callable(getattr(program, "run", None)):
                        accepted.append(case)
                    else:
                        unsupported.append((case, program))
        return accepted, unsupported

    def prepare(self, layer: Recurrent) -> Program | Unsupported:
        """Return the backend's program for the cell of a layer, or its reason."""
        description, _ = describe(layer.cell, layer.cell_weights("_l0"))
        return self.backend.prepare(layer.cell, description)

    def supports(self, layer: Recurrent) -> bool:
        """Return whether the backend has a program for the cell of a layer."""
        return not isinstance(self.prepare(layer), Unsupported)

    def make(self, case: Case) -> Recurrent:
        return built_layer(case, backend="reference")

    def inputs(self, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
        sizes = layer_spec(case).equations().carried_sizes()
        carried = (0.5 * noise(case.seed + seed + 20 + i, case.batch, size) for i, size in enumerate(sizes))
        return noise(case.seed + seed, case.steps, case.batch, INPUTS), *carried

    def run(self, made: Recurrent, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not self.supports(made):
            return ()
        xs, *carried = inputs
        ys, state = run_cell(self.backend, made, xs, tuple(carried))
        return ys, *tree_leaves(state)


def backends_for(layer: Recurrent) -> list[str]:
    """Return the names of the backends that support a layer."""
    programs = prepared(layer.cell, layer.cell_weights("_l0"))
    return [name for name, program in programs.items() if not isinstance(program, Unsupported)]
