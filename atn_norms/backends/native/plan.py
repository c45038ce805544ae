"""What the kernels must know of a cell beside its tensors, as one hashable text that survives tracing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from atn_norms.cells import Cell, CellWeights, GRUEquations, LSTMEquations, RNNEquations
from atn_norms.normalizers import FeatureMoments, feature_moments
from atn_norms.windows import Cumulative, Exponential, Sliding, Window

MOST_GROUPS = 64  # lanes of a block live on the kernel's stack


@dataclass(frozen=True)
class SitePlan:
    """One norm site: the statement, the window, and which affine tensors there are."""

    site: str
    features: int
    groups: int
    centred: bool
    eps: float
    steps: int  # k of a sliding window; 0: decaying
    decay: float
    gain: bool
    shift: bool
    leaf: tuple[int, ...]  # trailing axes of a leaf of the statement

    def encode(self) -> str:
        """As a text: the fields in order."""
        return (
            f"{self.site} {self.features} {self.groups} {int(self.centred)} {self.eps!r} {self.steps} {self.decay!r} "
            f"{int(self.gain)} {int(self.shift)} {'x'.join(map(str, self.leaf))}"
        )

    @staticmethod
    def decode(text: str) -> SitePlan:
        """From a text."""
        site, features, groups, centred, eps, steps, decay, gain, shift, leaf = text.split()
        numbers = int(features), int(groups), centred == "1", float(eps), int(steps), float(decay)
        return SitePlan(site, *numbers, gain == "1", shift == "1", tuple(map(int, leaf.split("x"))))

    @property
    def prefix(self) -> int:
        """Statements that the state brings: k - 1 of a sliding window, 1 of a decaying one."""
        return self.steps - 1 if self.steps else 1

    @property
    def leaves(self) -> int:
        """Leaves of a statistic: mean and variance, or a mean square."""
        return 2 if self.centred else 1

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of the state's leaves: the weights, then those of the statistic."""
        rows = (batch, self.prefix) if self.steps else (batch,)
        return [rows, *[(*rows, *self.leaf)] * self.leaves]

    def doubles(self, steps: int, batch: int) -> int:
        """Length of the timeline: every statement of a sequence, own and pooled, and the prefix's weights."""
        return self.prefix * batch + (2 * (self.prefix + steps) + 4 * steps) * batch * self.groups


@dataclass(frozen=True)
class Plan:
    """A cell and its sites, in the order of the cell."""

    cell: str
    sites: tuple[SitePlan, ...]

    @property
    def is_lstm(self) -> bool:
        """Whether there is a cell state beside h."""
        return self.cell == "lstm"

    @property
    def gates(self) -> int:
        """Gates of the cell."""
        return {"lstm": 4, "gru": 3}.get(self.cell, 1)

    def encode(self) -> str:
        """As a text; nothing but formatting, so that a compiler can trace it."""
        return "; ".join([self.cell, *[site.encode() for site in self.sites]])

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Plan:
        """From a text."""
        cell, *sites = text.split("; ")
        return Plan(cell, tuple(SitePlan.decode(site) for site in sites))


def kernel_of(cell: Cell) -> str | None:
    """The kernel's name for a cell, or None; a subclass may compute anything, so the type must be exact."""
    if type(cell) is RNNEquations:
        return f"rnn_{cell.nonlinearity}"
    return {LSTMEquations: "lstm", GRUEquations: "gru"}.get(type(cell))


def window_of(window: Window) -> tuple[int, float] | None:
    """(steps, decay) of a window that the kernels know, or None."""
    if type(window) is Sliding:
        return window.steps, 1.0
    if type(window) is Cumulative:
        return 0, 1.0
    return (0, 2.0 ** (-1.0 / window.half_life)) if type(window) is Exponential else None


def refusal(cell: Cell, weights: CellWeights) -> str | None:
    """In one sentence why the kernels do not know this case, whatever the machine; None if they do."""
    if kernel_of(cell) is None:
        return f"it has no kernel for {type(cell).__name__}"
    if getattr(cell, "proj_size", 0):
        return "it has no projection (proj_size)"
    if cell.placement.sum != "separate" or cell.placement.carry != "raw":
        return "it runs the default placement (sums separate, cell state carried raw) only"
    if not weights.norms:
        return "it runs normed cells only"
    for site, norm in weights.norms.items():
        moments = feature_moments(norm.normalizer)
        if moments is None:
            return f"the norm at {site} ({type(norm.normalizer).__name__}) is not declared as moments over features"
        if moments.groups > MOST_GROUPS:
            return f"the norm at {site} has {moments.groups} groups, and it takes at most {MOST_GROUPS}"
        dtype = weights["weight_hh"].dtype
        if any(tensor is not None and tensor.dtype != dtype for tensor in (moments.gain, moments.shift)):
            return f"the norm at {site} is of another type than the layer, {dtype}"
        if window_of(norm.window) is None:
            return f"it has no kernel for the window {norm.window!r} at {site}"
    return None


def planned(cell: Cell, weights: CellWeights) -> tuple[Plan, list[FeatureMoments]]:
    """The plan of a case that is not refused, and each site's moments with their tensors."""
    sites, all_moments = [], []
    for site, norm in weights.norms.items():
        moments, window = feature_moments(norm.normalizer), window_of(norm.window)
        assert moments is not None and window is not None  # refused otherwise
        sites.append(
            SitePlan(
                site,
                cell.sites[site],
                moments.groups,
                moments.centred,
                moments.eps,
                *window,
                moments.gain is not None,
                moments.shift is not None,
                moments.leaf,
            )
        )
        all_moments.append(moments)
    return Plan(str(kernel_of(cell)), tuple(sites)), all_moments
