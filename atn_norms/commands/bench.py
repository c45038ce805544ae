"""Compare time and memory of every backend with torch.nn and the textbook."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atn_norms.commands.console import Json, at_home, print_json, print_table
from atn_norms.commands.output import emit
from atn_norms.errors import SpecError, not_installed

if TYPE_CHECKING:
    from atn_norms.bench import Bench, CaseResult

FULL = {
    "sizes": ((2, 60, 50, 100), (10, 68, 128, 120), (200, 512, 32, 100), (256, 1000, 32, 50)),
    "windows": (1, 25, 100),
    "threads": (1, 2),
    "budget": 20.0,
}
_COLUMNS = ("runner", "k", "best", "median", "runs", "of torch.nn", "by medians", "memory", "of torch.nn", "note")

_List = str | None
Names = "Separated by commas."


def bench(
    cells: Annotated[_List, typer.Option("--cells", metavar="LSTM,GRU,RNN", help=f"Cells. {Names}")] = None,
    norms: Annotated[
        _List,
        typer.Option("--norms", metavar="KIND,...", help="Norms: a kind, or {kind: rms, eps: 1e-3}. " + Names),
    ] = None,
    placements: Annotated[
        _List,
        typer.Option("--placements", metavar="{...},...", help="Placements, such as {sum: joint}; {}: the default."),
    ] = None,
    sizes: Annotated[
        list[str] | None, typer.Option("--size", metavar="INPUT,HIDDEN,BATCH,STEPS", help="May be repeated.")
    ] = None,
    windows: Annotated[
        _List, typer.Option("--windows", metavar="K,...", help="Windows: steps, a kind, or a mapping with its options.")
    ] = None,
    threads: Annotated[_List, typer.Option("--threads", metavar="N,...", help="Numbers of threads.")] = None,
    modes: Annotated[
        _List, typer.Option("--modes", metavar="training,inference,streaming", help="Streaming: one row, step by step.")
    ] = None,
    dtype: Annotated[_List, typer.Option("--dtype", metavar="float32|float64")] = None,
    runners: Annotated[
        _List,
        typer.Option("--runners", metavar="NAME,...", help="native, reference, textbook; torch.nn always runs."),
    ] = None,
    budget: Annotated[float | None, typer.Option(metavar="SECONDS", help="Approximate time for one case.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each runner in a separate process.")] = True,
    malloc: Annotated[
        _List,
        typer.Option(
            "--malloc",
            metavar="default|keep|both",
            help="keep: freed memory stays in the process.",
        ),
    ] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="Call every runner under autocast to bfloat16.")] = False,
    input_gradient: Annotated[
        bool, typer.Option("--input-gradient", help="Compute the input's gradient in training too, as in a stack.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Four sizes, windows 1, 25, 100, threads 1 and 2; about ten minutes.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every number as CSV.", callback=at_home)
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="cuda|cpu", help="Check and time a device; with --check.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check values, gradients and races on --device, then time; seven minutes."),
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="With --check: tiny sizes, to test the check itself.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="With --check: the folder for device.csv and device.md.  [default: device-check]",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="STEM", help="Write STEM.png and STEM.svg.", callback=at_home)
    ] = None,
    as_json: Json = False,
) -> None:
    """Time torch.nn, the textbook window and each backend in turn; exit code 1 when a backend differs.

    torch.nn runs without a norm. Each backend is compared with the reference first: values, states and every gradient.
    A backend that differs is not timed. Times are the best and the median of interleaved runs.
    """
    options = {
        "cells": _entries("--cells", cells),
        "norms": _entries("--norms", norms),
        "placements": _entries("--placements", placements),
        "sizes": None if sizes is None else [_size(size) for size in sizes],
        "windows": _entries("--windows", windows),
        "threads": _numbers("--threads", threads),
        "modes": _names(modes),
        "dtype": dtype,
        "runners": _names(runners),
        "budget": budget,
        "malloc": malloc,
    }
    if check or device is not None or tiny or out is not None:
        others = options | {"csv": csv, "picture": picture}
        flags = {"autocast": autocast, "input-gradient": input_gradient, "full": full, "json": as_json}
        flags["no-memory"] = not memory
        given = [*(name for name, value in others.items() if value is not None), *(n for n, on in flags.items() if on)]
        return _check_device(device, check, tiny, out or Path("device-check"), given)
    chosen = (FULL if full else {}) | {name: value for name, value in options.items() if value is not None}
    for path in (csv, picture):
        if path is not None and not path.absolute().parent.is_dir():
            raise SpecError(position=str(path), got=f"no folder {path.parent}", expected="a folder for the file")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise not_installed("matplotlib", "ablation", path="--picture")

    from atn_norms.bench import BenchSpec, measure
    from atn_norms.specs import validate

    spec = validate(BenchSpec, {**chosen, "memory": memory, "autocast": autocast, "input_gradient": input_gradient})
    results = measure(spec, None if as_json else _print_case)
    if as_json:
        print_json(results.to_dict())
    else:
        _print_machine(results)
    if csv is not None:
        csv.write_text(results.to_csv(), encoding="utf-8")
    if picture is not None:
        from atn_norms.drawing import import_matplotlib

        import_matplotlib()
        from atn_norms.bench.picture import draw

        files = draw(results, picture)
        emit(f"picture: {', '.join(map(str, files))}", error=True)
    if results.failed:
        raise typer.Exit(1)


def _check_device(device: str | None, check: bool, tiny: bool, out: Path, given: Sequence[str]) -> None:
    """Run the device check, print each finding, and exit with 1 when a check fails; `given`: options that it lacks."""
    if device is None or not check:
        raise SpecError("--device" if check else "--check", "nothing", "--device cuda --check")
    if given:
        option = {"sizes": "size"}.get(given[0], given[0])
        raise SpecError(f"--{option}", "an option of the benchmark", "no other option than --device, --tiny and --out")

    from atn_norms.bench.device import TINY, Finding, Plan, label, run

    def show(finding: Finding) -> None:
        value = "" if finding.value is None else f" {finding.value:.3g}"
        emit(f"{finding.status}: {label(finding)}{value} {finding.note}".rstrip())

    results = run(Plan(device, **(TINY if tiny else {})), out, show)
    emit(f"{out / 'device.md'}: {len(results.findings)} findings, {len(results.failed)} failed")
    if results.failed:
        raise typer.Exit(1)


def _print_case(result: CaseResult) -> None:
    from atn_norms.bench.machine import usable_cores

    rows = []
    for row in result.rows:
        note = row.reason if row.status == "measured" else f"{row.status}: {row.reason}"
        times = (_time(row.best), _time(row.median), row.runs or "", _ratio(row.ratio), _ratio(row.ratio_of_medians))
        memory = "" if row.memory is None else f"{row.memory / 1e6:.1f} MB"
        rows.append((row.runner, row.window, *times, memory, _ratio(row.memory_ratio), note))
    print_table(str(result.case), _COLUMNS, rows)
    before, after = ("unknown" if load is None else f"{load:.1f}" for load in result.load)
    noise = "unknown" if result.noise is None else f"torch.nn's median is {_ratio(result.noise)} times its best"
    emit(f"noise: {noise}; load average {before}, then {after}")
    if max((load for load in result.load if load is not None), default=0.0) > 1.5 * (usable_cores() or 1):
        emit("the machine is busy with other work, so all ratios may be wrong; measure again on an idle one")
    emit("")


def _print_machine(results: Bench) -> None:
    machine = results.machine
    emit(f"machine: {machine['processor']}, {machine['usable_cores']} of {machine['cores']} cores, {machine['system']}")
    kernels, missing = machine["native_kernels"], machine["native_kernels_missing"]
    reason = f" ({missing})" if missing else ""
    emit(f"torch {machine['torch']}, atn-norms {machine['atn_norms']}, native kernels: {kernels}{reason}")
    emit(f"malloc: {results.malloc}")
    if results.failed:
        labels = ", ".join(dict.fromkeys(row.label for row in results.failed))
        emit(f"not timed, for the reasons above: {labels}")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip().lower() for word in text.split(",") if word.strip()]


def _entries(option: str, text: str | None) -> list[Any] | None:
    """Return kinds, numbers and mappings, separated by commas outside of brackets."""
    if text is None:
        return None
    from atn_norms.specs import value

    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    words = [part.strip() for part in parts if part.strip()]
    return [value(word, f"{option} {word}: not a YAML value") if word[0] in "{[" else _scalar(word) for word in words]


def _scalar(word: str) -> str | int:
    return int(word) if word.lstrip("-").isdigit() else word.lower()


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise SpecError(option, repr(text), "integers of at least 1, separated by commas") from None


def _size(text: str) -> list[Any]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise SpecError("--size", repr(text), "INPUT,HIDDEN,BATCH,STEPS, such as 2,60,50,100")
    return numbers
