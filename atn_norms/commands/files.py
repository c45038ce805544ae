"""Write a commented study file, and the schema that an editor uses to complete and check it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from atn_norms.commands.output import emit
from atn_norms.errors import SpecError, unknown
from atn_norms.files import write_whole

MODELINE = "# yaml-language-server: $schema={schema}\n"


def init(
    study: Annotated[
        str, typer.Argument(metavar="[STUDY]", help="Name of a ready-made study, or the file to write.")
    ] = "study.yaml",
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="File to write; by default the name of the study with `.yaml`."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Write a commented study file, and in the same folder its JSON schema for editors.

    A single argument is the name of a ready-made study, or the file to write for the study `quick`.
    """
    from atn_norms.ablation.grid import presets

    if file is None:
        name, file = (study, Path(f"{study}.yaml")) if presets.is_name(study) else (presets.DEFAULT, Path(study))
    else:
        name = study
    content = presets.text(name)
    if file.suffix not in (".yaml", ".yml"):
        got = f"the ending {file.suffix!r}"
        raise SpecError(position=str(file), got=got, expected=".yaml or .yml, since the file has comments")
    beside = file.with_suffix(".schema.json")
    present = [str(path) for path in (file, beside) if path.exists()]
    if present and not force:
        cure = "Choose another name, or overwrite with --force"
        raise SpecError(position=" and ".join(present), got="an existing file", expected="a new name", detail=cure)
    text = MODELINE.format(schema=beside.name) + content
    write_new(beside, schema_text("study"), force)
    write_new(file, text, force)
    emit(f"wrote {file} and {beside}\nnext: edit {file}, then run `{shlex.join(['atn-norms', 'ablate', str(file)])}`")


def schema_text(what: str) -> str:
    """Render the JSON schema of a `study` or a `model` file."""
    from atn_norms.specs import schema

    if what == "study":
        from atn_norms.ablation.grid.study import StudySpec as described
    elif what == "model":
        from atn_norms.layers import LayerSpec as described
    else:
        raise SpecError.of([unknown("schema", what, ["study", "model"])])
    return json.dumps(schema(described), indent=2, ensure_ascii=False) + "\n"


def write_new(path: Path, text: str, force: bool = False) -> None:
    """Write a file atomically; an existing file is kept unless `force` is set."""
    try:
        write_whole(path, text.encode(), keep=not force)
    except OSError as error:
        raise SpecError(position=str(path), got=str(error.strerror), expected="a writable file") from error
