"""Write docs/compatibility.md from the marks of the tests: `python -m tests.torch_api.page`."""

from importlib import import_module
from pathlib import Path

from tests.torch_api.features import GROUPS, Feature

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
MODULES = ("transforms", "precision", "surface", "convert", "compile", "distributed")
INTRODUCTION = """\
# Compatibility with PyTorch

Every row is a test in `tests/torch_api`, over every cell and norm where the norm matters. The page is generated from
the tests: run `python -m tests.torch_api.page` after a change. The tests run with torch 2.13 on the CPU.

| works on | meaning |
|---|---|
| native | the kernels of {doc}`backends` run the layer |
| reference | the loop in plain PyTorch runs the layer, with the same numbers and more slowly |
| torch | torch's own code runs |
| warning, refused | the message has the reason and the alternative |

{doc}`layers` has the recipes: optimizers, weight decay, checkpoints, mixed precision, export.
"""


def rows() -> dict[str, list[Feature]]:
    """Return the features of all tests, section by section, in the order of the files."""
    found: dict[str, list[Feature]] = {group: [] for group in GROUPS}
    for module in MODULES:
        for test in vars(import_module(f"tests.torch_api.test_{module}")).values():
            for row in getattr(test, "features", ()):
                if row not in found[row.group]:
                    found[row.group].append(row)
    return found


def text() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for group, features in rows().items():
        parts.append(f"## {group}\n\n| in torch | works on | note |\n|---|---|---|")
        parts[-1] += "".join(f"\n| {row.name} | {row.runs} | {row.note} |" for row in features) + "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
