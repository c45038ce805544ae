"""Write a new plugin: a distribution that installs and passes its tests and linter unchanged."""

from __future__ import annotations

import importlib.util
import re
import secrets
import shutil
import string
from importlib.resources import files
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from atn_norms.commands.console import at_home
from atn_norms.commands.output import emit
from atn_norms.errors import SpecError, short_repr, unknown

LONGEST = 24  # characters of a name, so that lines with it stay within the limit
NAME = r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*"


class Start(NamedTuple):
    """Parts of the README of a new plugin."""

    equation: str
    options: str
    use: str


STARTS = {
    "normalizer": Start(
        "    y = g * x / (m + eps),   m = mean of |x| over the features and the window",
        "| `eps` | added to the mean | 1e-5 |",
        'layer = an.LSTM(2, 60, norm={"kind": "$kind", "eps": 1e-5}, window=25)\ny, _ = layer(torch.randn(100, 8, 2))',
    ),
    "window": Start(
        "    W_t = {t - t mod k, ..., t}: unmasked steps since the current block of k began, weighted equally",
        "| `steps` | k, the steps of a block | 10 |",
        'layer = an.LSTM(2, 60, norm="layer", window={"kind": "$kind", "steps": 10})\n'
        "y, _ = layer(torch.randn(100, 8, 2))",
    ),
    "cell": Start(
        "    h' = (1 - leak) h + leak tanh(N_ih(W x + b_ih) + N_hh(U h + b_hh))",
        "| `leak` | share of the new value, in (0, 1] | 0.5 |",
        'options = {"cell": "$kind", "input_size": 2, "hidden_size": 60, "norm": "layer", "window": 25}\n'
        "layer = an.build(options)\ny, _ = layer.unroll(torch.randn(100, 8, 2))",
    ),
    "task": Start(
        "    x_t uniform in [-1, 1),   y = x_0, predicted at the last step; always predicting 0 costs 1/3",
        "| `length` | steps of a sequence | 20 |",
        "# in a study, `task: {kind: $kind, length: 20}`\n"
        'layer = an.LSTM(1, 60, norm="layer", window=25)\n'
        "y, _ = layer(torch.rand(20, 8, 1))",
    ),
}


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The kind's name, such as pmean.")],
    kind: Annotated[str, typer.Option(metavar="normalizer|window|cell|task", help="The family.")] = "normalizer",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder; default: atn-norms-NAME.", callback=at_home)
    ] = None,
) -> None:
    """Write a working plugin to edit: a distribution with one kind, its tests and a README."""
    if kind not in STARTS:
        raise SpecError.of([unknown("kind", kind, list(STARTS), path=("--kind",))])
    _require_free_name(name, kind)
    folder = Path(f"atn-norms-{name.replace('_', '-')}") if out is None else out
    written = write_whole(folder, contents(name, kind))
    emit(f"wrote {folder}: {', '.join(written)}")
    check = f"atn-norms check {name}" + (f" --family {kind}" if _in_other_families(name, kind) else "")
    emit(f'next: cd {folder}, pip install -e ".[test]", pytest, {check}')


def contents(name: str, family: str) -> dict[str, str]:
    """Return the files of a new plugin: path -> text."""
    from atn_norms import __version__

    module = "atn_norms_" + name.replace("-", "_")
    start = STARTS[family]
    values = {
        "kind": name,
        "family": family,
        "module": module,
        "distribution": "atn-norms-" + name.replace("_", "-"),
        "name": "".join(part.capitalize() for part in re.split("[-_]", name)),
        "version": ".".join(__version__.split(".")[:2]),
        "equation": start.equation,
        "options": start.options,
    }
    values["use"] = "import atn_norms as an\nimport torch\n\n" + string.Template(start.use).substitute(values)
    templates = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        ".gitignore": "gitignore.txt",
        f"src/{module}.py": f"{family}.py.txt",
        f"tests/test_{module.removeprefix('atn_norms_')}.py": f"{family}_test.py.txt",
    }
    source = files("atn_norms.commands") / "templates"
    return {
        path: string.Template((source / template).read_text(encoding="utf-8")).substitute(values)
        for path, template in templates.items()
    }


def write_whole(folder: Path, texts: dict[str, str]) -> list[str]:
    """Write a new folder atomically; return its files in order."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        cure = "Choose another folder with --out, or move this one away"
        raise SpecError(position=str(folder), got="an existing folder", expected="a new folder", detail=cure)
    target = folder.absolute()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        partial.mkdir(parents=True)
        for path, text in texts.items():
            file = partial / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        partial.rename(target)  # replaces only an empty folder; a folder created meanwhile is kept
    except OSError as error:
        raise SpecError(position=str(folder), got=str(error.strerror), expected="a writable folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return list(texts)


def _require_free_name(name: str, family: str) -> None:
    from atn_norms.backends.base import known
    from atn_norms.registry import registry

    bare = name.removeprefix("atn-norms-").removeprefix("atn_norms_")
    if bare != name:
        raise SpecError("NAME", short_repr(name), f"the name of the kind, {bare!r}, without the prefix")
    if not re.fullmatch(NAME, name) or name == "none" or len(name) > LONGEST:
        words = f"up to {LONGEST} lower-case letters and digits, a letter first, joined by '-' or '_', and not 'none'"
        raise SpecError("NAME", short_repr(name), words)
    if name in known() or (name, family) == ("python", "task"):  # `atn-norms check NAME` takes backends too
        taken = "a backend" if name in known() else "the task of a function"
        raise SpecError("NAME", f"{short_repr(name)}, the name of {taken}", "a new name")
    alone = registry.kinds(family).get(name)
    entries = registry.conflicts(family).get(name, ()) if alone is None else (alone,)
    if entries:
        sources = " and ".join(sorted(entry.distribution for entry in entries))
        raise SpecError("NAME", f"{family} {name!r}, which {sources} has", "a new name")
    module = "atn_norms_" + name.replace("-", "_")
    if importlib.util.find_spec(module) is not None:
        raise SpecError("NAME", f"{short_repr(name)}, whose module {module} is installed already", "a new name")


def _in_other_families(name: str, family: str) -> bool:
    from atn_norms.registry import FAMILIES, registry

    return any(name in registry.kinds(other) for other in FAMILIES if other != family)
