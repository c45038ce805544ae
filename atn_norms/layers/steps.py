"""One step of a cell as a module."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from atn_norms.backends import choose
from atn_norms.cells.base import autocasts
from atn_norms.errors import mismatch
from atn_norms.layers.base import CellHost
from atn_norms.layers.spec import NormLike, PlacementLike, WindowLike, make_layer_spec
from atn_norms.normalizers import scanning
from atn_norms.pytree import Tree


class _StepCell(CellHost):
    """One step of a cell with explicit state.

    | symbol | meaning | shape |
    |---|---|---|
    | `x` | one step's input, `[D]` unbatched | `[B, D]` |
    | `state` | `(carried, norms)`; None: zeros and empty windows | axis 0 of every leaf: B |
    | `y` | the step's output | `[B, R]` |

    Parameters have the names of torch's cell modules: `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`. Norms are
    `norm_ih`, `norm_hh` and, in an LSTM, `norm_c`.

    Errors: `ValueError` for an input or a state that does not fit.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormLike = None,
        window: WindowLike = 1,
        placement: PlacementLike = None,
        init: str = "torch",
        forget_bias: float | None = None,
        **cell: Any,
    ) -> None:
        where = {} if placement is None else {"placement": placement}
        spec = make_layer_spec(
            cell={"kind": self.kind, **cell},
            input_size=input_size,
            hidden_size=hidden_size,
            bias=bias,
            norm=norm,
            window=window,
            init=init,
            forget_bias=forget_bias,
            backend="reference",
            **where,
        )
        super().__init__(spec)
        self._register({"": input_size}, None, {"device": device, "dtype": dtype})
        choose(spec.backend, self.cell, self.cell_weights(""))

    def initial(self, batch: int) -> Tree:
        """Return the state before the first step: zeros and empty windows."""
        return self.cell.initial(self.cell_weights(""), batch)

    def forward(self, x: Tensor, state: Tree | None = None) -> tuple[Tensor, Tree]:
        """Run one step; return the output and the state for the next step."""
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size:
            expected = f"[batch, {self.input_size}] or [{self.input_size}]"
            raise ValueError(mismatch("x", f"shape {list(x.shape)}", expected))
        rows = x if x.dim() == 2 else x.unsqueeze(0)
        weights = self.cell_weights("")
        if state is None:
            carried, norms = self.cell.initial(weights, rows.shape[0])  # type: ignore[misc]
            if autocasts(x.device.type):  # as in torch.nn the state has the type of the input
                carried = tuple(c.to(x.dtype) for c in carried)
            state = carried, norms
        else:
            self.cell.check_state(weights, state, rows.shape[0])
        with scanning([norm.normalizer for norm in weights.norms.values()]):
            us, state = self.cell.project(weights, rows.unsqueeze(0), state)
            y, state = self.cell.step(weights, us[0], state)
        return y if x.dim() == 2 else y.squeeze(0), state


class LSTMCell(_StepCell):
    """One step of an LSTM; `LSTMEquations` has the equations.

    >>> import torch, atn_norms as an
    >>> cell = an.LSTMCell(2, 60, norm="rms", window=5)
    >>> y, state = cell(torch.randn(8, 2))
    >>> y, state = cell(torch.randn(8, 2), state)
    >>> y.shape
    torch.Size([8, 60])
    """

    kind = "lstm"


class GRUCell(_StepCell):
    """One step of a GRU; `GRUEquations` has the equations.

    >>> import torch, atn_norms as an
    >>> an.GRUCell(2, 60, norm="layer", window=5)(torch.randn(8, 2))[0].shape
    torch.Size([8, 60])
    """

    kind = "gru"


class RNNCell(_StepCell):
    """One step of a vanilla RNN; `RNNEquations` has the equations.

    >>> import torch, atn_norms as an
    >>> an.RNNCell(2, 60, nonlinearity="relu", norm="layer", window=5)(torch.randn(8, 2))[0].shape
    torch.Size([8, 60])
    """

    kind = "rnn"
