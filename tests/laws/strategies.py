"""Hypothesis strategies of the property tests: seeds, shapes, windows, dtypes and regimes, but no arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import atn_norms as an
from tests import oracle

BASES = ("layer", "rms", "batch")
CELLS = ("LSTM", "GRU", "RNN")
STEPS = {"LSTM": oracle.lstm, "GRU": oracle.gru, "RNN": oracle.rnn}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
REGIMES = ("normal", "offset", "spike", "constant", "flat", "tiny", "huge", "drifting")
NORMS = {"layer": "LayerNorm", "rms": "RMSNorm", "batch": "BatchNorm"}
KINDS: tuple[oracle.Window, ...] = (("sliding", 1), ("sliding", 3), ("cumulative",), ("exponential", 1.5))


def sequence(regime: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return one sequence [T, B, D] in float64."""
    steps = shape[0]
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=source, dtype=torch.float64)
    if regime == "offset":
        return 1e4 + 1e-2 * noise
    if regime == "spike":
        noise[steps // 3] *= 1e6
        return noise
    if regime == "constant":
        return torch.full(shape, 1234.5678, dtype=torch.float64)
    if regime == "flat":  # every row is constant over its features, with a different constant at every step
        return noise[..., :1].expand(shape).clone()
    if regime == "tiny":
        return 1e-20 * noise
    if regime == "huge":
        return 1e30 * noise
    if regime == "drifting":
        return torch.linspace(0, 1e4, steps, dtype=torch.float64)[:, None, None] + noise
    return noise


windows = st.one_of(
    st.tuples(st.just("sliding"), st.sampled_from([1, 2, 3, 5, 16, 100])),
    st.just(("cumulative",)),
    st.tuples(st.just("exponential"), st.sampled_from([0.5, 2.0, 10.0])),
)
seeds = st.integers(0, 2**31 - 1)


def window(kind: oracle.Window) -> Any:
    """Return the package's window for the oracle's description."""
    if kind[0] == "sliding":
        return an.Sliding(int(kind[1]))
    return an.Cumulative() if kind[0] == "cumulative" else an.Exponential(kind[1])


@dataclass(frozen=True)
class Case:
    """One normalizer over one window, and its input sequence."""

    seed: int
    steps: int
    batch: int
    features: int
    base: str
    window: oracle.Window
    dtype: torch.dtype
    regime: str
    eps: float = 1e-5

    def xs(self) -> Tensor:
        return sequence(self.regime, self.seed, (self.steps, self.batch, self.features)).to(self.dtype)

    def norm(self) -> Any:
        module = an.AssortedTime(normalizer(self.base, self.features, eps=self.eps), window=window(self.window))
        return stirred(module, self.seed).to(self.dtype)

    def site(self, norm: Any) -> oracle.Site:
        """Return the textbook form of `norm`, with its gain and shift."""
        gain, shift = affine(norm.normalizer)
        return oracle.Site(self.base, self.window, gain, shift, self.eps)

    def rounding(self, site: oracle.Site) -> float:
        """Return the rounding of one float64 evaluation, magnified by centring: |x| / sqrt(v + eps) over the window."""
        condition = 1.0
        for t, (_, variance, _) in enumerate(site.pooled):
            seen = torch.stack(site.past[: t + 1]).detach().abs().max()
            condition = max(condition, float(seen / (variance.detach().min() + self.eps).sqrt()))
        return 64 * torch.finfo(torch.float64).eps * condition


@st.composite
def cases(
    draw,
    bases: Sequence[str] = BASES,
    kinds: st.SearchStrategy = windows,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    regimes: Sequence[str] = REGIMES,
    steps: tuple[int, int] = (1, 10),
    batch: tuple[int, int] = (1, 4),
    features: tuple[int, int] = (1, 6),
) -> Case:
    base = draw(st.sampled_from(bases))
    return Case(
        seed=draw(seeds),
        steps=draw(st.integers(*steps)),
        batch=draw(st.integers(max(batch[0], 2 if base == "batch" else 1), batch[1])),
        features=draw(st.integers(*features)),
        base=base,
        window=draw(kinds),
        dtype=draw(st.sampled_from(dtypes)),
        regime=draw(st.sampled_from(regimes)),
    )


def normalizer(base: str, features: int, **options: Any) -> Any:
    return getattr(an, NORMS[base])(features, **options)


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the gain and shift of a normalizer in float64, concatenated over its gates, with their graph."""
    gates = getattr(module, "gates", None)
    if gates is not None:
        gains, shifts = zip(*(affine(gate) for gate in gates), strict=True)
        return torch.cat(gains), torch.cat(
            [shift.expand(gain.shape) for gain, shift in zip(gains, shifts, strict=True)]
        )
    gain, shift = getattr(module, "weight", None), getattr(module, "bias", None)
    one = torch.ones((), dtype=torch.float64)
    return one if gain is None else gain.double(), one * 0 if shift is None else shift.double()


def stirred(module: Any, seed: int) -> Any:
    """Set gains and shifts to random values instead of the initial 1 and 0."""
    source = torch.Generator().manual_seed(seed + 1)
    for child in module.modules():
        if isinstance(child, an.Normalizer):
            for name, parameter in child.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                start = 1.0 if name == "weight" else 0.0
                parameter.data.copy_(start + 0.3 * noise.clamp(-2, 2))
    return module


@dataclass(frozen=True)
class LayerCase:
    """One layer and its input sequence."""

    seed: int
    cell: str
    base: str
    window: oracle.Window
    steps: int
    batch: int
    inputs: int
    hidden: int

    def layer(self, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        torch.manual_seed(self.seed)
        options = {"norm": {"kind": self.base, "eps": 1e-5}, "window": window(self.window), **options}
        return stirred(getattr(an, self.cell)(self.inputs, self.hidden, dtype=dtype, **options), self.seed)

    def xs(self, steps: int | None = None) -> Tensor:
        return sequence("normal", self.seed + 2, (steps or self.steps, self.batch, self.inputs))

    def hx(self, layer: Any, seed: int = 3) -> Any:
        """Return random initial states in torch's form for one layer and direction."""
        source = torch.Generator().manual_seed(self.seed + seed)
        deep = layer.num_layers * (2 if layer.bidirectional else 1)
        sizes = (getattr(layer, "proj_size", 0) or self.hidden, self.hidden)
        leaves = [torch.randn(deep, self.batch, size, generator=source, dtype=torch.float64) for size in sizes]
        return tuple(leaves) if self.cell == "LSTM" else leaves[0]


@st.composite
def layer_cases(
    draw,
    cells: Sequence[str] = CELLS,
    bases: Sequence[str] = BASES,
    kinds: st.SearchStrategy = windows,
    steps: tuple[int, int] = (1, 6),
    batch: tuple[int, int] = (1, 4),
    inputs: tuple[int, int] = (1, 3),
    hidden: tuple[int, int] = (1, 4),
) -> LayerCase:
    base = draw(st.sampled_from(bases))
    return LayerCase(
        seed=draw(seeds),
        cell=draw(st.sampled_from(cells)),
        base=base,
        window=draw(kinds),
        steps=draw(st.integers(*steps)),
        batch=draw(st.integers(max(batch[0], 2 if base == "batch" else 1), batch[1])),
        inputs=draw(st.integers(*inputs)),
        hidden=draw(st.integers(*hidden)),
    )


def lengths(case: LayerCase | Case, zero: bool = False) -> Tensor:
    """Draw ragged lengths whose two longest are equal: batch statistics need two values at every step."""
    source = torch.Generator().manual_seed(case.seed + 5)
    drawn = torch.randint(0 if zero else 1, case.steps + 1, (case.batch,), generator=source)
    order = drawn.argsort(descending=True)
    drawn[order[:2]] = case.steps
    return drawn[torch.randperm(case.batch, generator=source)]


def textbook(
    layer: Any,
    case: LayerCase,
    xs: Tensor,
    hx: Any = None,
    lengths: Tensor | None = None,
    suffix: str = "_l0",
    groups: int = 1,
    sites_out: dict[str, oracle.Site | None] | None = None,
    **placement: Any,
):
    """Return the oracle's outputs and final states for one layer and direction, with the parameters of the layer.

    `sites_out` receives the sites with all their pooled statistics.
    """
    parts: dict[str, Any] = {
        name: getattr(layer, name + suffix, None)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    }
    names = {"ih": "sum" if placement.get("joint") else "ih", "hh": "hh", "cell": "c"}
    if case.cell != "LSTM":
        del names["cell"]
    sites = {
        place: site(layer, case, f"norm_{name}{suffix}", 1 if name == "c" else groups) for place, name in names.items()
    }
    if hx is None:
        hx = tuple(
            torch.zeros(1, xs.shape[1], size, dtype=torch.float64)
            for size in (parts["weight_hh"].shape[1], case.hidden)
        )
        hx = hx if case.cell == "LSTM" else hx[0]
    state = tuple(s[0] for s in hx) if case.cell == "LSTM" else (hx[0],)
    if sites_out is not None:
        sites_out.update({names[place]: norm for place, norm in sites.items()})
    ys, state = oracle.unroll(STEPS[case.cell], parts, xs, state, sites, lengths, **placement)
    final = tuple(s[None] for s in state)
    return ys, final if case.cell == "LSTM" else final[0]


def site(layer: Any, case: LayerCase, name: str, groups: int = 1) -> oracle.Site | None:
    module = getattr(layer, name, None)
    return None if module is None else oracle.Site(case.base, case.window, *affine(module), groups=groups)


def leaves(state: Any) -> list[Tensor]:
    """Return every tensor of a nested state."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for part in state for leaf in leaves(part)]


def level(*tensors: Tensor) -> float:
    """Return the largest magnitude of several tensors, at least 1, as the scale of their absolute error."""
    return max([1.0, *(float(tensor.detach().abs().max()) for tensor in tensors if tensor.numel())])
