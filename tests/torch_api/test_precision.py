"""Autocast, half precision and loss scaling."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import atn_norms as an
from atn_norms.layers.recurrent import _cast_carried
from tests.compare import compare
from tests.torch_api.features import feature
from tests.torch_api.test_transforms import CELLS, every_layer, every_norm

GROUP = "Mixed precision"
HALVES = (torch.bfloat16, torch.float16)
OWN_TYPE = "Computed in the type of the layer, and rounded once to the types of `torch.nn`."

every_half = pytest.mark.parametrize("half", HALVES)


def layer_of(cell: str, norm: Any = "layer", **options: Any) -> Any:
    torch.manual_seed(0)
    made = CELLS[cell](3, 4, norm=norm, window=2, **options)
    return made.eval() if norm == "batch" else made


def hidden_of(layer: Any, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    h = torch.linspace(-1, 1, layer.hidden_size).expand(*shape, -1).to(dtype)
    return (h, h) if isinstance(layer, an.LSTM) else h


def rounded(value: Any, dtype: torch.dtype) -> Any:
    return tuple(rounded(each, dtype) for each in value) if isinstance(value, tuple) else value.to(dtype)


def up(value: Any) -> Any:
    return tuple(map(up, value)) if isinstance(value, tuple) else value.float()


def result_of(cell: str, half: torch.dtype, state: torch.dtype) -> torch.dtype:
    """Return the type of results under autocast: in torch the new state of a GRU is a sum with the old one."""
    return torch.float32 if cell == "gru" and state == torch.float32 else half


@feature(GROUP, "`torch.autocast` in bfloat16 and float16", "native", OWN_TYPE)
@every_half
@every_norm
@every_layer
def test_autocast_computes_in_the_type_of_the_layer_and_rounds_once(cell, norm, half, runs):
    layer, x = layer_of(cell, norm), torch.randn(5, 2, 3).to(half)
    for hx in (None, hidden_of(layer, 1, 2), hidden_of(layer, 1, 2, dtype=half)):
        expected = layer(x.float(), None if hx is None else up(hx))
        for given in (x, x.float()):
            runs.clear()
            with torch.autocast("cpu", dtype=half):
                found = layer(given, hx)
            found[0].sum().backward()
            assert set(runs) == {"native"}
            start = given if hx is None else hx[0] if isinstance(hx, tuple) else hx
            compare(found, rounded(expected, result_of(cell, half, start.dtype)), tolerance=0)
            assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_half
@every_layer
def test_autocast_gives_the_types_of_torch(cell, half, dtype):
    """Types of outputs, states and gradients, for every type of input and initial state that torch takes."""
    # An LSTM has the types of oneDNN in bfloat16. A processor without its kernels has other types, or none.
    same = cell != "lstm" or (half == torch.bfloat16 and HAS_BFLOAT16)
    compared = 0
    for of_input in (torch.float32, half):
        for of_state in (None, torch.float32, half):
            found = []
            for layer in (getattr(nn, cell.upper())(3, 4, dtype=dtype), layer_of(cell, dtype=dtype)):
                x = torch.randn(5, 2, 3).to(of_input).requires_grad_()
                h = None if of_state is None else hidden_of(layer_of(cell), 1, 2, dtype=of_state)
                leaves = [] if h is None else [c.clone().requires_grad_() for c in (h if cell == "lstm" else (h,))]
                try:
                    with torch.autocast("cpu", dtype=half):
                        y, after = layer(x, (tuple(leaves) if cell == "lstm" else leaves[0]) if leaves else None)
                except RuntimeError:  # oneDNN has half precision on some processors only
                    assert (half == torch.float16 or (cell == "lstm" and not HAS_BFLOAT16)) and not found
                    break
                states = after if isinstance(after, tuple) else (after,)
                torch.stack([t.float().sum() for t in (y, *states)]).sum().backward()
                gradients = [each.grad for each in (x, layer.weight_hh_l0, *leaves)]
                found.append([each.dtype for each in (y, *states, *gradients) if each is not None])
                assert len(found[-1]) == 1 + len(states) + len(gradients)
            if len(found) == 2 and same:
                assert found[1] == found[0], (of_input, of_state)
                compared += 1
    assert compared >= (6 if same else 0)


STACKS: list[dict[str, Any]] = [{}, {"num_layers": 2}, {"bidirectional": True}]
# torch runs a plain LSTM with oneDNN, whose types depend on the processor, and a packed or projected one without it
TYPED = [
    (cell, packed, stack) for cell in CELLS for packed in (False, True) for stack in STACKS if cell != "lstm" or packed
]
TYPED += [("lstm", packed, stack | {"proj_size": 2}) for packed in (False, True) for stack in STACKS]


@pytest.mark.parametrize(("cell", "packed", "options"), TYPED)
@every_half
def test_autocast_of_packed_and_projected_sequences_gives_the_types_of_torch(cell, packed, options, half):
    theirs, ours = getattr(nn, cell.upper())(3, 4, **options), layer_of(cell, **options)
    for of_input in (torch.float32, half):
        for of_state in (None, torch.float32, half):
            x = torch.randn(5, 2, 3).to(of_input)
            given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x
            hx = None
            if of_state is not None:
                zeros = theirs(x.float())[1]  # the shapes
                hx = tuple(h.to(of_state) for h in zeros) if cell == "lstm" else zeros.to(of_state)
            with torch.autocast("cpu", dtype=half):
                found = [types(layer(given, hx)) for layer in (theirs, ours)]
            assert found[1] == found[0], (of_input, of_state)


def types(result: Any) -> list[torch.dtype]:
    y, after = result
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return [each.dtype for each in (y, *(after if isinstance(after, tuple) else (after,)))]


HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # whether oneDNN has its kernels on this processor


@feature(GROUP, "autocast after another layer, with packed sequences and streams", "native", OWN_TYPE)
@every_half
@every_layer
def test_autocast_takes_packed_sequences_and_streams(cell, half, runs):
    embed, layer, x = nn.Linear(2, 3), layer_of(cell), torch.randn(5, 2, 2)
    with torch.autocast("cpu", dtype=half):
        inner = embed(x)
        packed = nn.utils.rnn.pack_padded_sequence(inner, torch.tensor([5, 3]))
        y, _ = layer(packed)
        _, state = layer.unroll(inner[:2])
        state = tuple(tuple((tuple(c.to(half) for c in carried), norms) for carried, norms in one) for one in state)
        more, _ = layer.unroll(inner[2:], state)
    assert inner.dtype == half and set(runs) == {"native"}
    exact, _ = layer(nn.utils.rnn.pack_padded_sequence(inner.float(), torch.tensor([5, 3])))
    compare(y.data, exact.data.to(half), tolerance=0)
    expected, _ = layer.unroll(inner[2:].float(), _cast_carried(state, torch.float32))
    compare(more, expected.to(half), tolerance=0)


@every_layer
def test_the_reference_computes_the_same_under_autocast(cell):
    """The type of the products must not depend on the backend."""
    x, found = torch.randn(5, 2, 3), {}
    for backend in ("native", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[backend] = layer_of(cell, backend=backend)(x)
    compare(up(found["native"]), up(found["reference"]), tolerance=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("half", HALVES)
@every_layer
def test_autocast_without_a_norm_is_torch_s(cell, half):
    theirs = getattr(nn, cell.upper())(3, 4)
    ours, x = an.replace(copy.deepcopy(theirs)), torch.randn(5, 2, 3).to(half)
    with torch.autocast("cpu", dtype=half):
        expected, found = theirs(x), ours(x)
    assert expected[0].dtype == found[0].dtype
    compare(found, expected, tolerance=0)


@pytest.mark.parametrize("half", HALVES)
@every_layer
def test_without_autocast_a_half_input_is_rejected_as_by_torch(cell, half):
    with pytest.raises(Exception, match="dtype|type") as theirs:
        getattr(nn, cell.upper())(3, 4)(torch.randn(5, 2, 3).to(half))
    with pytest.raises(type(theirs.value), match="dtype|type"):
        layer_of(cell)(torch.randn(5, 2, 3).to(half))


@feature(
    GROUP,
    "autocast of `LSTMCell`, `GRUCell`, `RNNCell`",
    "reference",
    "Products in half precision and the types of results are those of `torch.nn`.",
)
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@every_half
@every_layer
def test_autocast_of_single_steps_has_the_types_of_torch(cell, half, norm):
    name = f"{cell.upper()}Cell"
    theirs, ours = getattr(nn, name)(3, 4), getattr(an, name)(3, 4, norm=norm, window=2 if norm else 1)
    if norm is None:
        ours.load_state_dict(theirs.state_dict())
    x, eps = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.finfo(half).eps
    for of_input in (torch.float32, half):
        for of_state in (None, torch.float32, half):
            h = None if of_state is None else torch.linspace(-1, 1, 4).expand(5, 4).to(of_state)
            hx, state = h, None
            if h is not None:
                hx = (h, h) if cell == "lstm" else h
                carried, norms = ours.initial(5)
                state = (tuple(h for _ in carried), norms)
            exact = ours(x.to(of_input).float(), None if state is None else (up(state[0]), state[1]))[0]
            with torch.autocast("cpu", dtype=half):
                expected = theirs(x.to(of_input), hx)
                found, after = ours(x.to(of_input), state)
            first = expected[0] if cell == "lstm" else expected
            assert found.dtype == first.dtype
            assert [c.dtype for c in after[0]] == [e.dtype for e in (expected if cell == "lstm" else (expected,))]
            if norm is None:
                compare(found.float(), first.float(), tolerance=4 * eps)
            # products of 3 and 4 numbers, each rounded; a norm divides by a spread of about 0.5, and adds two of them
            compare(found.float(), exact.float(), tolerance=16 * eps)
            found.float().sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}


@feature(GROUP, "`torch.amp.GradScaler`", "native")
@every_norm
@every_layer
def test_a_scaled_step_is_a_plain_step(cell, norm, runs):
    ends = []
    for scaled in (False, True):
        layer, x = layer_of(cell, norm), torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = layer(x)[0].float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ends.append([p.detach() for p in layer.parameters()])
    assert set(runs) == {"native"}
    compare(ends[1], ends[0], tolerance=1e-6)


@feature(
    GROUP,
    'layers in bfloat16 and float16, `init="paper"` included',
    "native",
    "Statistics stay in float64.",
)
@every_half
@every_layer
def test_the_paper_s_initialization_in_half_precision(cell, half, runs):
    layer = CELLS[cell](3, 4, norm="layer", window=2, init="paper", dtype=half)
    w = layer.weight_ih_l0.detach().float()
    # each of 3 products of 8 bits (bfloat16) or 11 bits, summed over at most 16 rows
    compare(w.T @ w, torch.eye(3), tolerance=16 * torch.finfo(half).eps)
    assert layer(torch.randn(5, 2, 3).to(half))[0].dtype == half
    assert set(runs) == {"native"}
