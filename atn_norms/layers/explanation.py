"""The backend that runs each cell of a model, and the reasons, as text."""

from __future__ import annotations

from torch import nn

from atn_norms.backends import Unsupported, choose, prepared
from atn_norms.backends.costs import cost_of_reference
from atn_norms.layers.base import CellHost


def explain(model: nn.Module) -> str:
    """Return the backend that runs each cell of a layer, and the reason why each other backend does not.

    If the reference runs a cell that the native backend does not support, the text has the measured cost, and a change
    that makes the native backend run it.

    `model` is a layer, a cell, or a module that contains layers or cells. Each is listed under its name in the model.

    Errors: `TypeError` if `model` is not a module.

    >>> import atn_norms as an
    >>> print(an.explain(an.GRU(2, 4)))  # doctest: +ELLIPSIS
    GRU(2, 4, norm=none)
    cell _l0: backend 'torch'
      native: supported; used inside torch.compile
      reference: supported
      triton: unsupported: ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, CellHost):
        return _explained(model)
    layers = [f"{name}: {_explained(m)}" for name, m in model.named_modules() if isinstance(m, CellHost)]
    return "\n".join(layers) or f"{type(model).__name__} contains no atn_norms layer or cell"


def _explained(layer: CellHost) -> str:
    lines = [repr(layer)]
    for suffix in layer._suffixes:
        weights = layer.cell_weights(suffix)
        chosen = choose(layer.spec.backend, layer.cell, weights).name
        lines.append(f"cell {suffix or '(one step)'}: backend {chosen!r}")
        programs = prepared(layer.cell, weights)
        for name, program in programs.items():
            if name != chosen:
                compiled = (name, chosen, layer.spec.backend) == ("native", "torch", "auto")
                text = "supported; used inside torch.compile" if compiled else "supported"
                lines.append(f"  {name}: {f'un{text}: {program.text}' if isinstance(program, Unsupported) else text}")
        native = programs["native"]
        if chosen == "reference" and isinstance(native, Unsupported):
            lines += [f"  cost: {cost_of_reference()}", f"  change: {native.change}"]
    return "\n".join(lines)
