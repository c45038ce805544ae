"""Recurrent cells as frozen equations: gate order, norm sites, and one step with explicit state."""

from atn_norms.cells.base import Cell, CellSpec, CellWeights, Placement, SiteStates, refuse
from atn_norms.cells.gru import GRUEquations, GRUSpec
from atn_norms.cells.lstm import LSTMEquations, LSTMSpec
from atn_norms.cells.rnn import RNNEquations, RNNSpec

__all__ = [
    "Cell",
    "CellSpec",
    "CellWeights",
    "GRUEquations",
    "GRUSpec",
    "LSTMEquations",
    "LSTMSpec",
    "Placement",
    "RNNEquations",
    "RNNSpec",
    "SiteStates",
    "refuse",
]
