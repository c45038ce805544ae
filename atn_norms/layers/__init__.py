"""Layers: whole stacks of a cell with torch.nn's interface, single steps, and the options that describe them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from atn_norms.layers.recurrent import Recurrent, explain
from atn_norms.layers.spec import LayerSpec, NormLike, NormSites, PlacementLike, WindowLike, WindowSites
from atn_norms.layers.torch_api import GRU, LSTM, RNN

if TYPE_CHECKING:
    from atn_norms.layers.convert import load_weights as load_weights
    from atn_norms.layers.convert import norm_parameters as norm_parameters
    from atn_norms.layers.convert import replace as replace
    from atn_norms.layers.convert import with_backend as with_backend
    from atn_norms.layers.export import StreamingStep as StreamingStep
    from atn_norms.layers.io import load as load
    from atn_norms.layers.io import save as save
    from atn_norms.layers.steps import GRUCell as GRUCell
    from atn_norms.layers.steps import LSTMCell as LSTMCell
    from atn_norms.layers.steps import RNNCell as RNNCell

_HOME = {
    "convert": ("load_weights", "norm_parameters", "replace", "with_backend"),
    "export": ("StreamingStep",),
    "io": ("load", "save"),
    "steps": ("GRUCell", "LSTMCell", "RNNCell"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LayerSpec",
    "NormLike",
    "NormSites",
    "PlacementLike",
    "RNNCell",
    "Recurrent",
    "StreamingStep",
    "WindowLike",
    "WindowSites",
    "explain",
    "load",
    "load_weights",
    "norm_parameters",
    "replace",
    "save",
    "with_backend",
]


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import a name on first access, since most programs need layers only."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
