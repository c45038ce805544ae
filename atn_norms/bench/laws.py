"""Agreement with the reference, in float64 and in the timed type: a runner that differs gets no figure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atn_norms.bench.contest import autocast
from atn_norms.bench.spec import TEXTBOOK, Case, Size
from atn_norms.bench.textbook import Textbook
from atn_norms.layers import Recurrent
from atn_norms.pytree import Tree, tree_leaves, tree_map
from atn_norms.testing import compare

# Rounding per step, times how much 1 / sqrt(variance + 1e-5) can magnify it, with room for eight roundings a step.
_MAGNIFIED = 8 * 1e-5**-0.5


@dataclass(frozen=True)
class Probe:
    """A small case: sizes, full or empty windows at the start, and full or ragged rows."""

    size: Size
    full: bool
    ragged: bool = False


PROBES = (
    Probe(Size(1, 1, 1, 3), full=False),
    Probe(Size(3, 17, 5, 7), full=False),
    Probe(Size(3, 17, 5, 7), full=True),
    Probe(Size(2, 5, 33, 4), full=True, ragged=True),
)


def broken_law(case: Case, name: str, window: int | str) -> str | None:
    """Describe where a runner differs from the reference on a case's cell, norm, mode and window; None if nowhere.

    Values, states, and the gradients of inputs, starting states and parameters are compared, in float64 and in the
    case's dtype; the reference itself is held against the textbook, where the textbook knows the norm.
    """
    for dtype in dict.fromkeys(("float64", case.dtype)):
        for probe in PROBES:
            try:
                difference = _difference(case, name, window, probe, getattr(torch, dtype))
            except Exception as error:  # noqa: BLE001  a runner that raises differs from the reference
                difference = f"it raises {type(error).__name__}: {error}"
            if difference is not None:
                start = "full windows" if probe.full else "empty windows"
                label = f"{'k =' if isinstance(window, int) else 'window'} {window}"
                return f"{case.cell}, norm {case.norm}, {label}, {probe.size}, {start}, {dtype}: {difference}"
    return None


def _difference(case: Case, name: str, window: int | str, probe: Probe, dtype: torch.dtype) -> str | None:
    case = replace(case, size=probe.size, malloc="default")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        truth = case.layer(window, "reference").build(dtype=torch.float64).train(case.mode == "training")
        _stir(truth)
        size = probe.size
        if any(getattr(module, "uses_batch_statistics", False) for module in truth.modules()):
            size = size._replace(batch=max(2, size.batch))  # one row cannot be normalized by its batch in training
        xs = _rounded(torch.randn(size.steps, size.batch, size.input, dtype=torch.float64))
        lengths = torch.randint(0, size.steps + 1, (size.batch,)) if probe.ragged else None
        if name in ("reference", TEXTBOOK):  # the textbook's memory has another form, so only empty windows compare
            return None if probe.full else _from_textbook(truth, window, xs, dtype)
        start = _filled(truth.initial(size.batch), size.batch) if probe.full else truth.initial(size.batch)
        mine = case.layer(window, name).build(dtype=dtype).train(case.mode == "training")
        mine.load_state_dict(truth.state_dict())
        expected = _outcome(truth, xs, start, lengths)
        own = tree_map(lambda leaf, like: leaf.to(like.dtype), start, mine.initial(size.batch))
        found = _compare(_outcome(mine, xs.to(dtype), own, lengths), expected, dtype, size.steps)
        return found or (None if probe.full else _as_timed(case, truth, mine, xs, dtype))


def _as_timed(case: Case, truth: Recurrent, mine: Recurrent, xs: Tensor, dtype: torch.dtype) -> str | None:
    """Compare the timed calls, which may take other paths: torch.nn's call, and the call without gradients.

    Under autocast layers compute in their own type, and round outputs and their gradients to the type of autocast.
    """
    rounding = torch.finfo(torch.bfloat16).eps if case.autocast else 0.0
    with autocast(case):
        ys = mine(xs.to(dtype))[0]
    found = _compare(_of_values(mine, ys), _of_values(truth, truth(xs)[0]), dtype, len(xs), rounding)
    if found is None:
        with torch.no_grad():
            with autocast(case):
                ys = mine(xs.to(dtype))[0]
            found = _compare({"y": ys}, {"y": truth(xs)[0]}, dtype, len(xs), rounding)
    return found


def _from_textbook(truth: Recurrent, window: int | str, xs: Tensor, dtype: torch.dtype) -> str | None:
    expected = _of_values(truth, truth(xs)[0])
    mine = truth.spec.build(dtype=dtype)
    mine.load_state_dict(truth.state_dict())
    try:
        textbook = Textbook(mine, window)
    except ValueError:
        return None  # the textbook does not have this norm
    return _compare(_of_values(mine, textbook(xs.to(dtype))[0]), expected, dtype, len(xs))


def _of_values(layer: Recurrent, ys: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((ys * _fixed(ys)).sum(), parameters, allow_unused=True)
    return {"y": ys} | {f"the gradient of {n}": g for n, g in zip(names, gradients, strict=True) if g is not None}


def _outcome(layer: Recurrent, xs: Tensor, start: Tree, lengths: Tensor | None) -> dict[str, Tensor]:
    """Return outputs, the final state, and the gradient of each source tensor."""
    xs = xs.clone().requires_grad_()
    start = tree_map(lambda leaf: leaf.clone(), start)
    ((carried, norms),), *_ = start
    starts = {f"the starting state {i}": leaf for i, leaf in enumerate(carried)}
    for site, memory in zip(layer.cell.sites, norms, strict=True):
        if memory and memory[1]:  # a stateless normalizer has an index alone
            starts |= {f"the starting window {i} at {site}": leaf for i, leaf in enumerate(memory[1][1])}
    for leaf in starts.values():
        leaf.requires_grad_()
    ys, after = layer.unroll(xs, start, lengths)
    leaves = {f"leaf {i} of the state": leaf for i, leaf in enumerate(tree_leaves(after))}
    sources = {"the input": xs, **starts, **dict(layer.named_parameters())}
    results = [result for result in (ys, *leaves.values()) if result.requires_grad]
    loss = torch.stack([(result.double() * _fixed(result)).sum() for result in results]).sum()
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    pairs = zip(sources.items(), gradients, strict=True)
    return {"y": ys, **leaves} | {
        f"the gradient of {name}": torch.zeros_like(source) if gradient is None else gradient
        for (name, source), gradient in pairs
    }


def _compare(
    mine: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, steps: int, rounding: float = 0.0
) -> str | None:
    """Return the first difference beyond rounding, relative to the largest element of its tensor, or None.

    `rounding` is the relative error of outputs and their gradients that are rounded to a shorter type.
    """
    tolerance = _MAGNIFIED * steps * torch.finfo(dtype).eps + rounding
    for name, value in expected.items():
        if name not in mine:
            return f"{name}: got nothing; expected shape {list(value.shape)}"
        right = value.detach().double()
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        try:
            compare(mine[name].double(), right, tolerance=tolerance, scale=scale, what=name)
        except AssertionError as error:
            return str(error)
    return None


@torch.no_grad()
def _stir(layer: Recurrent) -> None:
    """Move parameters away from their initial values, so that a missing gain or shift is visible."""
    for parameter in layer.parameters():
        parameter.copy_(_rounded(parameter + 0.3 * torch.randn_like(parameter)))


def _filled(state: Tree, batch: int) -> Tree:
    """Return a state in mid-sequence: every window is full of random statistics."""

    def memory_of(memory: Any) -> Any:
        if not memory or not memory[1]:
            return memory
        index, (weights, leaves) = memory
        seen = tree_map(lambda leaf: _rounded(0.5 + torch.rand_like(leaf)), leaves)
        mask = 1 if weights.shape[0] == batch else batch  # a norm over the batch counts its rows
        return index + 1000, (torch.full_like(weights, mask), seen)

    def cell_of(cell: Any) -> Any:
        carried, norms = cell
        return tuple(_rounded(0.5 * torch.randn_like(c)) for c in carried), tuple(memory_of(each) for each in norms)

    return tuple(tuple(cell_of(cell) for cell in layer) for layer in state)


def _fixed(like: Tensor) -> Tensor:
    """Return the same random numbers for every tensor of a shape."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _rounded(tensor: Tensor) -> Tensor:
    """Round to float32, so that both types have equal inputs."""
    return tensor.float().to(tensor.dtype)
