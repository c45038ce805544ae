"""Arguments of the operators: their order, their types, and their form as a flat list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of a call; schemas, fakes and autograd of the operators are generated from this class.

    | field | meaning | shape |
    |---|---|---|
    | `xs` | inputs, time first | `[T, B, D]` |
    | `weight_ih`, `weight_hh` | N = gates * H; R = H without a projection | `[N, D]`, `[N, R]` |
    | `bias_ih`, `bias_hh` | or None | `[N]` |
    | `h0`, `c0` | initial state; c0 of a cell without one is empty | `[B, R]`, `[B, H]` |
    | `weight_hr` | of a projection, or None | `[R, H]` |
    | `affine` | gain and shift of every site that has them, in order | `[F]` each |
    | `populations` | population means and variances of every site that uses them | `[1 or T, 2 F]` each |
    | `states` | every site's leaves, in order, or none where all are fresh | |
    | `lengths` | steps of each row, or None | `[B]` |

    The gradients of a call have the same form, with None for an absent gradient.
    """

    xs: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    h0: Tensor
    c0: Tensor
    weight_hr: Tensor | None
    affine: Sequence[Tensor]
    populations: Sequence[Tensor]
    states: Sequence[Tensor]
    lengths: Tensor | None

    def flatten(self) -> list[Tensor | None]:
        """Return all tensors in one list: first the single tensors, then the tensors of the sequences."""
        xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, affine, populations, states, lengths = self
        single = [xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, lengths]
        return [*single, *affine, *populations, *states]

    @property
    def hidden(self) -> int:
        """Return H."""
        return (self.weight_hh if self.weight_hr is None else self.weight_hr).shape[-1]

    @property
    def arguments(self) -> list[Any]:
        """Return the arguments of an operator: None for an empty sequence, which AOTInductor cannot pass."""
        fields: Sequence[Any] = list(self)
        return [None if place in MANY and not field else field for place, field in enumerate(fields)]

    @staticmethod
    def of(arguments: Sequence[Any]) -> Inputs:
        """Return the inputs from the arguments of an operator."""
        return Inputs._make([[] if place in MANY and a is None else a for place, a in enumerate(arguments)])

    @property
    def counts(self) -> tuple[int, ...]:
        """Lengths of the sequences."""
        fields: Sequence[Any] = list(self)
        return tuple([len(fields[place]) for place in MANY])

    def gradients(self, found: Sequence[Tensor], wants_xs: bool) -> Inputs:
        """Return the results of the backward operator as gradients of these inputs."""
        dxs, dwi, dwh, *biases, dh0, dc0, dwr = found[:8]
        dwr = None if self.weight_hr is None else dwr
        biases = [None, None] if self.bias_ih is None else biases
        affine, populations, states = self.counts
        rest = found[8 : 8 + affine], [None] * populations, found[8 + affine : 8 + affine + states]
        return Inputs._make([dxs if wants_xs else None, dwi, dwh, *biases, dh0, dc0, dwr, *rest, None])

    @property
    def places(self) -> list[int]:
        """Indices of the differentiable tensors in the flat list, in the order of the backward operator's results."""
        affine, populations, states = self.counts
        single = [place for place in range(len(SINGLE) - 1) if self[place] is not None]  # the last is `lengths`
        start = len(SINGLE) + affine
        return [*single, *range(len(SINGLE), start), *range(start + populations, start + populations + states)]

    @staticmethod
    def unflatten(flat: Sequence[Any], counts: Sequence[int]) -> Inputs:
        """Return the inputs from a flat list, which may have further elements."""
        fields: list[Any] = [None] * len(Inputs._fields)
        for place, tensor in zip(SINGLE, flat, strict=False):
            fields[place] = tensor
        start = len(SINGLE)
        for place, count in zip(MANY, counts, strict=True):
            fields[place] = list(flat[start : start + count])
            start += count
        return Inputs._make(fields)


class Fitted(NamedTuple):
    """Inputs that fit a plan, with their layout, and all tensors other than None, contiguous."""

    layout: Any
    inputs: Inputs
    tensors: list[Tensor]


class Grads(NamedTuple):
    """Gradients of the results; in `states`, None for a leaf without a gradient."""

    ys: Tensor
    hn: Tensor
    cn: Tensor
    states: Sequence[Tensor | None]

    @staticmethod
    def of(single: Sequence[Tensor | None], states: Sequence[Tensor | None], like: Sequence[Tensor]) -> Grads:
        """Return the gradients, with zeros like these tensors for absent gradients of single tensors."""
        ys, hn, cn = (torch.zeros_like(a) if g is None else g for g, a in zip(single, like, strict=True))
        return Grads(ys, hn, cn, states)


_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]?",
    Sequence[Tensor | None]: "Tensor?[]",
}
_KINDS = [_TYPES[kind] for kind in get_type_hints(Inputs).values()]
SINGLE = tuple(place for place, kind in enumerate(_KINDS) if "[]" not in kind)
MANY = tuple(place for place, kind in enumerate(_KINDS) if "[]" in kind)


def schema_of(kind: Any, prefix: str = "") -> list[str]:
    """Return the fields of a named tuple of tensors as arguments of a torch operator."""
    return [f"{_TYPES[hint]} {prefix}{name}" for name, hint in get_type_hints(kind).items()]
