"""Time-windowed normalization for recurrent networks: any normalizer over any window in LSTM, GRU and RNN cells."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from atn_norms.deferred import deferred_names

if TYPE_CHECKING:
    from atn_norms.assorted_time import AssortedTime as AssortedTime
    from atn_norms.cells import Cell as Cell
    from atn_norms.cells import CellSpec as CellSpec
    from atn_norms.layers import GRU as GRU
    from atn_norms.layers import LSTM as LSTM
    from atn_norms.layers import RNN as RNN
    from atn_norms.layers import GRUCell as GRUCell
    from atn_norms.layers import LayerSpec as LayerSpec
    from atn_norms.layers import LSTMCell as LSTMCell
    from atn_norms.layers import Recurrent as Recurrent
    from atn_norms.layers import RNNCell as RNNCell
    from atn_norms.layers import StreamingStep as StreamingStep
    from atn_norms.layers import explain as explain
    from atn_norms.layers import load as load
    from atn_norms.layers import load_weights as load_weights
    from atn_norms.layers import norm_parameters as norm_parameters
    from atn_norms.layers import replace as replace
    from atn_norms.layers import save as save
    from atn_norms.layers import with_backend as with_backend
    from atn_norms.normalizers import BatchNorm as BatchNorm
    from atn_norms.normalizers import LayerNorm as LayerNorm
    from atn_norms.normalizers import Normalizer as Normalizer
    from atn_norms.normalizers import NormSpec as NormSpec
    from atn_norms.normalizers import RMSNorm as RMSNorm
    from atn_norms.plugins import hookimpl as hookimpl
    from atn_norms.pytree import detach as detach
    from atn_norms.pytree import reorder as reorder
    from atn_norms.specs import build as build
    from atn_norms.statistics import Average as Average
    from atn_norms.statistics import Moments as Moments
    from atn_norms.statistics import Statistic as Statistic
    from atn_norms.tasks import TaskSpec as TaskSpec
    from atn_norms.windows import Cumulative as Cumulative
    from atn_norms.windows import Detached as Detached
    from atn_norms.windows import Exponential as Exponential
    from atn_norms.windows import Sliding as Sliding
    from atn_norms.windows import Window as Window
    from atn_norms.windows import WindowSpec as WindowSpec

__version__ = "0.1.0"

_HOME = {
    "assorted_time": ("AssortedTime",),
    "cells": ("Cell", "CellSpec"),
    "layers": (
        *("GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "LayerSpec", "RNNCell", "Recurrent", "StreamingStep"),
        *("explain", "load", "load_weights", "norm_parameters", "replace", "save", "with_backend"),
    ),
    "normalizers": ("BatchNorm", "LayerNorm", "NormSpec", "Normalizer", "RMSNorm"),
    "plugins": ("hookimpl",),
    "specs": ("build",),
    "statistics": ("Average", "Moments", "Statistic"),
    "tasks": ("TaskSpec",),
    "pytree": ("detach", "reorder"),
    "windows": ("Cumulative", "Detached", "Exponential", "Sliding", "Window", "WindowSpec"),
}
# The command line's help does not import torch.
__all__, _look_up = deferred_names(__name__, _HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # type checkers would accept any name
    __getattr__ = _look_up


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


OPERATORS = "atn_norms.backends.native.call"  # importing it registers the operators with torch


class _BeforeLoading:
    """Register the operators when a saved program is first loaded, where torch is imported after this package."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name in ("torch._export.serde.serialize", "torch._inductor.package"):
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _BeforeLoading]
            import_module(OPERATORS)


if "torch" in sys.modules:
    import_module(OPERATORS)
else:
    sys.meta_path.insert(0, _BeforeLoading)  # type: ignore[arg-type]
