"""Description of a cell for the kernels, without tensors, as one hashable text, which tracing keeps as a constant."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from atn_norms.backends.traced.normalizer import TracedNorm
from atn_norms.cells import Cell, GRUEquations, LSTMEquations, RNNEquations

DOUBLE = torch.float64
HALF = (torch.bfloat16, torch.float16)  # types of layers that are computed in float32
MOST_GROUPS = 64  # the lanes of a block are on the kernel's stack
CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # of a cell, in the kernels
PLACES = {"ih": 0, "hh": 1, "sum": 1, "c": 2}  # of a site in the kernels


# Values of `SitePlan.coupled`: normalize with the batch, with a population, or with one for each step.
BATCH, POPULATION, POPULATIONS = 1, 2, 3


# Parts of a cell's name in a plan: one norm of the sum of both products, a normalized carried state, a projection.
JOINT, NORMED, PROJECTED = "joint", "normed", "projected"
PLACEMENTS = {
    "lstm": [a + b + c for a in ("", "-joint") for b in ("", "-normed") for c in ("", "-projected")],
    "gru": [""],
    "rnn_tanh": ["", "-joint"],
    "rnn_relu": ["", "-joint"],
}


class SitePlan(NamedTuple):
    """One norm site: its statistic, its window and its affine tensors.

    With batch statistics every feature has a statistic, and there is one state. `groups` are then the gates of the site
    in a uniform plan, and 1 in other plans.
    """

    site: str
    features: int
    groups: int
    centred: bool
    eps: tuple[float, ...]  # of equal parts of the elements of a statistic
    steps: int  # k of a sliding window; 0: a decaying window
    decay: float
    gain: bool
    shift: bool
    leaf: tuple[int, ...]  # trailing axes of a leaf of the statistic
    coupled: int = 0  # BATCH, POPULATION, POPULATIONS, or 0: separate statistics for each row
    traced: TracedNorm | None = None  # the programs of a normalizer without declared moments
    parts: int = 1  # number of equal parts of the features, on which the traced normalizer runs in turn
    detached: bool = False  # no gradient flows through the past of the window
    taps: tuple[float, ...] = ()  # weights by age, `steps` of them; empty for equal weights
    past: bool = False  # a decaying window excludes the current step

    def encode(self) -> str:
        """Return the fields in order, as a text."""
        # local variables, which a compiler treats as constants
        eps, decay = ",".join([f"{float(each)!r}" for each in self.eps]), float(self.decay)
        return (
            f"{self.site} {self.features} {self.groups} {int(self.centred)} {eps} {self.steps} {decay!r} "
            f"{int(self.gain)} {int(self.shift)} {'x'.join(map(str, self.leaf)) or '-'} {self.coupled} {self.parts} "
            f"{int(self.detached)} {','.join([repr(tap) for tap in self.taps]) or '-'} {int(self.past)} "
            f"{'-' if self.traced is None else self.traced.encode()}"
        )

    @staticmethod
    def decode(text: str) -> SitePlan:
        """Build the site of a text."""
        site, features, groups, centred, eps, steps, decay, gain, shift, leaf, *others = text.split()
        coupled, parts, detached, taps, past, traced = others
        ages = () if taps == "-" else tuple(map(float, taps.split(",")))
        each = tuple(map(float, eps.split(",")))
        numbers = int(features), int(groups), centred == "1", each, int(steps), float(decay)
        axes = () if leaf == "-" else tuple(map(int, leaf.split("x")))
        norm = None if traced == "-" else TracedNorm.decode(traced)
        has = gain == "1", shift == "1"
        window = detached == "1", ages, past == "1"
        return SitePlan(site, *numbers, *has, axes, int(coupled), norm, int(parts), *window)

    @property
    def is_valid(self) -> bool:
        """Check all numbers; the kernels do not check them."""
        return self._window_is_valid and (self._moments_are_valid if self.traced is None else self._programs_are_valid)

    @property
    def _window_is_valid(self) -> bool:
        known = not self.taps or (len(self.taps) == self.steps and all(0 <= tap < math.inf for tap in self.taps))
        known = known and not (self.past and (self.steps or self.coupled))
        known = known and len(self.eps) > 0 and all(0 <= each < math.inf for each in self.eps)
        return known and self.steps >= 0 and 0 <= self.decay <= 1 and self.width % len(self.eps) == 0

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
        return (
            self.groups >= 1
            and self.parts == 1
            and self.features >= self.groups
            and self.features % self.groups == 0
            and (self.coupled != 0 or self.groups <= MOST_GROUPS)
            and min(self.leaf) >= 1
            and math.prod(self.leaf) == self.width
            and self.coupled in (0, BATCH, POPULATION, POPULATIONS)
            and (self.centred or not self.coupled)
        )

    @property
    def width(self) -> int:
        """Number of elements of a leaf of a statistic."""
        return self.features if self.coupled else self.groups

    @property
    def prefix(self) -> int:
        """Number of statistics in the state: k - 1 for a sliding window, 1 for a decaying one."""
        return self.steps - 1 if self.steps else 1

    @property
    def leaves(self) -> int:
        """Number of leaves of a statistic: mean and variance, a mean square, or none."""
        return 2 if self.centred else 1 if self.groups else 0

    @property
    def tensors(self) -> int:
        """Number of tensors of the state: the weights and the leaves; 0 without a statistic."""
        return 1 + self.leaves if self.leaves else 0

    @property
    def affine(self) -> int:
        """Number of elements of the gain; for a traced normalizer, of all parameters."""
        return self.features if self.traced is None else self.parts * self.traced.parameters

    @property
    def split(self) -> list[tuple[int, ...]]:
        """Shapes of the statistic's leaves if the kernels concatenate them in one leaf; empty otherwise."""
        traced = self.traced
        if traced is None or traced.centred or len(traced.leaves) < 2:
            return []
        return [(self.parts, *leaf) if self.parts > 1 else leaf for leaf in traced.leaves]

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of the state's tensors: the weights, then the leaves of the statistic."""
        if not self.leaves:
            return []
        batch = 1 if self.coupled else batch
        rows = (batch, self.prefix) if self.steps else (batch,)
        return [rows, *[(*rows, *self.leaf)] * self.leaves]

    def populations(self, steps: int) -> int:
        """Number of populations that normalize a sequence instead of batch statistics."""
        return steps if self.coupled == POPULATIONS else 1

    def doubles(self, steps: int, batch: int) -> int:
        """Length of the timeline: statistics of single steps, pooled statistics, and the weights of the prefix."""
        # As `atn_norms_timeline` and `atn_norms_batch_timeline` in C, but here a compiler can trace it.
        if self.coupled:
            hidden = self.features // self.groups
            blocks, many = (hidden + 31) // 32, min(hidden, 32)
        else:
            blocks = (batch + 15) // 16
            many = (batch - 1) // blocks + 1  # rounded up, in a form that an exporter finds positive
        lanes = (many * self.groups + 7) // 8 * 8
        # Even an empty timeline is not NULL. The choice is static, since an exporter rejects dynamic ones.
        if not self.groups:
            return 8
        return blocks * lanes * (3 * self.prefix + 6 * steps + 4)


class Plan:
    """A cell and its sites, in the order of the cell; compared by identity, for a fast look-up of its layouts.

    | attribute | meaning |
    |---|---|
    | `cell`, `kind` | name of the cell with its placement, such as `lstm-joint-normed`; and without it |
    | `joint`, `normed_carry` | placement: one norm of the sum of both products; a normalized carried state |
    | `projected` | True if an LSTM projects its output |
    | `order`, `indices` | names of the cell's sites; for each site of the plan its index in `order` |
    | `gates`, `is_lstm` | number of gates; True for a cell with a cell state and h |
    | `coupled` | True if some norm uses batch statistics |
    | `uniform` | True if all norms do, without a projection; the kernels then run blocks of hidden units |
    | `tensors`, `slices` | number of tensors of all sites' states, and the place of each site's tensors among them |
    | `measured` | the sites that return their pooled statistics, for the records of a population |
    | `results` | number of results: outputs, last h and c, every site's new state, and pooled statistics |
    """

    def __init__(self, cell: str, sites: tuple[SitePlan, ...]) -> None:
        self.cell, self.sites = cell, sites
        self.kind, *placement = cell.split("-")
        self.joint, self.normed_carry, self.projected = (part in placement for part in (JOINT, NORMED, PROJECTED))
        self.is_lstm = self.kind == "lstm"
        self.gates = {"lstm": 4, "gru": 3}.get(self.kind, 1)
        self.order = ["sum"] if self.joint else ["ih", "hh"]
        self.order += ["c"] if self.is_lstm else []
        self.indices = [self.order.index(site.site) if site.site in self.order else 0 for site in sites]
        self.coupled = any(site.coupled for site in sites)
        self.uniform = self.coupled and all(site.coupled for site in sites) and not self.projected
        self.slices: list[tuple[int, int]] = []
        self.tensors = 0
        for site in sites:
            self.slices.append((self.tensors, self.tensors + site.tensors))
            self.tensors += site.tensors
        self.measured = [site for site in sites if site.coupled == BATCH]
        self.results = 3 + self.tensors + len(self.measured)

    def encode(self) -> str:
        """Return a text, by formatting alone, so that a compiler can trace it."""
        return "; ".join([self.cell, *[site.encode() for site in self.sites]])

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Plan:
        """Build the plan of a text; `ValueError` if the kernels cannot run it."""
        cell, *sites = text.split("; ")
        try:
            plan = Plan(cell, tuple(SitePlan.decode(site) for site in sites))
        except ValueError:
            raise ValueError(f"plan: got {text!r}; expected the text of a Plan") from None
        plan.check()
        return plan

    def check(self, hidden: int | None = None) -> None:
        """Raise `ValueError` if the kernels cannot run the plan with this number of hidden units."""
        names = [site.site for site in self.sites]
        known, supported = self.order, PLACEMENTS.get(self.kind, [])
        if self.kind not in CELLS or self.cell.removeprefix(self.kind) not in supported:
            raise ValueError(f"plan: got cell {self.cell!r}; expected one of {', '.join(CELLS)}, with its placement")
        if names != [name for name in known if name in names]:
            raise ValueError(f"plan: got sites {names}; expected some of {known}, in this order")
        for site in self.sites:
            features = site.features if hidden is None else hidden * (1 if site.site == "c" else self.gates)
            blocks = self.gates if self.uniform and site.site != "c" else 1
            if not site.is_valid or site.features != features or (site.coupled and site.groups != blocks):
                raise ValueError(f"plan: got {site}; expected a site of {features} features within the kernels' limits")


KERNEL_CELLS = (LSTMEquations, GRUEquations, RNNEquations)  # a subclass may compute anything: the type must be exact


def kernel_of(cell: Cell) -> str | None:
    """Return the kernel's name for a cell, or None."""
    if type(cell) is RNNEquations:
        return f"rnn_{cell.nonlinearity}"
    return {LSTMEquations: "lstm", GRUEquations: "gru"}.get(type(cell))
