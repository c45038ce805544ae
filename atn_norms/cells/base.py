"""The base class of cells: sizes, sites and equations, as a frozen value without tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from atn_norms.assorted_time import SiteNorm, masked, steps_mask
from atn_norms.errors import Problem, SpecError, mismatch
from atn_norms.normalizers import scanning
from atn_norms.options import Options
from atn_norms.pytree import Tree, describe_structure, where_mask


def autocasts(kind: str) -> bool:
    """Return True if autocast is on for a kind of device; the meta device has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


class Placement(Options):
    """Places of the norms in a cell; the default is the cell of arXiv 2209.14439.

    | option | value | meaning |
    |---|---|---|
    | `sum` | `separate` | two norms: N_ih(W x + b_ih) + N_hh(U h + b_hh) |
    | | `joint` | one norm: N_sum(W x + b_ih + U h + b_hh) |
    | `gates` | `joint` | one statistic over all gates of a site |
    | | `per_gate` | one statistic for each gate |
    | `carry` | `raw` | carry the raw cell state, and normalize it for the output alone |
    | | `normed` | carry the normalized cell state to the next step |
    """

    sum: Literal["separate", "joint"] = Field(
        default="separate", description="norms of W x and U h: two, or one of their sum"
    )
    gates: Literal["joint", "per_gate"] = Field(
        default="joint", description="statistics over all gates, or gate by gate"
    )
    carry: Literal["raw", "normed"] = Field(default="raw", description="the cell state that the next step receives")


@dataclass(eq=False)
class CellWeights:
    """The weights of a cell: tensors by torch's names, and the norm of each site that has one.

    `tensors` maps `weight_ih` `[G*H, D]`, `weight_hh` `[G*H, R]`, `bias_ih`, `bias_hh` `[G*H]` (and other names of the
    cell) to tensors; an absent bias is None. A layer collects its weights again for every call.
    """

    tensors: Mapping[str, Tensor]
    norms: Mapping[str, SiteNorm] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def like(self) -> Tensor:
        """Return a tensor that has the type and the device of the cell; not every cell has the same tensors."""
        for tensor in self.tensors.values():
            if tensor is not None:
                return tensor
        raise KeyError("a cell without tensors")

    def get(self, name: str) -> Tensor | None:
        """Return a tensor that may be absent, such as a bias, or None."""
        return self.tensors.get(name)


@dataclass(frozen=True)
class Cell(ABC):
    """The equations of a recurrent cell over explicit state.

    | symbol | meaning | shape |
    |---|---|---|
    | `xs` | inputs, time first | `[T, B, D]` |
    | `u` | the projected input of one step | `[B, G*H]` |
    | `state` | `(carried, norms)`: the tensors named in `carried`, and one state for each site | axis 0: B |
    | `mask` | unmasked rows of the step; None means all | `[B]`, bool |
    | `lengths` | number of steps of each row; None means all steps | `[B]`, int |
    | `y` | the output of the step | `[B, R]` |

    A masked row keeps its state and has output 0.
    """

    hidden_size: int
    placement: Placement

    gates: ClassVar[tuple[str, ...]]
    carried: ClassVar[tuple[str, ...]] = ("h",)
    torch_name: ClassVar[str | None] = None

    @property
    def output_size(self) -> int:
        """Features of the output, R."""
        return self.hidden_size

    @property
    def pre_activations(self) -> int:
        """Features of the pre-activations of all gates, G*H."""
        return len(self.gates) * self.hidden_size

    @cached_property
    def sites(self) -> dict[str, int]:
        """Every place that can have a norm, and its number of features."""
        return self.product_sites()

    def product_sites(self) -> dict[str, int]:
        """Return the sites at the two products, or the site at their sum."""
        wide = self.pre_activations
        return {"sum": wide} if self.placement.sum == "joint" else {"ih": wide, "hh": wide}

    def gates_at(self, site: str) -> int:
        """Return the number of gates in the features of a site."""
        return self.sites[site] // self.hidden_size

    def shapes(self, input_size: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the parameters, in torch's order."""
        wide = self.pre_activations
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (wide, input_size), "weight_hh": (wide, self.output_size)}
        return shapes | ({"bias_ih": (wide,), "bias_hh": (wide,)} if bias else {})

    def carried_sizes(self) -> tuple[int, ...]:
        """Return the number of features of each carried tensor, in the order of `carried`."""
        return (self.output_size,)

    def autocast_type(self, half: torch.dtype, state: torch.dtype) -> torch.dtype:
        """Return the type of outputs and states under autocast to `half`, from the type of the initial state."""
        return half

    def autocast_types(
        self, half: torch.dtype, carried: Sequence[torch.dtype], packed: bool
    ) -> tuple[torch.dtype, ...]:
        """Return the type of each carried tensor under autocast, from their initial types; outputs have the first."""
        return (self.autocast_type(half, carried[0]),) * len(carried)

    def initial(
        self, weights: CellWeights, batch: int, carried: tuple[Tensor, ...] | None = None, shown: bool = True
    ) -> Tree:
        """Return the state before the first step: zeros (or `carried`), and empty windows.

        Without `shown`, an empty window is None, which every backend accepts as the initial state.
        """
        traced = torch.jit.is_tracing() and isinstance(batch, Tensor)
        if not traced and (isinstance(batch, bool) or not isinstance(batch, (int, torch.SymInt)) or batch < 0):
            raise ValueError(mismatch("batch", repr(batch), "a number of rows of at least 0"))
        like = weights.like
        if carried is None:
            carried = tuple(like.new_zeros(batch, size) for size in self.carried_sizes())
        else:
            self.check_carried(weights, carried, batch, "hx")
        norms = tuple(
            (weights.norms[site].initial(like.new_zeros(batch, size)) if shown else None)
            if site in weights.norms
            else ()
            for site, size in self.sites.items()
        )
        return carried, norms

    def check_carried(self, weights: CellWeights, carried: Tree, batch: int, name: str = "state") -> None:
        """Raise `ValueError` if the number, a shape, a type or a device of the carried tensors is not the cell's."""
        like = weights.like
        shapes = [(batch, size) for size in self.carried_sizes()]
        are_tensors = isinstance(carried, tuple) and False not in [isinstance(c, Tensor) for c in carried]
        if not are_tensors or [c.shape for c in carried] != shapes:
            expected = ", ".join(str(list(shape)) for shape in shapes)
            got = f"carried tensors {describe_structure(carried)}"
            raise ValueError(mismatch(name, got, f"({expected}) for a batch of {batch}"))
        dtype, device = like.dtype, like.device
        for c in carried:
            mixed = c.dtype != dtype and not autocasts(device.type)
            if mixed or c.device != device:
                expected = f"the layer's {dtype} on {device}"
                raise ValueError(mismatch(name, f"{c.dtype} on {c.device}", expected))

    def check_state(self, weights: CellWeights, state: Tree, batch: int) -> None:
        """Raise `ValueError` for a state of another structure; each norm checks the leaves of its state."""
        if not isinstance(state, tuple) or len(state) != 2:
            expected = "(carried, norms), as this cell or layer returned it"
            raise ValueError(mismatch("state", describe_structure(state), expected))
        carried, norms = state
        self.check_carried(weights, carried, batch)
        sites = self.sites
        if not isinstance(norms, tuple) or len(norms) != len(sites):
            expected = f"one state for each of {', '.join(sites)}"
            raise ValueError(mismatch("state", f"norms {describe_structure(norms)}", expected))
        for site, norm in zip(sites, norms, strict=True):
            if not isinstance(norm, tuple) or (site not in weights.norms and norm != ()):
                expected = "the state that its norm returned" if site in weights.norms else "(), as it has no norm"
                raise ValueError(mismatch("state", f"{describe_structure(norm)} at site {site!r}", expected))

    def project(
        self, weights: CellWeights, xs: Tensor, state: Tree, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tree]:
        """Compute the input product of all T steps, which is not recurrent; normalized if the site `ih` has a norm."""
        mask = None if lengths is None else steps_mask(lengths, xs)
        xs = xs if mask is None else masked(xs, mask)
        us = F.linear(xs, weights["weight_ih"], weights.get("bias_ih"))
        norm = weights.norms.get("ih")
        if norm is None:
            return us, state
        carried, norms = state
        place = list(self.sites).index("ih")
        memory, normalized = norms[place], []
        with scanning([norm.normalizer]):
            for step, u in enumerate(us.unbind(0)):
                u, memory = norm.step(u, memory, None if mask is None else mask[step])
                normalized.append(u)
        return torch.stack(normalized), (carried, (*norms[:place], memory, *norms[place + 1 :]))

    @abstractmethod
    def step(self, weights: CellWeights, u: Tensor, state: Tree, mask: Tensor | None = None) -> tuple[Tensor, Tree]:
        """Compute one time step; return the output and the next state."""

    def recur(self, weights: CellWeights, h: Tensor) -> Tensor:
        """Compute the recurrent product U h + b_hh."""
        return F.linear(h, weights["weight_hh"], weights.get("bias_hh"))

    def ended(
        self, y: Tensor, carried: tuple[Tensor, ...], norms: SiteStates, before: Tree, mask: Tensor | None
    ) -> tuple[Tensor, Tree]:
        """Return the output and the state of a step, with the state of masked rows unchanged."""
        if mask is None:
            return y, (carried, norms.states())
        return masked(y, mask), (where_mask(mask, carried, before[0]), norms.states())


class SiteStates:
    """The norms of a cell with their states, for one step: call it once for each site, then read `states`."""

    def __init__(self, cell: Cell, weights: CellWeights, states: Tree, mask: Tensor | None) -> None:
        self._norms, self._mask = weights.norms, mask
        self._states = dict(zip(cell.sites, states, strict=True))
        self._stepped: set[str] = set()

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """Normalize `x` at a site; return it unchanged if the site has no norm.

        Errors: `ValueError` for a site that the step has normalized before: its window would have the step twice.
        """
        norm = self._norms.get(site)
        if norm is None:
            return x
        if site in self._stepped:
            raise ValueError(mismatch("site", f"{site!r} twice in one step", "each site once, or another site"))
        self._stepped.add(site)
        y, self._states[site] = norm.step(x, self._states[site], self._mask)
        return y

    def states(self) -> tuple[Tree, ...]:
        """Return the state of every site, in the order of the cell's sites."""
        return tuple(self._states.values())


class CellSpec(Options, ABC):
    """Options of a cell: a frozen model with a `kind` and a method that builds the equations."""

    family: ClassVar[str | None] = "cell"
    kind: str

    @abstractmethod
    def build(self, hidden_size: int, placement: Placement) -> Cell:
        """Build the equations for a hidden size; `ValueError` if the cell does not support the placement."""


def refuse(placement: Placement, cell: str, **absent: str) -> None:
    """Raise `ValueError` for each placement option that the cell does not support, with the reason."""
    for option, reason in absent.items():
        value: Any = getattr(placement, option)
        default = Placement.model_fields[option].default
        if value != default:
            got = f"{value!r} with cell {cell!r}"
            raise SpecError.of([Problem(("placement", option), got, repr(default), detail=reason)])
