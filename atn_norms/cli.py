"""The command line: parse arguments, call the library and print. An error is one sentence, with exit code 2."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from atn_norms.commands import bench, check, doctor, export, files, models, new_plugin, studies
from atn_norms.commands import list as list_command
from atn_norms.commands.console import example
from atn_norms.commands.output import (
    discard_results,
    emit,
    escaped_logging,
    reserved,
    separate_stdout,
    tolerate_encodings,
    unwritable_results,
)
from atn_norms.commands.signals import ignore
from atn_norms.commands.supervisor import supervised
from atn_norms.text import escape_controls

app = typer.Typer(name="atn-norms", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

# name -> (function with its help as docstring, line of the overview, examples)
COMMANDS: dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {
    "ablate": (
        studies.ablate,
        "Train and compare every point of a study.",
        ("atn-norms ablate", "atn-norms ablate study.yaml --set train.steps=500 --set seeds=5 --workers 4"),
    ),
    "resume": (studies.resume, "Resume a study.", ("atn-norms resume studies/my-study",)),
    "status": (studies.status, "Show the progress of a study.", ("atn-norms status studies/my-study",)),
    "report": (studies.report, "Rebuild the report of a study.", ("atn-norms report studies/my-study",)),
    "list": (list_command.list_kinds, "List usable kinds and their options.", ("atn-norms list normalizers windows",)),
    "plugins": (
        list_command.plugins,
        "List plugins and their status.",
        ("ATN_NORMS_DISABLE_PLUGINS=pmean atn-norms plugins",),
    ),
    "new-plugin": (
        new_plugin.new_plugin,
        "Write a new plugin.",
        ("atn-norms new-plugin pmean", "atn-norms new-plugin blocks --kind window --out ../blocks"),
    ),
    "check": (
        check.check,
        "Run the conformance tests of one kind.",
        ("atn-norms check layer", "atn-norms check sliding --set steps=25"),
    ),
    "show": (models.show, "Validate and describe a model file.", ("atn-norms show model.yaml",)),
    "export": (
        export.export,
        "Export a saved model to ONNX or torch.export.",
        (
            "atn-norms export model.safetensors --streaming",
            "atn-norms export model.safetensors --format pt2 --length 50",
        ),
    ),
    "schema": (list_command.schema, "Print a JSON schema.", ("atn-norms schema model --out model.schema.json",)),
    "init": (files.init, "Write a commented study file.", ("atn-norms init study.yaml", "atn-norms init paper-adding")),
    "bench": (
        bench.bench,
        "Compare speed and memory.",
        ("atn-norms bench", "atn-norms bench --cells gru,rnn --size 10,68,128,120 --windows 1,100 --threads 2"),
    ),
    "doctor": (doctor.doctor, "Check the environment.", ("atn-norms doctor",)),
}

for _name, (_command, _short, _examples) in COMMANDS.items():
    app.command(_name, short_help=_short, epilog=example(*_examples))(reserved(_command))


@app.callback(invoke_without_command=True, epilog=example("atn-norms init", "atn-norms ablate study.yaml"))
def about(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; accepted anywhere.")] = False,
) -> None:
    """Time-windowed normalization for recurrent networks, and ablation studies."""
    if version:
        from atn_norms import __version__

        emit(f"atn-norms {__version__}")
    elif context.invoked_subcommand is None:
        emit(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 something failed, 2 bad input, 130 interrupted.

    >>> main(["--version"])
    atn-norms 0.1.0
    0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    words = [word for word in options if word != "--debug"] + words[len(options) :]
    tolerate_encodings()
    try:
        command = typer.main.get_command(app)
        with escaped_logging(), command.make_context("atn-norms", words) as context:
            command.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 130)
    except BrokenPipeError:
        discard_results()
        return 0
    except Exception as error:  # noqa: BLE001  a plugin may raise anything, and a user wants a sentence
        error = unwritable_results() or error
        if debug:
            emit(traceback.format_exc(), end="", error=True)
        return _fail(_sentence(error), 2)


def program() -> int:
    """Run `main` in a supervised process, with standard output for results alone; later signals are ignored."""
    return supervised(_command)


def _command() -> int:
    separate_stdout()
    code = main()
    if code > 128:
        ignore()
    return code


def _fail(message: str, code: int) -> int:
    for line in escape_controls(message).split("\n"):
        emit(f"atn-norms: {line}", error=True)
    return code


def _sentence(error: Exception) -> str:
    from pydantic import ValidationError

    from atn_norms.errors import SpecError, to_spec_error

    if hasattr(error, "format_message"):  # an error of the parser
        context, cause, text = getattr(error, "ctx", None), error.__cause__, error.format_message()  # type: ignore[attr-defined]
        if isinstance(cause, ValidationError):  # a value of another type
            (problem, *_) = to_spec_error(cause).problems
            text = str(replace(problem, path=(error.param.opts[0],)))  # type: ignore[attr-defined]
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        return f"{text}{hint}"
    if str(error) and (isinstance(error, SpecError | OSError) or type(error) is ValueError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    summary = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
    return f"{summary} ({last.filename}:{last.lineno}, in {last.name}); --debug shows the traceback"
