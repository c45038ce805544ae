"""Layers: whole stacks of a cell with torch.nn's interface, single steps, and the options that describe them."""

from atn_norms.layers.convert import load_weights, norm_parameters, replace, with_backend
from atn_norms.layers.export import StreamingStep
from atn_norms.layers.io import load, save
from atn_norms.layers.recurrent import Recurrent, explain
from atn_norms.layers.spec import LayerSpec, NormLike, NormSites, PlacementLike, WindowLike, WindowSites
from atn_norms.layers.steps import GRUCell, LSTMCell, RNNCell
from atn_norms.layers.torch_api import GRU, LSTM, RNN

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
