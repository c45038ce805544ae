"""Layers: whole stacks of a cell with torch.nn's interface, single steps, and the options that describe them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atn_norms.deferred import deferred_names
from atn_norms.layers.recurrent import Recurrent
from atn_norms.layers.spec import LayerSpec, NormLike, NormSites, PlacementLike, WindowLike, WindowSites
from atn_norms.layers.torch_api import GRU, LSTM, RNN

if TYPE_CHECKING:
    from atn_norms.layers.convert import load_weights as load_weights
    from atn_norms.layers.convert import norm_parameters as norm_parameters
    from atn_norms.layers.convert import replace as replace
    from atn_norms.layers.convert import with_backend as with_backend
    from atn_norms.layers.explanation import explain as explain
    from atn_norms.layers.export import StreamingStep as StreamingStep
    from atn_norms.layers.io import load as load
    from atn_norms.layers.io import save as save
    from atn_norms.layers.steps import GRUCell as GRUCell
    from atn_norms.layers.steps import LSTMCell as LSTMCell
    from atn_norms.layers.steps import RNNCell as RNNCell

# Most programs need layers only.
_HOME = {
    "convert": ("load_weights", "norm_parameters", "replace", "with_backend"),
    "explanation": ("explain",),
    "export": ("StreamingStep",),
    "io": ("load", "save"),
    "steps": ("GRUCell", "LSTMCell", "RNNCell"),
}
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
    _, __getattr__ = deferred_names(__name__, _HOME)
