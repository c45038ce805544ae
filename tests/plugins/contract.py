"""Signatures of the plugin contract as text, for docs/contract.md.

`python -m tests.plugins.contract` writes them into the page.
"""

import inspect
import re
from pathlib import Path
from typing import Any

from atn_norms.backends import Backend, CellInputs, Program, Unsupported
from atn_norms.cells import Cell, CellSpec, CellWeights, Placement
from atn_norms.normalizers import BatchMoments, FeatureMoments, Normalizer, NormSpec
from atn_norms.plugins import Hooks
from atn_norms.registry import Registry
from atn_norms.statistics import Statistic
from atn_norms.tasks import Batch, Model, Task, TaskSpec
from atn_norms.windows import Window, WindowSpec

SUBJECTS: tuple[Any, ...] = (
    Hooks,
    Registry,
    Statistic,
    Normalizer,
    FeatureMoments,
    BatchMoments,
    NormSpec,
    Window,
    WindowSpec,
    Cell,
    CellWeights,
    Placement,
    CellSpec,
    Task,
    Batch,
    Model,
    TaskSpec,
    Backend,
    Program,
    CellInputs,
    Unsupported,
)
PAGE = Path(__file__).parents[2] / "docs" / "contract.md"
BLOCK = re.compile(r"^```text\n(class (\w+)\n.*?)^```$", re.M | re.S)


def signatures(subject: Any) -> str:
    """Return the public members of a class; `*` marks the members that a subclass must define."""
    hints = vars(subject).get("__annotations__", {})
    must = getattr(subject, "__abstractmethods__", frozenset())
    lines = [f"class {subject.__name__}"]
    for name in dict.fromkeys([*hints, *vars(subject)]):
        line = "" if name.startswith("_") else _attribute(subject, name, hints) or _method(vars(subject)[name], name)
        if line:
            lines.append(f"  {'* ' if name in must else '  '}{line}")
    return "\n".join(lines) + "\n"


def _attribute(subject: Any, name: str, hints: dict[str, Any]) -> str:
    if name not in hints:
        return ""
    if hasattr(subject, "_field_defaults"):  # a named tuple
        default = subject._field_defaults.get(name, inspect.Parameter.empty)
    elif name in getattr(subject, "model_fields", {}):
        field = subject.model_fields[name]
        default = inspect.Parameter.empty if field.is_required() else field.default
    else:
        default = vars(subject).get(name, inspect.Parameter.empty)
    annotation = re.sub(r"^ClassVar\[(.*)\]$", r"\1", _text(hints[name]))
    return f"{name}: {annotation}" + ("" if default is inspect.Parameter.empty else f" = {default!r}")


def _method(member: Any, name: str) -> str:
    if isinstance(member, property):
        assert member.fget is not None
        return f"{name}: {_text(member.fget.__annotations__['return'])}"
    function = inspect.unwrap(getattr(member, "__func__", member))
    if not inspect.isfunction(function):
        return ""
    signature = inspect.signature(function)
    parameters = [
        f"{'*' if parameter.kind is parameter.VAR_POSITIONAL else ''}{parameter.name}: {_text(parameter.annotation)}"
        + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    return f"{name}({', '.join(parameters)}) -> {_text(signature.return_annotation)}"


def _text(annotation: Any) -> str:
    return getattr(annotation, "__forward_arg__", annotation)


def refreshed(page: str) -> str:
    """Return the page with the current signatures."""
    of = {subject.__name__: subject for subject in SUBJECTS}
    return BLOCK.sub(lambda block: f"```text\n{signatures(of[block[2]])}```", page)


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
