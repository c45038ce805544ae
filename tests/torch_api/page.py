"""Write docs/compatibility.md from the marks of the tests: `python -m tests.torch_api.page`."""

from importlib import import_module
from pathlib import Path
from typing import Any

from _pytest.mark import ParameterSet

from tests.torch_api.features import GROUPS, Feature

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
MODULES = ("transforms", "precision", "surface", "convert", "compile", "distributed", "limits")
INTRODUCTION = """\
# Compatibility with PyTorch

This page lists features of PyTorch and the code that runs a layer in each of them. Every row is a test in
`tests/torch_api`. After a change of a test, `python -m tests.torch_api.page` writes the page again.

| works on | meaning |
|---|---|
| native | the kernels of {doc}`backends` run the layer |
| reference | the loop in plain PyTorch runs the layer, with the same numbers and more slowly |
| torch | torch's own code runs |
| warning, refused | the message has the reason and the alternative |
| False | the value of the expression |

The last column lists the parameters of the test, which runs small layers on the CPU. A row without cells or norms has
one or two examples. The conformance tests of {doc}`conformance` compare all cells, norms and windows in plain calls.
The tests run with torch 2.13, the lowest version that the package allows, and were run with torch 2.14.1 too.

{doc}`layers` has the recipes: optimizers, weight decay, checkpoints, mixed precision, export. {doc}`performance` has
the times of per-sample gradients and of compilation.

The last section, *Limits of torch.nn*, also applies to layers without a norm, except where a row above or its note
differs.
"""


def rows() -> dict[str, dict[Feature, list[str]]]:
    """Return the features of all tests and the parameters of their tests, section by section, in order of the files."""
    found: dict[str, dict[Feature, list[str]]] = {group: {} for group in GROUPS}
    for module in MODULES:
        for test in vars(import_module(f"tests.torch_api.test_{module}")).values():
            for row in getattr(test, "features", ()):
                found[row.group].setdefault(row, parameters(test))
    return found


def parameters(test: Any) -> list[str]:
    """Return the parameters of a test, each with its values."""
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return [f"{named(mark.args[0])} {', '.join(f'`{named(value)}`' for value in mark.args[1])}" for mark in marks]


def named(value: Any) -> str:
    """Return a parameter as the table prints it."""
    value = value.values[0] if isinstance(value, ParameterSet) else value
    if isinstance(value, tuple):
        return " ".join(map(named, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, {}) else str(value).removeprefix("torch.")


def text() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for group, features in rows().items():
        parts.append(f"## {group}\n\n| in torch | works on | note | tested with |\n|---|---|---|---|")
        for row, values in features.items():
            parts[-1] += f"\n| {row.name} | {row.runs} | {row.note} | {'; '.join(values)} |"
        parts[-1] += "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
