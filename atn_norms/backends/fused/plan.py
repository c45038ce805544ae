"""Description of a cell for the kernels, without tensors, as one hashable text that survives tracing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from atn_norms.backends.traced.cache import traced_norm
from atn_norms.backends.traced.normalizer import TracedNorm, tensors_of
from atn_norms.cells import Cell, CellWeights, GRUEquations, LSTMEquations, RNNEquations
from atn_norms.normalizers import (
    BatchMoments,
    FeatureMoments,
    Normalizer,
    PerGate,
    batch_moments,
    feature_moments,
)
from atn_norms.normalizers.base import has_hooks
from atn_norms.windows import Cumulative, Detached, Exponential, Sliding, Window

DOUBLE = torch.float64
HALF = (torch.bfloat16, torch.float16)  # types of layers that are computed in float32
MOST_GROUPS = 64  # lanes of a block live on the kernel's stack
CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # of a cell, in the kernels
PLACES = {"ih": 0, "hh": 1, "c": 2}  # of a site in a cell of the default placement, and in the kernels


BATCH, POPULATION, POPULATIONS = 1, 2, 3  # `SitePlan.coupled`; what norms: the batch, or a population, or one a step


@dataclass(frozen=True)
class SitePlan:
    """One norm site: the statement, the window, and which affine tensors there are.

    Where the norm couples the batch, every feature has a statement, `groups` are gates, and there is one state.
    """

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
    coupled: int = 0  # BATCH, POPULATION, POPULATIONS, or 0: every row by itself
    traced: TracedNorm | None = None  # what computes it where no moments are declared
    parts: int = 1  # on how many equal parts of the features the traced normalizer runs, one after the other
    detached: bool = False  # no gradient flows through the past of the window

    def encode(self) -> str:
        """As a text: the fields in order."""
        eps, decay = float(self.eps), float(self.decay)  # a compiler then takes them as constants
        return (
            f"{self.site} {self.features} {self.groups} {int(self.centred)} {eps!r} {self.steps} {decay!r} "
            f"{int(self.gain)} {int(self.shift)} {'x'.join(map(str, self.leaf)) or '-'} {self.coupled} {self.parts} "
            f"{int(self.detached)} {'-' if self.traced is None else self.traced.encode()}"
        )

    @staticmethod
    def decode(text: str) -> SitePlan:
        """From a text."""
        site, features, groups, centred, eps, steps, decay, gain, shift, leaf, *others = text.split()
        coupled, parts, detached, traced = others
        numbers = int(features), int(groups), centred == "1", float(eps), int(steps), float(decay)
        axes = () if leaf == "-" else tuple(map(int, leaf.split("x")))
        norm = None if traced == "-" else TracedNorm.decode(traced)
        return SitePlan(
            site, *numbers, gain == "1", shift == "1", axes, int(coupled), norm, int(parts), detached == "1"
        )

    @property
    def is_valid(self) -> bool:
        """Check the numbers, which the kernels do not check again."""
        return self._window_is_valid and (self._moments_are_valid if self.traced is None else self._programs_are_valid)

    @property
    def _window_is_valid(self) -> bool:
        return self.steps >= 0 and 0 <= self.decay <= 1 and 0 <= self.eps < math.inf

    @property
    def _programs_are_valid(self) -> bool:
        traced = self.traced
        return (
            traced is not None
            and self.parts >= 1
            and self.features == self.parts * traced.features
            and self.groups == self.parts * traced.width
            and math.prod(self.leaf or (0,)) == self.groups
            and self.centred == traced.centred
            and (self.gain, self.shift) == (traced.parameters > 0, False)
            and (self.groups > 0 or self.steps == 1)
            and self.coupled == 0
        )

    @property
    def _moments_are_valid(self) -> bool:
        lanes = self.features if self.coupled else self.groups
        return (
            self.groups >= 1
            and self.parts == 1
            and self.features >= self.groups
            and self.features % self.groups == 0
            and (self.coupled != 0 or self.groups <= MOST_GROUPS)
            and min(self.leaf) >= 1
            and math.prod(self.leaf) == lanes
            and self.coupled in (0, BATCH, POPULATION, POPULATIONS)
            and (self.centred or not self.coupled)
        )

    @property
    def prefix(self) -> int:
        """Statements that the state brings: k - 1 of a sliding window, 1 of a decaying one."""
        return self.steps - 1 if self.steps else 1

    @property
    def leaves(self) -> int:
        """Leaves of a statistic: mean and variance, or a mean square, or none."""
        return 2 if self.centred else 1 if self.groups else 0

    @property
    def tensors(self) -> int:
        """Tensors of the state: the weights and the leaves; none where there is no statistic."""
        return 1 + self.leaves if self.leaves else 0

    @property
    def affine(self) -> int:
        """Elements of the gain; of a traced normalizer, of all parameters."""
        return self.features if self.traced is None else self.parts * self.traced.parameters

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of the state's leaves: the weights, then those of the statistic."""
        if not self.leaves:
            return []
        batch = 1 if self.coupled else batch
        rows = (batch, self.prefix) if self.steps else (batch,)
        return [rows, *[(*rows, *self.leaf)] * self.leaves]

    def populations(self, steps: int) -> int:
        """Number of populations that replace the batch's statistics in a sequence."""
        return steps if self.coupled == POPULATIONS else 1

    def doubles(self, steps: int, batch: int) -> int:
        """Length of the timeline: every statement of a sequence, own and pooled, and the prefix's weights."""
        # As `atn_norms_timeline` and `atn_norms_batch_timeline` have it; here so that a compiler can trace it.
        if self.coupled:
            hidden = self.features // self.groups
            blocks, many = (hidden + 31) // 32, min(hidden, 32)
        else:
            blocks = (batch + 15) // 16
            many = (batch + blocks - 1) // blocks
        lanes = (many * self.groups + 7) // 8 * 8
        return max(blocks * lanes * (3 * self.prefix + 6 * steps), 8)  # not even an empty timeline is NULL


@dataclass(frozen=True, eq=False)  # compared by identity: what is remembered of a plan must be found fast
class Plan:
    """A cell and its sites, in the order of the cell."""

    cell: str
    sites: tuple[SitePlan, ...]

    @property
    def is_lstm(self) -> bool:
        """True where the cell has a cell state beside h."""
        return self.cell == "lstm"

    @property
    def gates(self) -> int:
        """Gates of the cell."""
        return {"lstm": 4, "gru": 3}.get(self.cell, 1)

    @property
    def coupled(self) -> bool:
        """True where the norms use batch statistics; all sites do, or none."""
        return any(site.coupled for site in self.sites)

    @property
    def measured(self) -> list[SitePlan]:
        """The sites that hand out what they pooled, for a population's records."""
        return [site for site in self.sites if site.coupled == BATCH]

    @property
    def results(self) -> int:
        """Number of results: outputs, last h and c, every site's new state and what it pooled."""
        return 3 + sum(site.tensors for site in self.sites) + len(self.measured)

    def encode(self) -> str:
        """As a text; nothing but formatting, so that a compiler can trace it."""
        return "; ".join([self.cell, *[site.encode() for site in self.sites]])

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Plan:
        """From a text; `ValueError` where the kernels cannot run it."""
        cell, *sites = text.split("; ")
        try:
            plan = Plan(cell, tuple(SitePlan.decode(site) for site in sites))
        except ValueError:
            raise ValueError(f"plan: got {text!r}; expected the text of a Plan") from None
        plan.check()
        return plan

    def check(self, hidden: int | None = None) -> None:
        """Raise `ValueError` where the kernels cannot run the plan, or not with this number of hidden units."""
        names = [site.site for site in self.sites]
        known = list(PLACES) if self.is_lstm else ["ih", "hh"]
        if self.cell not in CELLS:
            raise ValueError(f"plan: got cell {self.cell!r}; expected one of {', '.join(CELLS)}")
        if not names or names != [name for name in known if name in names]:
            raise ValueError(f"plan: got sites {names}; expected some of {known}, in this order")
        if len({bool(site.coupled) for site in self.sites}) > 1:
            raise ValueError("plan: got sites with and without batch statistics; expected only one of the two")
        for site in self.sites:
            features = site.features if hidden is None else hidden * (1 if site.site == "c" else self.gates)
            if not site.is_valid or site.features != features:
                raise ValueError(f"plan: got {site}; expected a site of {features} features within the kernels' limits")


def kernel_of(cell: Cell) -> str | None:
    """The kernel's name for a cell, or None; a subclass may compute anything, so the type must be exact."""
    if type(cell) is RNNEquations:
        return f"rnn_{cell.nonlinearity}"
    return {LSTMEquations: "lstm", GRUEquations: "gru"}.get(type(cell))


def window_of(window: Window) -> tuple[int, float] | None:
    """(steps, decay) of a window that the kernels know, or None."""
    if type(window) is Detached:
        return window_of(window.window)
    if type(window) is Sliding:
        return window.steps, 1.0
    if type(window) is Cumulative:
        return 0, 1.0
    return (0, 2.0 ** (-1.0 / window.half_life)) if type(window) is Exponential else None


@dataclass(frozen=True)
class TracedSite:
    """A traced normalizer at a site, once or for each gate, with its parameters one after the other."""

    traced: TracedNorm
    norms: tuple[Normalizer, ...]

    @property
    def gain(self) -> Tensor | None:
        """All parameters and buffers as one tensor; None where there are none."""
        tensors = [tensor for norm in self.norms for tensor in tensors_of(norm)]
        if len(tensors) == 1 and tensors[0].dim() == 1:
            return tensors[0]
        return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else None

    @property
    def shift(self) -> None:
        """Return nothing: what shifts is among the parameters."""
        return None

    def check(self, features: int) -> None:
        """Do nothing: the programs were built for their number of features."""


Declared: TypeAlias = FeatureMoments | BatchMoments | TracedSite


def _traced_site(normalizer: Normalizer, features: int) -> TracedSite | str:
    """Return how a normalizer that declares no moments runs in the kernels, or the reason why it does not."""
    norms = (normalizer,)
    if type(normalizer) is PerGate:
        norms = tuple(gate for gate in normalizer.gates if isinstance(gate, Normalizer))
    every = [traced_norm(norm, features // len(norms)) for norm in norms]
    first = every[0]
    if isinstance(first, str):
        return first
    if any(other != first for other in every[1:]):
        return "its gates have normalizers that differ"
    if len(norms) > 1 and any(len(leaf) != 1 for leaf in first.leaves):
        return "its gates have statistics with more than one axis"
    return TracedSite(first, norms)


def planned(cell: Cell, weights: CellWeights) -> tuple[Plan, list[Declared]] | str:
    """The plan of a case and each site's moments with their tensors; or in one sentence why there is no kernel for it.

    It runs for every call, since the declaration of a norm may have changed.
    """
    kernel, placement = kernel_of(cell), cell.placement
    if kernel is None:
        return f"it has no kernel for {type(cell).__name__}"
    if getattr(cell, "proj_size", 0):
        return "it has no projection (proj_size)"
    if placement.sum != "separate" or placement.carry != "raw":
        return "it runs the default placement (sums separate, cell state carried raw) only"
    if not weights.norms:
        return "it runs normed cells only"
    dtype = weights["weight_hh"].dtype
    sites, all_moments = [], []
    apart = None
    for site, norm in weights.norms.items():
        if has_hooks(norm.normalizer):
            return f"the norm at {site} has hooks, which only the reference calls"
        moments = feature_moments(norm.normalizer) or batch_moments(norm.normalizer)
        moments = moments or _traced_site(norm.normalizer, cell.sites[site])
        if isinstance(moments, str):
            return f"the norm at {site} ({type(norm.normalizer).__name__}): {moments}"
        moments.check(cell.sites[site])
        coupled = isinstance(moments, BatchMoments)
        if apart is not None and apart != coupled:
            return "norms over the batch and norms of single rows are at different sites of it"
        apart = coupled
        if isinstance(moments, FeatureMoments) and moments.groups > MOST_GROUPS:
            return f"the norm at {site} has {moments.groups} groups, and it takes at most {MOST_GROUPS}"
        gain, shift = moments.gain, moments.shift
        if (gain is not None and gain.dtype != dtype) or (shift is not None and shift.dtype != dtype):
            return f"the norm at {site} is of another type than the layer, {dtype}"
        has = gain is not None, shift is not None
        if isinstance(moments, TracedSite):
            traced, parts = moments.traced, len(moments.norms)
            window = window_of(norm.window) if traced.leaves else (1, 1.0)
            if window is None:
                return f"it has no kernel for the window {norm.window!r} at {site}"
            groups = parts * traced.width
            shape = traced.leaves[0] if len(traced.leaves) == 1 or traced.centred else (traced.width,)
            shape = ((parts, *shape) if parts > 1 else shape) if groups else ()
            cut = norm.window.detaches_past
            sites.append((site, groups, traced.centred, 0.0, *window, *has, shape, 0, traced, parts, cut))
            all_moments.append(moments)
            continue
        window = window_of(norm.window)
        if window is None:
            return f"it has no kernel for the window {norm.window!r} at {site}"
        cut = norm.window.detaches_past
        if isinstance(moments, BatchMoments):
            gates, shape = cell.gates_at(site), moments.shape or (cell.sites[site],)
            kind = BATCH if moments.measured else POPULATIONS if moments.per_step else POPULATION
            sites.append((site, gates, True, moments.eps, *window, *has, shape, kind, None, 1, cut))
        else:
            fields = moments.groups, moments.centred, moments.eps, *window, *has, moments.leaf
            sites.append((site, *fields, 0, None, 1, cut))
        all_moments.append(moments)
    # A compiler would watch what is remembered, and start again whenever another layer is remembered, too.
    plan = (_plan if torch.compiler.is_compiling() else _remembered_plan)(kernel, cell.hidden_size, tuple(sites))
    return plan, all_moments


def _plan(kernel: str, hidden: int, sites: tuple[tuple[Any, ...], ...]) -> Plan:
    gates = {"lstm": 4, "gru": 3}.get(kernel, 1)
    return Plan(
        kernel, tuple(SitePlan(site[0], hidden * (1 if site[0] == "c" else gates), *site[1:]) for site in sites)
    )


_remembered_plan = lru_cache(maxsize=256)(_plan)
