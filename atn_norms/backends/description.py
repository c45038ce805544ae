"""The description of a layer's cell: a frozen value without tensors, on which the choice of a program depends."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from atn_norms.backends.fused.plan import (
    BATCH,
    KERNEL_CELLS,
    MOST_GROUPS,
    POPULATION,
    POPULATIONS,
    SitePlan,
)
from atn_norms.backends.fused.plugin_windows import recognized, unrecognized_reason
from atn_norms.backends.program import Unsupported
from atn_norms.backends.traced.cache import traced_norm
from atn_norms.backends.traced.normalizer import TracedNorm, tensors_of
from atn_norms.cells import Cell, CellWeights
from atn_norms.modes import unsupported_transform
from atn_norms.normalizers import (
    BatchMoments,
    FeatureMoments,
    Normalizer,
    PerGate,
    batch_moments,
    feature_moments,
)
from atn_norms.normalizers.base import each_eps, has_hooks
from atn_norms.windows import Cumulative, Detached, Exponential, Sliding, Window


class Description(NamedTuple):
    """The properties on which a program depends besides the cell; equal descriptions have equal programs.

    | field | meaning |
    |---|---|
    | `dtype`, `device` | type of the weights, and kind of their device |
    | `transform` | the transform of torch that is active and has no rule for operators, as a reason, or None |
    | `normed` | names of the sites that have a norm |
    | `sites` | normalizer and window of each site, or the reason why no kernel has them; empty if no kernel can run |
    """

    dtype: torch.dtype
    device: str
    transform: str | None
    normed: tuple[str, ...]
    sites: tuple[SitePlan | Unsupported, ...]


class TracedSite(NamedTuple):
    """A traced normalizer at a site, once or for each of `parts` gates; `gain` is its parameters and buffers, flat."""

    traced: TracedNorm
    parts: int
    gain: Tensor | None
    shift: None = None


WRITE = "write the normalizer with the operations that docs/backends.md lists"
WINDOWS = "use a window of this package, or one of the forms that docs/windows.md lists"

Declared: TypeAlias = FeatureMoments | BatchMoments | TracedSite


def describe(cell: Cell, weights: CellWeights) -> tuple[Description, tuple[Declared, ...]]:
    """Return the description of a cell with weights, and the tensors of the norms as the normalizers declare them.

    This runs for every call, since a normalizer may have changed.
    """
    like = weights.like
    transform = unsupported_transform()
    sites: list[SitePlan | Unsupported] = []
    declared: list[Declared] = []
    if transform is None and type(cell) in KERNEL_CELLS:
        features, dtype = cell.sites, like.dtype
        for site, norm in weights.norms.items():
            found = _declared(norm.normalizer, site, features[site])
            if not isinstance(found, Unsupported):
                declared.append(found)
                found = _site_plan(cell, site, features[site], found, norm.window, dtype)
            sites.append(found)
    return Description(like.dtype, like.device.type, transform, tuple(weights.norms), tuple(sites)), tuple(declared)


def _declared(normalizer: Normalizer, site: str, features: int) -> Declared | Unsupported:
    """Return the form in which kernels compute a normalizer, or the reason why they do not."""
    if has_hooks(normalizer):
        text = f"the norm at {site} has hooks or a replaced `forward`, which only the reference calls"
        return Unsupported("norm", text, "remove the hooks")
    moments = feature_moments(normalizer) or batch_moments(normalizer)
    if moments is None:
        traced = _traced_site(normalizer, features)
        if isinstance(traced, str):
            return Unsupported("norm", f"the norm at {site} ({type(normalizer).__name__}): {traced}", WRITE)
        return traced
    moments.check(features)
    if isinstance(moments, FeatureMoments) and moments.groups > MOST_GROUPS:
        text = f"the norm at {site} has {moments.groups} groups, and it takes at most {MOST_GROUPS}"
        return Unsupported("norm", text, f"use at most {MOST_GROUPS} groups")
    return moments


def _traced_site(normalizer: Normalizer, features: int) -> TracedSite | str:
    """Return the form in which kernels run a normalizer without declared moments, or the reason why they do not."""
    norms = (normalizer,)
    if type(normalizer) is PerGate:
        norms = tuple(gate for gate in normalizer.gates if isinstance(gate, Normalizer))
    every = [traced_norm(norm, features // len(norms)) for norm in norms]
    first = every[0]
    if isinstance(first, str):
        return first
    separate = all(other == first for other in every[1:]) and all(len(leaf) == 1 for leaf in first.leaves)
    if len(norms) > 1 and not separate:  # one program for all gates
        norms, first = (normalizer,), traced_norm(normalizer, features)
        if isinstance(first, str):
            return first
    tensors = [tensor for norm in norms for tensor in tensors_of(norm)]
    if len(tensors) == 1 and tensors[0].dim() == 1:
        return TracedSite(first, len(norms), tensors[0])
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else None
    return TracedSite(first, len(norms), flat)


def _site_plan(
    cell: Cell, site: str, features: int, declared: Declared, window: Window, dtype: torch.dtype
) -> SitePlan | Unsupported:
    gain, shift = declared.gain, declared.shift
    if (gain is not None and gain.dtype != dtype) or (shift is not None and shift.dtype != dtype):
        return Unsupported(
            "norm", f"the norm at {site} is of another type than the layer, {dtype}", f"convert it to {dtype}"
        )
    stateless = isinstance(declared, TracedSite) and not declared.traced.leaves
    pooled = WindowPlan(1, 1.0, window.detaches_past) if stateless else window_of(window)
    if pooled is None or (pooled.past and isinstance(declared, BatchMoments)):
        reason = unrecognized_reason(window.window if type(window) is Detached else window) if pooled is None else ""
        text = f"it has no kernel for the window {window!r} at {site}"
        return Unsupported("window", f"{text}: {reason}" if reason else text, WINDOWS)
    affine = gain is not None, shift is not None
    if isinstance(declared, TracedSite):
        return _traced_plan(site, features, declared, pooled, affine)
    eps = each_eps(declared)
    if isinstance(declared, FeatureMoments):
        return _plan(site, features, declared.groups, declared.centred, eps, pooled, affine, declared.leaf)
    kind = BATCH if declared.measured else POPULATIONS if declared.per_step else POPULATION
    leaf = declared.shape or (features,)
    return _plan(site, features, cell.gates_at(site), True, eps, pooled, affine, leaf, kind)


def _traced_plan(
    site: str, features: int, declared: TracedSite, pooled: WindowPlan, affine: tuple[bool, bool]
) -> SitePlan:
    traced, parts = declared.traced, declared.parts
    groups = parts * traced.width
    leaf = traced.leaves[0] if len(traced.leaves) == 1 or traced.centred else (traced.width,)
    leaf = ((parts, *leaf) if parts > 1 else leaf) if groups else ()
    return _plan(site, features, groups, traced.centred, (0.0,), pooled, affine, leaf, 0, traced, parts)


def _plan(
    site: str,
    features: int,
    groups: int,
    centred: bool,
    eps: tuple[float, ...],
    window: WindowPlan,
    affine: tuple[bool, bool],
    leaf: tuple[int, ...],
    coupled: int = 0,
    traced: TracedNorm | None = None,
    parts: int = 1,
) -> SitePlan:
    steps, decay, detached, taps, past = window
    numbers = features, groups, centred, eps, steps, decay
    return SitePlan(site, *numbers, *affine, leaf, coupled, traced, parts, detached, taps, past)


class WindowPlan(NamedTuple):
    """The fields of a `SitePlan` that describe the window."""

    steps: int
    decay: float
    detached: bool = False
    taps: tuple[float, ...] = ()
    past: bool = False


def window_of(window: Window) -> WindowPlan | None:
    """Return the plan of a window that the kernels support, or None."""
    inner = window.window if type(window) is Detached else window
    detached = window.detaches_past
    if type(inner) is Sliding:
        return WindowPlan(inner.steps, 1.0, detached)
    if type(inner) is Cumulative:
        return WindowPlan(0, 1.0, detached)
    if type(inner) is Exponential:
        return WindowPlan(0, 2.0 ** (-1.0 / inner.half_life), detached)
    found = recognized(inner)
    if found is None:
        return None
    taps = () if set(found.taps) == {1.0} else found.taps
    return WindowPlan(len(found.taps), found.decay, detached, taps, found.past)
