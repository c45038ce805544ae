"""Layout of a call, from its plan and sizes: expected tensors, and the positions of their addresses."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from atn_norms.backends.fused.inputs import Fitted, Grads, Inputs
from atn_norms.backends.fused.plan import BATCH, CELLS, DOUBLE, PLACES, Plan, SitePlan
from atn_norms.backends.native.library import CallArgs, word


class Layout:
    """Expected tensors of a call, and the structure that passes them to the kernels. A word has 8 bytes.

    | attribute | meaning |
    |---|---|
    | `shapes`, `dtypes` | of the tensors of `Inputs.flatten()` without None |
    | `structure` | a `CallArgs` with everything except threads and addresses of tensors of the call |
    | `fixed` | tensors of the layout by word: programs, eps, weights by age, absent gains and shifts |
    | `offsets` | byte offset of each site's timeline |
    | `forward`, `backward` | words for the addresses of timelines, inputs, and the other tensors of a call, in order |
    | `dstates`, `pooled_shapes` | shapes of the states, and of the pooled statistics that sites return |
    | `kept` | shapes of the tensors that forward keeps for backward; the last is the timelines |
    | `saved`, `saved_dtypes` | of the outputs, the gradients of outputs and last states, and the kept tensors |
    | `absent` | number of features of each absent gain and shift, whose gradients are not used |
    """

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype,
        sizes: tuple[int, int, int, int, int],
        biases: int,
        carried_on: bool,
        ragged: bool,
    ) -> None:
        steps, batch, inputs, hidden, output = sizes
        plan.check(hidden)
        if min(sizes) < 1 or dtype not in (torch.float32, DOUBLE):
            raise ValueError(f"plan: got sizes {list(sizes)} of {dtype}; expected positive sizes of float32 or float64")
        if biases == 1:
            raise ValueError("bias_hh: got one of two biases; expected both or none")
        wide, rows = (plan.gates * hidden,), (batch, hidden)
        self.kept = kept_shapes(plan, sizes[:4])
        self.dstates = [shape for site in plan.sites for shape in site.shapes(batch)]
        entries = [
            (word("xs"), (steps, batch, inputs), dtype),
            (word("weight_ih"), (*wide, inputs), dtype),
            (word("weight_hh"), (*wide, output), dtype),
            *[(word(name), wide, dtype) for name in ("bias_ih", "bias_hh")[:biases]],
            (word("h0"), (batch, output), dtype),
            (word("c0"), rows if plan.is_lstm else (0,), dtype),
            *([(word("weight_hr"), (output, hidden), dtype)] if plan.projected else []),
            *([(word("lengths"), (batch,), torch.int64)] if ragged else []),
        ]
        states, populations = [], []
        after, dafter, dbefore, daffine, dabsent, pooled, timelines = ([] for _ in range(7))
        self.pooled_shapes = [(steps, 2 * site.features + 1) for site in plan.measured]
        self.absent: list[int] = []
        self.offsets: list[int] = []
        self.fixed: dict[int, Tensor] = {}
        doubles = 0
        for site in plan.sites:
            at, leaves = PLACES[site.site], (0, 1, 2) if site.centred else (0, 2) if site.leaves else ()
            for name, there, value in (("gain", site.gain, 1.0), ("shift", site.shift, 0.0)):
                if there:
                    entries.append((word(name, at), (site.affine,), dtype))
                elif site.traced is None:
                    self.absent.append(site.features)
                    self.fixed[word(name, at)] = torch.full((site.features,), value, dtype=dtype, device="cpu")
                if there or site.traced is None:
                    (daffine if there else dabsent).append(word(f"d{name}", at))
            if site.coupled == BATCH:
                pooled.append(word("population", at))
            elif site.coupled:
                shape = site.populations(steps), 2 * site.features
                populations.append((word("population", at), shape, DOUBLE))
            for leaf, shape in zip(leaves, site.shapes(batch), strict=True):
                states.append((word("state", at, leaf), shape, DOUBLE))
            for role, words in (("next", after), ("dnext", dafter), ("dstate", dbefore)):
                words += [word(role, at, leaf) for leaf in leaves]
            timelines.append(word("timeline", at))
            self.offsets.append(8 * doubles)
            doubles += site.doubles(steps, batch)
            if site.traced is not None:
                programs = torch.frombuffer(bytearray(site.traced.words), dtype=torch.int64)
                self.fixed[word("programs", at)] = programs
            eps = [each for each in site.eps for _ in range(site.width // len(site.eps))]
            self.fixed[word("eps", at)] = torch.tensor(eps, dtype=DOUBLE, device="cpu")
            if site.taps:
                self.fixed[word("taps", at)] = torch.tensor(site.taps, dtype=DOUBLE, device="cpu")
        entries += populations
        entries += states if carried_on else []
        results = [(steps, batch, output), (batch, output), rows if plan.is_lstm else (0,)]
        self.saved = [results[0], *results, *self.kept]
        self.saved_dtypes = [dtype] * (len(self.saved) - 1) + [DOUBLE]
        given, self.shapes, self.dtypes = (list(column) for column in zip(*entries, strict=True))
        read = timelines + given
        self.forward = _words([*read, *_WRITTEN, *after, *pooled, *_KEPT])
        self.backward = _words([*read, *_KEPT, *_READ, *dafter, *_GRADS, *daffine, *dabsent, *dbefore])
        self.structure = _structure(plan, sizes, self.fixed)


_WRITTEN = [word(name) for name in ("output", "hn", "cn")]
_KEPT = [word(name) for name in ("projected", "recurrent", "cells", "units")]
_READ = [word(name) for name in ("output", "doutput")]
_GRADS = [word(name) for name in ("dh", "dc", "dxs", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dweight_hr")]


def _words(words: Sequence[int]) -> bytes:
    return struct.pack(f"{len(words)}q", *words)


def _window(site: SitePlan) -> int:
    return 3 if site.past else 2 if site.taps else 0 if site.steps else 1


def _structure(plan: Plan, sizes: tuple[int, int, int, int, int], fixed: Mapping[int, Tensor]) -> bytes:
    args = CallArgs()
    args.cell, args.joint, args.normed_carry = CELLS[plan.kind], plan.joint, plan.normed_carry
    args.steps, args.batch, args.inputs, args.hidden, output = sizes
    args.projection = output if plan.projected else 0
    for one in plan.sites:
        site = args.site[PLACES[one.site]]
        site.norm = (3 if one.coupled == BATCH else 4) if one.coupled else 1 if one.centred else 2
        site.window, site.populations = _window(one), one.populations(args.steps)
        site.features, site.groups, site.prefix = one.features, one.groups, one.prefix
        site.decay, site.detached = one.decay, one.detached
        if one.traced is not None:
            site.norm, site.parts, site.parameters, site.centred = 5, one.parts, one.traced.parameters, one.centred
    words = memoryview(args).cast("B").cast("q")
    for place, tensor in fixed.items():
        words[place] = tensor.data_ptr()
    return bytes(args)


CHEAP_INPUTS = 64  # input features up to which backward computes the projected input again

_layout = lru_cache(maxsize=512)(Layout)


def layout_of(plan: Plan, inputs: Inputs) -> Layout:
    """Return the layout of a plan for the sizes of the inputs."""
    xs, weight_hh = inputs.xs, inputs.weight_hh
    if xs.ndim != 3 or weight_hh.ndim != 2:
        raise RuntimeError(
            f"x: got shape {list(xs.shape)} and weight_hh {list(weight_hh.shape)}; expected 3 and 2 axes"
        )
    biases = (inputs.bias_ih is not None) + (inputs.bias_hh is not None)
    sizes = (*xs.shape, inputs.hidden, weight_hh.shape[1])
    return _layout(plan, weight_hh.dtype, sizes, biases, bool(inputs.states), inputs.lengths is not None)


def with_layout(plan: Plan, inputs: Inputs) -> Fitted:
    """Return inputs with their layout, unchecked."""
    tensors = [tensor.contiguous() for tensor in inputs.flatten() if tensor is not None]
    return Fitted(layout_of(plan, inputs), inputs, tensors)


def fits(given: Fitted) -> bool:
    """Return True if the tensors fit; the kernels receive addresses only."""
    layout, inputs, tensors = given
    return (
        len(layout.shapes) == len(tensors)
        and [tensor.shape for tensor in tensors] == layout.shapes
        and [tensor.dtype for tensor in tensors] == layout.dtypes
        and False not in [tensor.is_cpu for tensor in tensors]
        and _lengths_fit(inputs)
    )


def fits_backward(layout: Layout, grads: Grads, ys: Tensor, kept: Sequence[Tensor]) -> bool:
    """Return True if the tensors of a backward pass besides its inputs fit."""
    tensors = [ys, *grads[:3], *kept]
    return (
        [tensor.shape for tensor in tensors] == layout.saved
        and [tensor.dtype for tensor in tensors] == layout.saved_dtypes
        and len(grads.states) == len(layout.dstates)
        and False not in [tensor.is_cpu for tensor in tensors]
        and False not in [tensor.is_contiguous() for tensor in kept]
        and all(
            leaf is None or (leaf.shape == shape and leaf.dtype == DOUBLE and leaf.is_cpu)
            for leaf, shape in zip(grads.states, layout.dstates, strict=True)
        )
    )


def _lengths_fit(inputs: Inputs) -> bool:
    if inputs.lengths is None or not inputs.lengths.numel():
        return True
    least, most = torch.aminmax(inputs.lengths)
    return 0 <= int(least) and int(most) <= inputs.xs.shape[0]


def kept_shapes(plan: Plan, sizes: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    """Return the shapes of the kept tensors: projected inputs, recurrent products, cell states, units, timelines.

    `sizes` are steps, rows, inputs and hidden units.

    With few input features, backward projects the inputs again, which costs less than keeping the projections.
    """
    steps, batch, inputs, hidden = sizes
    wide = plan.gates * hidden
    return [
        (steps if inputs > CHEAP_INPUTS and not plan.joint else 0, batch, wide),
        (steps, batch, wide),
        (steps if plan.is_lstm else 0, batch, hidden),
        (steps if plan.projected else 0, batch, hidden),
        (sum(site.doubles(steps, batch) for site in plan.sites),),
    ]
