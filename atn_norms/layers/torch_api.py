"""Layers with the constructors of torch.nn: torch's arguments in torch's order, then our options by keyword."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from atn_norms.layers.base import torch_twin
from atn_norms.layers.classes import layer_class
from atn_norms.layers.recurrent import Recurrent
from atn_norms.layers.spec import NormLike, PlacementLike, WindowLike, make_layer_spec, to_plain

_LARGEST = 2**24  # torch overflows on larger sizes; the check of the options reports them
_DEEPEST = 1_000  # a deeper module of torch costs time and memory; the check of the options reports it
_WRONG_SIZE = "Expected hidden size {}, got {}"  # torch's own default


class _TorchLayer(Recurrent):
    """Base of the three layers: torch checks torch's arguments, then the options are checked."""

    kind: ClassVar[str]

    def _start(
        self,
        torch_options: dict[str, Any],
        own: dict[str, Any],
        cell: dict[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        torch_options, cell = to_plain(torch_options), to_plain(cell)
        depth = torch_options["num_layers"]
        small = all(not isinstance(value, int) or value < _LARGEST for value in torch_options.values())
        if small and not (isinstance(depth, int) and depth > _DEEPEST):
            torch_twin(self.kind.upper(), **torch_options, **cell)
        spec = make_layer_spec(cell={"kind": self.kind, **cell}, **torch_options, **own)
        Recurrent.__init__(self, spec, device, dtype)

    @property
    def mode(self) -> str:
        """Name of the recurrence in torch.nn: `LSTM`, `GRU`, `RNN_TANH` or `RNN_RELU`."""
        return self.__dict__["_torch_pattern"].mode

    @property
    def proj_size(self) -> int:
        """Features of the projected output; 0 without a projection, which only an LSTM can have."""
        return getattr(self.cell, "proj_size", 0)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Check the type and shape of an input with torch's code."""
        self._twin().check_input(input, batch_sizes)

    def check_hidden_size(self, hx: Tensor, expected_hidden_size: tuple[int, int, int], msg: str = _WRONG_SIZE) -> None:
        """Check the shape of a hidden state with torch's code."""
        self._twin().check_hidden_size(hx, expected_hidden_size, msg)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Check an input and its hidden state with torch's code."""
        self._twin().check_forward_args(input, hidden, batch_sizes)

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Return the expected shape of the hidden state for an input."""
        return self._twin().get_expected_hidden_size(input, batch_sizes)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Return the hidden state with its rows in another order."""
        return self._twin().permute_hidden(hx, permutation)


@layer_class("lstm")
class LSTM(_TorchLayer):
    """`torch.nn.LSTM` with norms pooled over a time window; `LSTMEquations` has the equations.

    The arguments up to `dtype` are those of `torch.nn.LSTM`. Without a norm the layer equals it.

    | option | meaning |
    |---|---|
    | `norm` | None, a kind (`"layer"`, `"batch"`, `"rms"` or a plugin's), a mapping with `kind`, or a spec |
    | `window` | k for the last k steps, including the current step; or a kind, a mapping, a spec, or a `Window` |
    | `placement` | the places of the norms (`cells.Placement`) |
    | `init` | initialization of the weights, `"torch"` or `"paper"` (`LayerSpec`) |
    | `forget_bias` | start of the forget gate's shift; None: 0 with a norm, else by `init` |
    | `backend` | `"auto"`, or the name of a backend |

    `norm` and `window` may differ between the sites: `norm={"sites": {"ih": "layer", "hh": "rms"}}`.

    Errors: those of `torch.nn.LSTM`; `SpecError` (a `ValueError`) for options that do not fit.

    >>> import torch, atn_norms as an
    >>> layer = an.LSTM(2, 60, norm="layer", window=25)
    >>> y, (h, c) = layer(torch.randn(100, 50, 2))
    >>> y.shape, h.shape
    (torch.Size([100, 50, 60]), torch.Size([1, 50, 60]))
    """

    kind = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormLike = None,
        window: WindowLike = 1,
        placement: PlacementLike = None,
        init: str = "torch",
        forget_bias: float | None = None,
        backend: str = "auto",
    ) -> None:
        self._start(
            _torch(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            _ours(norm, window, placement, init, forget_bias, backend),
            {"proj_size": proj_size},
            device,
            dtype,
        )


@layer_class("gru")
class GRU(_TorchLayer):
    """`torch.nn.GRU` with norms pooled over a time window, and the options of `LSTM`; see `GRUEquations`.

    >>> import torch, atn_norms as an
    >>> an.GRU(2, 60, norm="rms", window=25)(torch.randn(100, 50, 2))[0].shape
    torch.Size([100, 50, 60])
    """

    kind = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormLike = None,
        window: WindowLike = 1,
        placement: PlacementLike = None,
        init: str = "torch",
        forget_bias: float | None = None,
        backend: str = "auto",
    ) -> None:
        self._start(
            _torch(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            _ours(norm, window, placement, init, forget_bias, backend),
            {},
            device,
            dtype,
        )


@layer_class("rnn")
class RNN(_TorchLayer):
    """`torch.nn.RNN` with norms pooled over a time window, and the options of `LSTM`; see `RNNEquations`.

    >>> import torch, atn_norms as an
    >>> an.RNN(2, 60, nonlinearity="relu", norm="layer", window=25)(torch.randn(100, 50, 2))[0].shape
    torch.Size([100, 50, 60])
    """

    kind = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormLike = None,
        window: WindowLike = 1,
        placement: PlacementLike = None,
        init: str = "torch",
        forget_bias: float | None = None,
        backend: str = "auto",
    ) -> None:
        self._start(
            _torch(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            _ours(norm, window, placement, init, forget_bias, backend),
            {"nonlinearity": nonlinearity},
            device,
            dtype,
        )

    @property
    def nonlinearity(self) -> str:
        """The activation, `tanh` or `relu`."""
        return getattr(self.cell, "nonlinearity", "tanh")


def _torch(
    input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool, dropout: float, both: bool
) -> dict[str, Any]:
    """Return the arguments that the three classes of torch share."""
    return {
        "input_size": input_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "bias": bias,
        "batch_first": batch_first,
        "dropout": dropout,
        "bidirectional": both,
    }


def _ours(
    norm: NormLike,
    window: WindowLike,
    placement: PlacementLike,
    init: str,
    forget_bias: float | None,
    backend: str,
) -> dict[str, Any]:
    """Return the arguments that torch does not have, as options."""
    where = {} if placement is None else {"placement": placement}
    return {"norm": norm, "window": window, "init": init, "forget_bias": forget_bias, "backend": backend} | where
