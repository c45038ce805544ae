"""Pairs of one layer on the native and the reference backend, and the outcome of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import atn_norms as an
from atn_norms.backends.native.library import unavailable
from tests.compare import compare
from tests.laws.strategies import leaves, level, stirred

# Kernels that exist but do not load must fail, not skip.
needs_kernels = pytest.mark.skipif("not compiled" in str(unavailable()), reason=str(unavailable()))

# Sums in another order differ by their length times 1e-16; a norm of few features magnifies that at most 316 times
# (1 / sqrt(eps)) at each of a dozen steps, most of which contract.
EXACT = 1e-10

CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (an.LSTM, {}),
    "gru": (an.GRU, {}),
    "tanh": (an.RNN, {"nonlinearity": "tanh"}),
    "relu": (an.RNN, {"nonlinearity": "relu"}),
}
RMS_SHIFTED = {"kind": "rms", "bias": True}
NORMS: dict[str, Any] = {
    "layer": "layer",
    "rms": "rms",
    "shifted": RMS_SHIFTED,
    "hh": {"sites": {"hh": "layer"}},
    "ih": {"sites": {"ih": RMS_SHIFTED}},
    "c": {"sites": {"c": "layer"}},
    "mixed": {"sites": {"ih": "rms", "hh": {"kind": "layer", "eps": 1e-3}}},
}
PLAIN_WINDOWS: dict[str, Any] = {  # whose past has a gradient
    "1": 1,
    "2": 2,
    "4": 4,
    "100": 100,
    "cumulative": "cumulative",
    "exponential": {"kind": "exponential", "half_life": 1.5},
}
WINDOWS: dict[str, Any] = PLAIN_WINDOWS | {
    "detached": {"kind": "detached", "window": 4},
    "detached exponential": {"kind": "detached", "window": {"kind": "exponential", "half_life": 1.5}},
}


@dataclass(frozen=True)
class Pair:
    """One layer on two backends, and its inputs; `before`: steps of the initial state, None without a state."""

    cell: str = "lstm"
    norm: str = "layer"
    window: str = "4"
    hidden: int = 3
    batch: int = 2
    steps: int = 5
    inputs: int = 2
    seed: int = 0
    per_gate: bool = False
    ragged: bool = False
    before: int | None = None
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)

    def layer(self, backend: str, dtype: torch.dtype | None = None) -> Any:
        """Return the layer on a backend; parameters are rounded to `self.dtype` and stored in `dtype`."""
        torch.manual_seed(self.seed)
        make, own = CELLS[self.cell]
        placement = {"placement": {"gates": "per_gate"}} if self.per_gate else {}
        more = {"norm": NORMS[self.norm], "window": WINDOWS[self.window], "backend": backend, **placement}
        layer = make(self.inputs, self.hidden, dtype=self.dtype, **own, **(more | self.options))
        return stirred(layer, self.seed).to(dtype or self.dtype)

    def draw(self, *shape: int, seed: int = 1) -> Tensor:
        """Return normal numbers, rounded to `self.dtype`."""
        source = torch.Generator().manual_seed(self.seed + seed)
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(self.dtype)

    def xs(self) -> Tensor:
        shape = self.steps, self.batch, self.inputs
        xs = self.draw(*shape)
        return xs.transpose(0, 1).contiguous() if self.options.get("batch_first") else xs

    def lengths(self) -> Tensor | None:
        """Return ragged lengths, often including 0 and T."""
        if not self.ragged:
            return None
        source = torch.Generator().manual_seed(self.seed + 2)
        return torch.randint(-1, self.steps + 2, (self.batch,), generator=source).clamp(0, self.steps)

    def state(self, dtype: torch.dtype | None = None) -> Any:
        """Return the reference's state after `before` steps with distinct rows; the same numbers in every `dtype`."""
        if self.before is None:
            return None
        layer = self.layer("reference")
        past = self.draw(max(self.before, 1), self.batch, self.inputs, seed=3)
        past = past.transpose(0, 1) if self.options.get("batch_first") else past
        carried = [
            self.draw(layer.num_layers, self.batch, size, seed=4 + i)
            for i, size in enumerate(layer.cell.carried_sizes())
        ]
        lengths = (torch.arange(self.batch) + self.before) % (self.before + 1)
        state = an.detach(layer.unroll(past, layer.initial(self.batch, tuple(carried)), lengths)[1])
        return tuple(
            tuple((tuple(c.to(dtype or self.dtype) for c in carried), norms) for carried, norms in cells)
            for cells in state
        )


def open_state(state: Any) -> tuple[Any, list[Tensor]]:
    """Return the state with every differentiable tensor as a leaf, and these leaves."""
    opened: list[Tensor] = []

    def fresh(leaf: Tensor) -> Tensor:
        opened.append(leaf.detach().clone().requires_grad_())
        return opened[-1]

    def of_site(site: Any) -> Any:
        if not site:
            return site
        index, memory = site
        if not memory:  # a stateless normalizer
            return site
        weights, statistic = memory
        return index, (weights, tuple(fresh(leaf) for leaf in statistic))

    def of_cell(cell: Any) -> Any:
        carried, norms = cell
        return tuple(fresh(leaf) for leaf in carried), tuple(of_site(site) for site in norms)

    return tuple(tuple(of_cell(cell) for cell in layer) for layer in state), opened


@dataclass(frozen=True)
class Outcome:
    """Outputs, the leaves of the final state, and the gradients of a random functional of both."""

    ys: Tensor
    state: list[Tensor]
    gradients: list[Tensor]


def outcome(layer: Any, xs: Tensor, state: Any = None, lengths: Any = None, retain: bool = False) -> Outcome:
    """Run the layer, and compute all gradients of a functional of all results."""
    xs = xs.detach().clone().requires_grad_()
    start, opened = (None, []) if state is None else open_state(state)
    ys, after = layer.unroll(xs, start, lengths)
    loss = functional([leaf for leaf in (ys, *leaves(after)) if leaf.is_floating_point()])
    sources = [xs, *layer.parameters(), *opened]
    raw = torch.autograd.grad(loss, sources, allow_unused=True, create_graph=retain)
    gradients = [torch.zeros_like(source) if g is None else g for g, source in zip(raw, sources, strict=True)]
    return Outcome(ys.detach(), [leaf.detach() for leaf in leaves(after)], gradients)


def functional(tensors: Sequence[Tensor]) -> Tensor:
    """Return a fixed random weighted sum of all elements, in float64."""
    source = torch.Generator().manual_seed(99)
    parts = [(t.cpu().double() * torch.randn(t.shape, generator=source, dtype=torch.float64)).sum() for t in tensors]
    return torch.stack(parts).sum()


def agree(actual: Outcome, expected: Outcome, tolerance: float = EXACT) -> None:
    """Compare values and states by element, and gradients relative to the largest gradient."""
    compare(actual.ys, expected.ys, tolerance=tolerance, what="ys")
    compare(actual.state, expected.state, tolerance=tolerance, what="final state")
    largest = level(*expected.gradients)
    compare(actual.gradients, expected.gradients, tolerance=tolerance, scale=largest, what="gradient")


def check(pair: Pair, tolerance: float = EXACT) -> None:
    """Check that native equals the reference in values, states and every gradient."""
    inputs = pair.xs(), pair.state(), pair.lengths()
    agree(outcome(pair.layer("native"), *inputs), outcome(pair.layer("reference"), *inputs), tolerance)


@st.composite
def pairs(draw, windows: Sequence[str] = tuple(WINDOWS), **fixed: Any) -> Pair:
    """Draw any small case of any structure."""
    cell = draw(st.sampled_from(sorted(CELLS)))
    bidirectional = draw(st.booleans()) if "before" not in fixed else False
    named = {
        "cell": cell,
        "norm": draw(st.sampled_from([name for name in NORMS if name != "c" or cell == "lstm"])),
        "window": draw(st.sampled_from(sorted(windows))),
        "hidden": draw(st.integers(1, 20)),
        "batch": draw(st.integers(1, 20)),
        "steps": draw(st.integers(1, 7)),
        "inputs": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 2**20)),
        "per_gate": draw(st.booleans()),
        "ragged": draw(st.booleans()),
        "before": None if bidirectional else draw(st.sampled_from([None, 0, 1, 3, 6])),
    }
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "bidirectional": bidirectional,
    }
    fields: dict[str, Any] = named | {"options": options} | fixed
    return Pair(**fields)
