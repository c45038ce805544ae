"""Export a model to files that run without this package, whole or frame by frame."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atn_norms.errors import SpecError, mismatch, nearest_file, not_installed, one_of, plural
from atn_norms.files import write_whole
from atn_norms.layers.convert import with_backend
from atn_norms.layers.recurrent import Recurrent
from atn_norms.pytree import Tree, tree_leaves

Format = Literal["onnx", "pt2", "aoti"]
FORMATS: tuple[Format, ...] = ("onnx", "pt2", "aoti")
SUFFIX = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".aoti.pt2"}
TOLERANCE = 1e-6  # relative to the largest element: float32 rounds at 6e-8, and an exporter may reorder sums
FRAMES = 12  # consecutive frames on which an exported step is compared
TIMED = 200  # frames that are timed
# Nodes of a graph that torch's ONNX exporter optimizes: its time grows with their cube, and onnxruntime optimizes too.
MOST_OPTIMIZED = 2000


class StreamingStep(nn.Module):
    """One time step of a layer: map a frame and a state to an output and the next state, with fixed shapes.

    | symbol | meaning | shape |
    |---|---|---|
    | `frame` | one time step of the input | `[B, D]`, or the input of `before` without the time axis |
    | `state` | leaves of the state, in the order of `pytree.tree_leaves`; zeros at the beginning | axis 0: B or 1 |
    | output | output of `after` for this frame, or of the layer without `after` | `[B, R]` |

    The outputs equal those of `unroll` on the whole sequence. `before` and `after` are modules around the layer, such
    as an embedding and a read-out.

    Errors: `SpecError` for a bidirectional layer, and for a layer whose fresh state is not all zeros. `ValueError` of a
    call with another number of state tensors than `initial` returns.

    >>> import torch, atn_norms as an
    >>> step = an.StreamingStep(an.LSTM(3, 8, norm="layer", window=5))
    >>> y, *state = step(torch.randn(1, 3), *step.initial())
    >>> y.shape
    torch.Size([1, 8])
    """

    def __init__(
        self,
        layer: Recurrent,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        batch: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(layer, Recurrent):
            raise TypeError(f"layer: got {type(layer).__name__}; expected a layer of atn_norms")
        if layer.bidirectional:
            got = "a bidirectional layer, whose reverse direction starts at the end of the sequence"
            raise SpecError("layer", got=got, expected="a layer of one direction")
        plain = portable(
            nn.ModuleDict({"layer": layer, "before": before or nn.Identity(), "after": after or nn.Identity()})
        )
        self.layer: Any = plain.get_submodule("layer")
        self.before, self.after = plain.get_submodule("before"), plain.get_submodule("after")
        with torch.no_grad():
            self._state = self.layer.initial(batch)
        self._leaves = len(self.initial())
        if any(bool(leaf.any()) for leaf in tree_leaves(self._state)):
            raise SpecError("window", got="a fresh state that is not all zeros", expected="zeros")

    def initial(self) -> list[Tensor]:
        """Return the leaves of a fresh state."""
        return [torch.zeros_like(leaf) for leaf in tree_leaves(self._state)]

    def forward(self, frame: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return the output for one frame, then the leaves of the next state."""
        if len(state) != self._leaves:
            raise ValueError(mismatch("state", plural(len(state), "tensor"), f"{self._leaves}: call `initial()`"))
        leaves, after = iter(state), []
        self.layer.recompute_weights()
        y = self.before(frame.unsqueeze(0))
        for suffix, (before,) in zip(self.layer._suffixes, self._state, strict=True):
            weights = self.layer.cell_weights(suffix)
            us, cell_state = self.layer.cell.project(weights, y, _filled(before, leaves))
            y, cell_state = self.layer.cell.step(weights, us[0], cell_state)
            y = y.unsqueeze(0)
            after.append(cell_state)
        return self.after(y).squeeze(0), *tree_leaves(tuple(after))


class WholeSequence(nn.Module):
    """A model of sequences with one fixed length and a fresh state; it returns the output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = portable(model)

    def forward(self, sequence: Tensor) -> Tensor:
        y = self.model(sequence)
        return y[0] if isinstance(y, tuple) else y


@dataclass(frozen=True)
class Exported:
    """The result of an export: the file, its inputs and outputs, and its difference from the module."""

    path: Path
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: tuple[str, ...]
    difference: float | None
    microseconds: float | None
    note: str = ""


def portable(model: nn.Module) -> nn.Module:
    """Copy a model, in evaluation mode, with its layers on the reference backend, which uses plain torch operations."""
    return with_backend(model, "reference").eval().requires_grad_(False)


def export(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: Path | str,
    format: Format = "onnx",
    *,
    names: Sequence[str] = (),
) -> Exported:
    """Export a `StreamingStep`, a `WholeSequence` or another module to a file, run the file, and compare.

    The layers of this package in it are exported as plain torch operations; the module stays unchanged.

    | format | runs with |
    |---|---|
    | `onnx` | onnxruntime, and other programs that read ONNX |
    | `pt2` | torch alone: `torch.export.load(path).module()` |
    | `aoti` | torch alone, compiled for this machine: `torch._inductor.aoti_load_package(path)` |

    `names` are the names of the inputs; the default is `frame`, `state_0`, `state_1` and so on. The file is written
    once the results have been compared: until then an older file of this name stays.

    Errors: `SpecError` for an unknown format, another ending of `path`, and a missing folder or tool. `SpecError` if
    torch cannot export the module, and if the results of the file differ from those of the module.
    """
    path = Path(path)
    names = names or [("frame" if i == 0 else f"state_{i - 1}") for i in range(len(inputs))]
    if format not in FORMATS:
        raise SpecError("format", got=repr(format), expected=one_of(FORMATS))
    if path.suffix != _ending(format):
        others = [f"format={each!r}" for each in FORMATS if path.suffix == _ending(each)]
        cure = f"Use {' or '.join(others)}" if others else ""
        got, expected = f"the ending {path.suffix!r}", f"{_ending(format)} for {format}"
        raise SpecError(position=str(path), got=got, expected=expected, detail=cure)
    if not path.parent.is_dir():
        near = nearest_file(path.parent)
        raise SpecError(position=str(path.parent), got="no such folder", expected="a folder", nearest=near)
    with TemporaryDirectory() as folder:
        new = Path(folder, f"model{SUFFIX[format]}")
        with _quiet():
            written, run, note = _WRITERS[format](module, tuple(inputs), new, list(names))
        difference = None if run is None else _difference(module, run, inputs)
        tolerance = _tolerance(module)
        if difference is not None and difference > tolerance:
            got = f"an exported model that differs from the module by {difference:.2g}"
            raise SpecError(position=str(path), got=got, expected=f"at most {tolerance:.2g}")
        microseconds = None if run is None else _microseconds(run, inputs)
        content = new.read_bytes()
    try:
        write_whole(path, content)
    except OSError as error:
        raise SpecError(position=str(path), got=str(error.strerror), expected="a writable file") from error
    shapes = {
        name: (str(each.dtype).removeprefix("torch."), tuple(each.shape))
        for name, each in zip(names, inputs, strict=True)
    }
    return Exported(path, shapes, written, difference, microseconds, note)


def _ending(format: Format) -> str:
    return f".{SUFFIX[format].rpartition('.')[2]}"  # torch reads packages with this ending alone


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporters log and warn about themselves, such as packages that they could use."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


Run = Callable[..., Sequence[Tensor]]
Written = tuple[tuple[str, ...], Run | None, str]


def _exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Trace a module, with its layers on the reference backend, which uses plain torch operations."""
    if any(isinstance(each, Recurrent) and each.spec.backend != "reference" for each in module.modules()):
        module = with_backend(module, "reference")
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, strict=False)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        got = f"{type(error).__name__}: {first}"
        raise SpecError("model", got, "a model that torch.export can trace") from error


def _write_onnx(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str]) -> Written:
    _need("onnx", "onnxscript")
    outputs = ["output", *(f"{name}_next" for name in names[1:])]
    traced = _exported(module, inputs)
    details: dict[str, Any] = {"input_names": names, "output_names": outputs, "dynamo": True, "verbose": False}
    try:
        with torch.no_grad():
            program = torch.onnx.export(traced, inputs, optimize=len(traced.graph.nodes) <= MOST_OPTIMIZED, **details)
    except Exception as error:
        reason = str(error).partition("No ONNX function found for ")[2].partition(". ")[0]
        got = reason or type(error).__name__
        raise SpecError("model", got, "a model whose operations ONNX has") from error
    assert program is not None
    _cast_to_types(program.model)
    program.save(str(path), external_data=False)
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return tuple(outputs), None, "not checked: onnxruntime is not installed"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options)

    def run(*tensors: Tensor) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, given)]

    return tuple(outputs), run, ""


def _cast_to_types(model: Any) -> None:
    """Replace each `CastLike` of an ONNX model by a `Cast`: onnxruntime would warn about every one.

    Torch's exporter writes these nodes for constants, and removes them where it optimizes the graph.
    """
    import onnx_ir

    for node in model.graph:
        if node.op_type == "CastLike" and (dtype := _dtype(node.inputs[1])) is not None:
            node.op_type = "Cast"
            node.resize_inputs(1)
            node.attributes["to"] = onnx_ir.AttrInt64("to", int(dtype))


def _dtype(value: Any) -> Any:
    """Return the type of an ONNX value, or None; the exporter records no type for constants and for some `Where`."""
    node = value.producer()
    if value.dtype is not None or node is None:
        return value.dtype
    if node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].value.dtype
    return _dtype(node.inputs[1]) if node.op_type == "Where" else None


def _write_pt2(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str]) -> Written:
    program = _exported(module, inputs)
    foreign = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("atn_norms")})
    if foreign:
        got = f"a traced model that calls {', '.join(foreign)}"
        raise SpecError("model", got=got, expected="operators of torch alone")
    torch.export.save(program, str(path))
    return ("output", *(f"{name}_next" for name in names[1:])), _tuple(torch.export.load(str(path)).module()), ""


def _write_aoti(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str]) -> Written:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    try:
        with torch.no_grad():
            aoti_compile_and_package(_exported(module, inputs), package_path=str(path))
    except SpecError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        cure = "A C++ compiler must be installed."
        raise SpecError("model", first, "a model that AOTInductor can compile", detail=cure) from error
    return ("output", *(f"{name}_next" for name in names[1:])), _tuple(aoti_load_package(str(path))), ""


_WRITERS: dict[str, Callable[[nn.Module, tuple[Tensor, ...], Path, list[str]], Written]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "aoti": _write_aoti,
}


def _need(*modules: str) -> None:
    from importlib.util import find_spec

    missing = [each for each in modules if find_spec(each) is None]
    if missing:
        raise not_installed(" and ".join(missing), "export")


def _tuple(run: Callable[..., Any]) -> Run:
    def called(*tensors: Tensor) -> Sequence[Tensor]:
        returned = run(*tensors)
        return returned if isinstance(returned, tuple | list) else (returned,)

    return called


def _difference(module: nn.Module, run: Run, inputs: Sequence[Tensor]) -> float:
    """Return the largest difference between an exported model and its module; a step is run for several frames."""
    mine, worst = list(inputs), 0.0
    random = torch.Generator().manual_seed(0)
    for _ in range(FRAMES if len(inputs) > 1 else 1):
        with torch.no_grad():
            expected = _tuple(module)(*mine)
        got = run(*mine)
        pairs = zip(expected, got, strict=True)
        worst = max(worst, *(_relative(a, b) for a, b in pairs))
        frame = inputs[0]
        frame = torch.randn(frame.shape, generator=random, dtype=frame.dtype) if frame.is_floating_point() else frame
        mine = [frame, *expected[1:]]
    return worst


def _relative(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference, divided by the largest element if this is above 1."""
    if not expected.numel():
        return 0.0
    return float((expected - got).abs().max()) / max(1.0, float(expected.abs().max()))


def _tolerance(module: nn.Module) -> float:
    """Return the tolerance: the rounding of reordered sums grows with the root of the number of terms."""
    terms = max((each.shape[-1] for each in module.parameters() if each.ndim > 1), default=1)
    return max(TOLERANCE, torch.finfo(torch.float32).eps * terms**0.5)


def _microseconds(run: Run, inputs: Sequence[Tensor]) -> float:
    """Return the time of a call, the best of five rounds."""
    times, calls = [], TIMED if len(inputs) > 1 else 3
    run(*inputs)
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            run(*inputs)
        times.append((time.perf_counter() - started) / calls)
    return min(times) * 1e6


def _filled(tree: Tree, leaves: Iterator[Tensor]) -> Tree:
    """Return a tree of the same structure with the next leaves."""
    return next(leaves) if isinstance(tree, Tensor) else tuple(_filled(branch, leaves) for branch in tree)
