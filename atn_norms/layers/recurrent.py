"""A stack of any cell, in one or both directions, over whole sequences."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from atn_norms.assorted_time import checked_lengths
from atn_norms.backends import CellInputs, Program, describe, select
from atn_norms.backends.base import Selected
from atn_norms.cells import CellWeights
from atn_norms.cells.base import autocasts
from atn_norms.errors import mismatch
from atn_norms.layers.base import CellHost, torch_options, torch_twin
from atn_norms.layers.classes import layer_class
from atn_norms.layers.spec import LayerSpec, make_layer_spec
from atn_norms.pytree import Tree, describe_structure


@layer_class()
class Recurrent(CellHost):
    """Run any cell over a sequence: `forward` matches torch.nn; `unroll` exposes the state.

    | symbol | meaning | shape |
    |---|---|---|
    | `x` | input; `[B, T, D]` with `batch_first`, `[T, D]` unbatched, or a `PackedSequence` | `[T, B, D]` |
    | `hx` | torch's hidden state: h, or (h, c), for L layers and 1 or 2 directions | `[L * directions, B, R]` |
    | `state` | hidden states and windows: `state[layer][direction] = (carried, norms)` | axis 0 of every leaf: B |
    | `lengths` | number of unmasked steps of each row, 0 to T | `[B]`, int |
    | `y` | output, 0 beyond a row's length | `[T, B, directions * R]` |

    Without a norm, `torch.nn` runs the layer: keys of the state dict, numbers and errors are the same.

    Errors: those of torch.nn for a wrong shape or type; `ValueError` for lengths or a state that do not fit.

    >>> import torch, atn_norms as an
    >>> layer = an.GRU(3, 8, norm="rms", window=5)
    >>> y, state = layer.unroll(torch.randn(20, 4, 3))
    >>> y, state = layer.unroll(torch.randn(1, 4, 3), state)  # one more step of the same stream
    >>> y.shape
    torch.Size([1, 4, 8])
    """

    def __init__(
        self,
        spec: LayerSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__(spec)
        directions = ("", "_reverse")[: spec.directions]
        cells = {f"_l{n}{end}": spec.layer_inputs(n) for n in range(spec.num_layers) for end in directions}
        self._register(cells, parameters, {"device": device, "dtype": dtype})
        self._programs: dict[str, Selected] = {}
        for place, weights in enumerate(self._cells()):
            self._selected(place, weights)
        self._prepare_twin()

    @classmethod
    def from_spec(
        cls,
        spec: LayerSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> Self:
        """Build a layer of this class from its options, with `parameters` by torch's names or fresh ones."""
        layer = cls.__new__(cls)
        Recurrent.__init__(layer, spec, device, dtype, parameters)
        return layer

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, and describe the norms in it, since a compiler cannot do this later."""
        super().train(mode)
        if self.spec.backend != "reference":
            for suffix in self._suffixes:  # no weight is read: a parametrization may draw random numbers
                describe(self.cell, self.cell_weights(suffix, {"": torch.empty(0)}))
        return self

    @property
    def num_layers(self) -> int:
        """Number of stacked layers."""
        return self.spec.num_layers

    @property
    def batch_first(self) -> bool:
        """True for batched input and output `[B, T, ...]`; may be assigned, as in torch.nn."""
        return self.spec.batch_first

    @batch_first.setter
    def batch_first(self, value: bool) -> None:
        self._set_option("batch_first", value)

    @property
    def dropout(self) -> float:
        """Probability of dropping an output of any layer but the last, in training; may be assigned."""
        return self.spec.dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        self._set_option("dropout", value)

    @property
    def bidirectional(self) -> bool:
        """True if a second cell reads each sequence from its end."""
        return self.spec.bidirectional

    @property
    def output_size(self) -> int:
        """Features of the output: R, or 2 R if bidirectional."""
        return self.cell.output_size * self.spec.directions

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Weights and biases as in torch.nn: one list for each layer and direction, without norms."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _all_weights(self) -> list[list[str]]:
        """Names of `all_weights`, as in torch.nn; code that initializes forget biases reads them."""
        names = self.cell.shapes(1, self.bias)
        return [[name + suffix for name in names] for suffix in self._suffixes]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        """Flat list of weights and biases, as in torch.nn; computed at every access."""
        return [getattr(self, name) for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Compact the weights for torch's fused kernels, if these run the layer."""
        if self._delegates():
            self._twin().flatten_parameters()

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Return outputs and last hidden state, as torch.nn does; every window starts empty, as in the paper."""
        if self._delegates():
            return self._twin().forward(input, hx)
        x = input
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, hx)
        batched = self._checked_dims(x)
        given = x if batched else x.unsqueeze(self._batch_axis)
        if hx is not None:
            hx = self._batched_hx(hx, batched)
        cells = self._cells()
        self._check_shapes(cells, given, hx, None)
        xs = self._time_first(given)
        if xs.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        ys, state = self._run(cells, xs, self._fresh(cells, xs, hx), None, keep_state=False)
        last = _hidden(state)
        return self._as_given(ys, batched), last if batched else _each(lambda h: h.squeeze(1), last)

    def unroll(
        self, x: Tensor, state: Tree | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tree]:
        """Run with explicit state: pass the returned state to the next call, to stream or to train on segments.

        A sequence in segments gives the result of the whole sequence. A padded row gives the result of the row alone.
        `state` comes from `unroll` or `initial`. Use `detach` on it to truncate back-propagation.

        After a step of the optimizer, the windows in `state` hold statistics of the old weights. The output then
        depends on the scale of the weights, which it does not with empty windows (docs/mathematics.md).
        `initial(batch, hidden(state))` keeps the hidden state and starts with empty windows.

        Hooks of pruning, `weight_norm` and `spectral_norm` run before the first step; other hooks do not run.

        Errors: `ValueError` for a carried state of a bidirectional layer, for T = 0, and for lengths or a state that do
        not fit. The reverse direction starts at the end of the sequence, so its state cannot be continued.
        """
        if isinstance(x, PackedSequence):
            expected = "a padded tensor with `lengths`, or packed input to `forward`"
            raise TypeError(mismatch("x", "a PackedSequence", expected))
        if state is not None and self.bidirectional:
            expected = "state=None with whole sequences, since the reverse direction starts at the end of the sequence"
            raise ValueError(mismatch("state", "a state for a bidirectional layer", expected))
        batched = self._checked_dims(x)
        given = x if batched else x.unsqueeze(self._batch_axis)
        self.recompute_weights()
        cells = self._cells()
        self._check_shapes(cells, given, None, None)
        xs = self._time_first(given)
        if xs.shape[0] == 0:
            raise ValueError(mismatch("x", f"shape {list(x.shape)}", "at least one time step"))
        if lengths is not None:
            lengths = checked_lengths(lengths, xs.shape[0], xs.shape[1]).to(xs.device)
        if state is None:
            state = self._fresh(cells, xs, None)
        else:
            self._check_state(cells, state, xs.shape[1])
        ys, state = self._run(cells, xs, state, lengths)
        return self._as_given(ys, batched), state

    def initial(self, batch: int, hx: Any = None) -> Tree:
        """Return the state before the first step: empty windows, and the hidden state `hx` or zeros."""
        return self._initial(self._cells(), batch, hx, shown=True)

    def _cells(self) -> list[CellWeights]:
        """Return the weights and norms of every cell, in the order of layers and directions."""
        return [self.cell_weights(suffix) for suffix in self._suffixes]

    def _fresh(self, cells: list[CellWeights], xs: Tensor, hx: Any) -> Tree:
        """Return the state before the first step of a call; under autocast, zeros have the type of the input."""
        state = self._initial(cells, xs.shape[1], hx, shown=False)
        mixed = hx is None and autocasts(xs.device.type)
        return _cast_carried(state, xs.dtype) if mixed else state

    def _initial(self, cells: list[CellWeights], batch: int, hx: Any, shown: bool) -> Tree:
        carried = None if hx is None else (hx,) if isinstance(hx, Tensor) else hx
        wanted, depth = len(self.cell.carried), len(cells)
        if carried is not None and not (
            isinstance(carried, (tuple, list))
            and len(carried) == wanted
            and all(isinstance(c, Tensor) and c.ndim == 3 and c.shape[0] == depth for c in carried)
        ):
            got = describe_structure(tuple(carried)) if isinstance(carried, (tuple, list)) else type(carried).__name__
            names = ", ".join(self.cell.carried)
            raise ValueError(mismatch("hx", got, f"{names}, each [{depth}, batch, size]"))
        states = []
        for place, weights in enumerate(cells):
            own = None if carried is None else tuple(c[place] for c in carried)
            states.append(self.cell.initial(weights, batch, own, shown))
        per = self.spec.directions
        return tuple(tuple(states[first : first + per]) for first in range(0, len(states), per))

    def hidden(self, state: Tree) -> Any:
        """Return the hidden state as in torch.nn: h, or (h, c), of shape `[layers * directions, B, size]`."""
        return _hidden(state)

    def _run(
        self,
        cells: list[CellWeights],
        xs: Tensor,
        state: Tree,
        lengths: Tensor | None,
        keep_state: bool = True,
        packed: bool = False,
    ) -> tuple[Tensor, Tree]:
        """Run every layer in turn, time first; under autocast, compute in the weights' type and round the results."""
        kind, dtype = xs.device.type, cells[0].like.dtype
        if autocasts(kind):
            half, (((carried, _), *_), *_) = torch.get_autocast_dtype(kind), state
            exact = dtype == torch.float64
            results = (dtype,) if exact else self.cell.autocast_types(half, [c.dtype for c in carried], packed)
            with torch.autocast(kind, enabled=False):
                ys, state = self._run(cells, xs.to(dtype), _cast_carried(state, dtype), lengths, keep_state)
            return ys.to(results[0]), _cast_carried(state, *results)
        rest = iter(enumerate(cells))
        after = []
        for layer, before in enumerate(state):
            outputs, states = [], []
            for backward, cell_state in enumerate(before):
                place, weights = next(rest)
                program, declared = self._selected(place, weights)
                inputs = CellInputs(reversed_in_time(xs, lengths) if backward else xs, weights, declared, keep_state)
                ys, cell_state = program.run(inputs, cell_state, lengths)
                outputs.append(reversed_in_time(ys, lengths) if backward else ys)
                states.append(cell_state)
            xs = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            after.append(tuple(states))
            if layer < self.num_layers - 1:
                xs = F.dropout(xs, self.dropout, self.training)
        return xs, tuple(after)

    def _selected(self, place: int, weights: CellWeights) -> tuple[Program, tuple[Any, ...]]:
        """Return the program of a cell, which the layer keeps while its description is unchanged."""
        if torch.compiler.is_compiling():  # a compiler would guard every field of what is kept
            selected, declared = select(self.spec.backend, self.cell, weights)
            return selected.program, declared
        suffix = self._suffixes[place]
        kept = self._programs.get(suffix)
        selected, declared = select(self.spec.backend, self.cell, weights, kept)
        if selected is not kept:
            self._programs[suffix] = selected
        return selected.program, declared

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        order, back = packed.sorted_indices, packed.unsorted_indices
        if hx is not None:
            hx = _each(lambda h: h if order is None else h.index_select(1, order), hx)
        cells = self._cells()
        self._check_shapes(cells, packed.data, hx, packed.batch_sizes)
        xs, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        ys, state = self._run(cells, xs, self._fresh(cells, xs, hx), lengths.to(xs.device), packed=True)
        data = pack_padded_sequence(ys, lengths).data
        last = _each(lambda h: h if back is None else h.index_select(1, back), _hidden(state))
        return PackedSequence(data, packed.batch_sizes, order, back), last

    @property
    def _batch_axis(self) -> int:
        return 0 if self.batch_first else 1

    def _time_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.batch_first else x

    def _as_given(self, ys: Tensor, batched: bool) -> Tensor:
        y = self._time_first(ys)
        return y if batched else y.squeeze(self._batch_axis)

    def _checked_dims(self, x: Tensor) -> bool:
        if x.dim() not in (2, 3):
            found = f"{x.dim()}D tensor" if self.cell.torch_name == "RNN" else f"{x.dim()}D"  # torch's own words
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {found} instead")
        return x.dim() == 3

    def _batched_hx(self, hx: Any, batched: bool) -> Any:
        wanted, every = 3 if batched else 2, [hx] if isinstance(hx, Tensor) else hx
        if not all(isinstance(h, Tensor) for h in every):
            expected = f"{', '.join(self.cell.carried)} as tensors; `unroll` takes a state of `unroll`"
            raise TypeError(mismatch("hx", describe_structure(hx), expected))
        dims = [h.dim() for h in every]
        if any(d != wanted for d in dims):
            kind = "batched 3-D" if batched else "unbatched 2-D"
            names = ("hx",) if len(dims) == 1 else ("hx", "cx")
            found = f"{dims[0]}-D tensor" if len(dims) == 1 else f"({', '.join(f'{d}-D' for d in dims)}) tensors"
            raise RuntimeError(f"For {kind} input, {' and '.join(names)} should also be {wanted}-D but got {found}")
        return hx if batched else _each(lambda h: h.unsqueeze(1), hx)

    def _check_shapes(self, cells: list[CellWeights], x: Tensor, hx: Any, batch_sizes: Tensor | None) -> None:
        """Run the checks of torch for a cell that torch has; the input must be on the device of the layer."""
        like = cells[0].like
        if x.device != like.device:
            raise RuntimeError(mismatch("x", f"a tensor on {x.device}", f"the device of the layer, {like.device}"))
        fits = x.dtype == like.dtype and x.shape[-1] == self.input_size and x.dim() == 3
        if fits and hx is None and batch_sizes is None:
            return  # torch's checks would pass, more slowly
        if self.cell.torch_name is None or torch.compiler.is_compiling():  # a compiler cannot trace the twin
            if x.shape[-1] != self.input_size:
                raise RuntimeError(mismatch("x", f"{x.shape[-1]} features", f"input_size, {self.input_size}"))
            if not x.is_floating_point():
                raise ValueError(mismatch("x", str(x.dtype), "a floating-point type"))
            return
        twin = self._twin([like])  # torch's checks read the type of the first weight alone
        twin.check_input(x, batch_sizes)
        if hx is not None:
            twin.check_forward_args(x, hx, batch_sizes)
            for h in [hx] if isinstance(hx, Tensor) else hx:
                if h.dtype != like.dtype and not autocasts(like.device.type):
                    raise RuntimeError(mismatch("hx", str(h.dtype), f"the type of the layer, {like.dtype}"))

    def _check_state(self, cells: list[CellWeights], state: Tree, batch: int) -> None:
        per = self.spec.directions
        layers = state if isinstance(state, tuple) else ()
        fitting = [layer for layer in layers if isinstance(layer, tuple) and len(layer) == per]
        if len(layers) != self.num_layers or len(fitting) != len(layers):
            expected = "a state that `unroll` or `initial` returned"
            raise ValueError(mismatch("state", describe_structure(state), expected))
        for weights, cell in zip(cells, [cell for layer in layers for cell in layer], strict=True):
            self.cell.check_state(weights, cell, batch)

    def _delegates(self) -> bool:
        """Return True if torch's module runs the layer; a compiler traces the functions of torch instead."""
        unnormed = not any(name.startswith("norm_") and norm is not None for name, norm in self._modules.items())
        torch_has_it = self.cell.torch_name is not None and self.spec.backend in ("auto", "torch")
        return unnormed and torch_has_it and not torch.compiler.is_compiling()

    def _prepare_twin(self) -> None:
        """Build torch's module for `_twin` once; no call changes it, so replicas in threads may share it."""
        if self.cell.torch_name is not None:
            with warnings.catch_warnings(action="ignore"):  # torch warned when the layer was built
                self.__dict__["_torch_pattern"] = torch_twin(self.cell.torch_name, **torch_options(self.spec))

    def _twin(self, weights: list[Tensor] | None = None) -> Any:
        """Return torch's module with the same options and `weights`, or else those of this layer, for one call."""
        pattern, weights = self.__dict__["_torch_pattern"], self._flat_weights if weights is None else weights
        twin = object.__new__(type(pattern))
        twin.__dict__.update(pattern.__dict__, training=self.training, _flat_weights=weights)
        return twin

    def _set_option(self, name: str, value: Any) -> None:
        self._take_options(make_layer_spec(**dict(self.spec) | {name: value}))
        self._prepare_twin()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_torch_pattern"} | {"_programs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare_twin()


def _hidden(state: Tree) -> Any:
    """Return the hidden state as in torch.nn; a subclass may use the name `hidden` for a state."""
    cells = [cell for layer in state for cell in layer]
    h, *others = (torch.stack(leaves) for leaves in zip(*(cell[0] for cell in cells), strict=True))
    return (h, *others) if others else h


def _cast_carried(state: Tree, *dtypes: torch.dtype) -> Tree:
    """Return a state with hidden states in one type, or one type for each tensor of a cell; statistics stay as is."""

    def cast(carried: Tree) -> Tree:
        return tuple(c.to(dtype) for c, dtype in zip(carried, dtypes * len(carried), strict=False))

    return tuple(tuple((cast(carried), norms) for carried, norms in layer) for layer in state)


def reversed_in_time(xs: Tensor, lengths: Tensor | None) -> Tensor:
    """Return time-first `xs` `[T, B, ...]` with each row reversed up to its length; padding keeps its place."""
    if lengths is None:
        return xs.flip(0)
    time = torch.arange(xs.shape[0], device=xs.device).unsqueeze(1)
    mirrored = torch.where(time < lengths, lengths - 1 - time, time)
    return xs[mirrored, torch.arange(xs.shape[1], device=xs.device)]


def _each(function: Any, hx: Any) -> Any:
    return function(hx) if isinstance(hx, Tensor) else tuple(function(h) for h in hx)
