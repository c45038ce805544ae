"""Call a raw operator with damaged arguments: `python -m tests.native.fuzz OPERATOR SEED COUNT`.

A rejected call raises in Python. The process must not end otherwise; before each call it prints the damage.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.native.batched import a_pair
from tests.native.strategies import Pair
from tests.native.test_operators import Recorded
from tests.traced.gallery import GallerySpec

Damage = Callable[[random.Random, Any], Any]


def _resized(source: random.Random, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape) or [1]
    axis = source.randrange(len(shape))
    shape[axis] = source.choice([0, 1, shape[axis] + 1, max(shape[axis] - 1, 0), 2 * shape[axis], 1000])
    return torch.ones(shape, dtype=tensor.dtype)


def _huge(source: random.Random, tensor: Tensor) -> Tensor:
    return tensor.new_ones(()).expand([2 ** source.choice([20, 31, 40])] + [1] * (tensor.ndim - 1))


def _axes(source: random.Random, tensor: Tensor) -> Tensor:
    return source.choice([tensor.unsqueeze(0), tensor.flatten(), tensor.new_ones(()), tensor.new_ones([1] * 7)])


def _type(source: random.Random, tensor: Tensor) -> Tensor:
    kinds = [torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64]
    return tensor.to(source.choice(kinds))


def _layout(source: random.Random, tensor: Tensor) -> Any:
    floats = tensor.float() if tensor.is_floating_point() else tensor
    makers: list[Callable[[], Any]] = [
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: floats.to_mkldnn(),
        lambda: torch.quantize_per_tensor(floats, 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: tensor.new_zeros(()).expand(tensor.shape),
        lambda: torch._C._functorch._wrap_for_grad(tensor, 1),  # type: ignore[attr-defined]
        lambda: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
        lambda: torch._neg_view(tensor),
        lambda: None,
        lambda: 3,
    ]
    return source.choice(makers)()


def _released(source: random.Random, tensor: Tensor) -> Tensor:
    """Return a tensor whose storage was freed, as sharded training leaves it."""
    damaged = tensor.clone()
    damaged.untyped_storage().resize_(0)
    return damaged


def _values(source: random.Random, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.full_like(tensor, source.choice([float("nan"), float("inf"), -1e308, 1e-320]))
    return torch.full_like(tensor, source.choice([-1, 2**62, -(2**62), 7]))


def _list(source: random.Random, tensors: Any) -> Any:
    changed = list(tensors)
    match source.randrange(5):
        case 0:
            return changed[: source.randrange(len(changed) + 1)]
        case 1:
            return changed + [torch.ones(3, dtype=torch.float64)] * source.randrange(1, 4)
        case 2:
            return changed[::-1]
        case 3 if changed:
            changed[source.randrange(len(changed))] = None
        case _ if changed:
            place = source.randrange(len(changed))
            if isinstance(changed[place], Tensor):
                changed[place] = source.choice(TENSOR)(source, changed[place])
    return changed


def _text(source: random.Random, text: Any) -> str:
    words = text.split(" ")
    place = source.randrange(len(words))
    numbers = [
        "0",
        "-1",
        "1",
        "2",
        "3",
        "64",
        "65",
        "4096",
        str(2**31),
        str(2**40),
        str(2**63),
        "nan",
        "inf",
        "1e308",
        "x",
    ]
    match source.randrange(4):
        case 0:
            words[place] = source.choice(numbers)
        case 1:
            del words[place]
        case 2:
            words.insert(place, source.choice(words))
        case _:
            letters = list(words[place] or "0")
            letters[source.randrange(len(letters))] = source.choice("0123456789-,.:/xab")
            words[place] = "".join(letters)
    return " ".join(words)


TENSOR: list[Damage] = [_resized, _resized, _huge, _axes, _type, _layout, _released, _values]


def damaged(source: random.Random, arguments: list[Any]) -> tuple[list[Any], str]:
    """Return arguments of which one to three are damaged, and a description."""
    arguments, notes = list(arguments), []
    for place in source.sample(range(len(arguments)), source.choice([1, 1, 2, 3])):
        value = arguments[place]
        damage: Callable[[random.Random, Any], Any]
        if isinstance(value, Tensor):
            damage = source.choice(TENSOR)
        elif isinstance(value, list | tuple):
            damage = _list
        elif isinstance(value, str):
            damage = _text
        elif value is None:
            damage = lambda source, _: torch.ones(source.choice([0, 1, 12]), dtype=torch.float64)  # noqa: E731
        else:
            damage = lambda _, value: not value  # noqa: E731
        try:
            arguments[place] = damage(source, value)
        except Exception:  # noqa: BLE001  this tensor has no such form
            continue
        shown = arguments[place] if isinstance(arguments[place], str) else ""
        notes.append(f"{place} {damage.__name__} {shown}")
    return arguments, ", ".join(notes)


def recorded(operator: str) -> list[list[Any]]:
    """Return arguments of real calls of an operator."""
    backend = "triton" if "triton" in operator else "native"
    layers = [
        Pair("lstm", "layer", "4", ragged=True, before=2),
        Pair("gru", "rms", "cumulative"),
    ]
    if backend == "native":
        layers += more_layers()
    calls: list[list[Any]] = []
    for pair in layers:
        with Recorded() as record:
            ys, _ = pair.layer(backend).unroll(pair.xs(), pair.state(), pair.lengths())
            ys.square().sum().backward()
        for called, arguments in record.calls:
            if called.overloadpacket.__name__ == operator:
                calls.append([tree_map(detached, each) for each in arguments])
    return calls


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def more_layers() -> list[Pair]:
    """Return layers that only the native backend runs."""
    return [
        Pair("gru", "rms", "cumulative", per_gate=True, dtype=torch.float32),
        Pair("tanh", "shifted", "exponential", inputs=66, options={"bias": False}),
        Pair("lstm", "layer", "4", before=2, options={"norm": GallerySpec(name="Mixed")}),
        Pair("gru", "layer", "1", options={"norm": GallerySpec(name="TwoSided")}),
        a_pair("lstm", "batch", "4", ragged=True, before=3),
        a_pair("gru", "per step", "cumulative"),
        a_pair("lstm", "batch, layer", "4", ragged=True, before=3, options={"proj_size": 2}),
    ]


def main(operator: str, seed: str, count: str) -> None:
    calls = recorded(operator)
    source, called = random.Random(int(seed)), 0
    function = getattr(torch.ops.atn_norms, operator)
    with torch.no_grad():
        for turn in range(int(count)):
            arguments, note = damaged(source, source.choice(calls))
            print(turn, note, flush=True)
            try:
                function(*arguments)
                called += 1
            except Exception as error:  # noqa: BLE001  any error of Python is a rejection
                print("   ", type(error).__name__, str(error).split("\n")[0][:150], flush=True)
    print(f"accepted {called} of {count}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
