"""Export a saved model to a file that runs without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from atn_norms.commands.console import Json, at_home, print_json, print_table
from atn_norms.commands.output import emit
from atn_norms.errors import SpecError, nearest, one_of, with_article


def export(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A file from atn_norms.save, or a trial's folder.", callback=at_home),
    ],
    format: Annotated[str, typer.Option("--format", help="onnx, pt2 (torch.export) or aoti (compiled).")] = "onnx",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Export one time step: frame and state in, output and state out.")
    ] = False,
    length: Annotated[int | None, typer.Option(min=1, help="Time steps of a whole sequence.  [default: 100]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: the model's file name with another suffix.", callback=at_home),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a saved model, run the file, compare it with the model, and time it."""
    from atn_norms.layers.export import FORMATS, SUFFIX, WholeSequence
    from atn_norms.layers.export import export as write

    file = model / "model.safetensors" if model.is_dir() else model
    if (model / "trials").is_dir() and not file.exists():
        raise SpecError(
            "MODEL", f"{model}, a study's folder", f"the folder of one trial, such as {model / 'trials'}/ID"
        )
    if format not in FORMATS:
        near = nearest(format, FORMATS)
        raise SpecError("--format", got=repr(format), expected=one_of(FORMATS), nearest=near)
    if streaming and length is not None:
        raise SpecError("--length", f"{length} with --streaming", "no length, since a step has one frame")
    loaded = _loaded(file)
    target = out or file.with_name(file.stem + ("-step" if streaming else "") + SUFFIX[format])
    if streaming:
        module, inputs = _step(loaded, batch)
    else:
        module, inputs = WholeSequence(loaded), [_example(loaded, (length or 100, batch))]
    names = ["frame" if streaming else "sequence", *(f"state_{i}" for i in range(len(inputs) - 1))]
    done = write(module, inputs, target, format, names=names)  # pyright: ignore[reportArgumentType]
    if as_json:
        print_json(
            {
                "file": str(done.path),
                "inputs": {name: {"type": kind, "shape": list(shape)} for name, (kind, shape) in done.inputs.items()},
                "outputs": list(done.outputs),
                "difference": done.difference,
                "microseconds": done.microseconds,
            }
        )
        return
    rows = [(name, kind, " x ".join(map(str, shape)) or "scalar") for name, (kind, shape) in done.inputs.items()]
    print_table(f"{done.path}: inputs", ("name", "type", "shape"), rows)
    emit(f"\noutputs: {', '.join(done.outputs)}")
    if done.difference is not None:
        per = "frame" if streaming else "sequence"
        emit(f"largest difference from the model: {done.difference:.2g}; {done.microseconds:.0f} microseconds a {per}")
    if done.note:
        emit(done.note)


def _loaded(file: Path) -> Any:
    from atn_norms.layers import load
    from atn_norms.layers.io import foreign

    if code := foreign(file):
        expected = "a model that a command can construct"
        cure = "In Python, pass atn_norms.load(file, model) to atn_norms.layers.export.export"
        raise SpecError(
            position=str(file), got=f"{code}, whose code is not in the file", expected=expected, detail=cure
        )
    return load(file)


def _step(model: Any, batch: int) -> tuple[Any, list[Any]]:
    """Return the streaming step of a layer or of a trial's model, with example inputs."""
    from atn_norms.layers import Recurrent
    from atn_norms.layers.export import StreamingStep
    from atn_norms.tasks import Model

    if isinstance(model, Model):
        step = StreamingStep(model.layer, model.encoder, model.readout, batch=batch)
    elif isinstance(model, Recurrent):
        step = StreamingStep(model, batch=batch)
    else:
        cure = "In Python, build atn_norms.StreamingStep(layer, before, after)"
        got = with_article(type(model).__name__)
        raise SpecError("--streaming", got, "a layer, or a model of a trial", detail=cure)
    return step, [_example(model, (1, batch))[0], *step.initial()]


def _example(model: Any, shape: tuple[int, int]) -> Any:
    """Return an example input of a model; `shape` is `(steps, sequences)`."""
    import torch
    from torch import nn

    first = next((each for each in model.modules() if not list(each.children()) and list(each.parameters())), model)
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, nn.Embedding):
        return torch.zeros(shape, dtype=torch.int64)
    layer = getattr(model, "layer", model)
    features = getattr(encoder, "in_features", None) or getattr(layer, "input_size", None)
    if features is None:
        raise ValueError(f"model: got {with_article(type(model).__name__)}; expected a layer, or a model of a trial")
    if getattr(layer, "batch_first", False):
        shape = shape[1], shape[0]
    dtype = next((each.dtype for each in first.parameters()), torch.float32)
    return torch.randn((*shape, features), dtype=dtype)
