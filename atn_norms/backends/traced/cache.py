"""A cache of traced normalizers; each is traced once in a process and compared with its Python code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from atn_norms.backends.code import (
    NORM,
    SIMPLE,
    Snapshot,
    code_names,
    frozen,
    held,
    held_states,
    is_followed,
    is_generated,
    is_own,
    module_state,
    norm_state,
    snapshot_of,
)
from atn_norms.backends.native.library import constant_to_compilers
from atn_norms.backends.traced.comparison import difference_in_float32, differences
from atn_norms.backends.traced.narrowing import narrowed
from atn_norms.backends.traced.normalizer import TracedNorm, trace, twin_of
from atn_norms.backends.traced.recorder import Untraceable
from atn_norms.errors import with_article
from atn_norms.modes import in_transform, on_cpu
from atn_norms.normalizers import Normalizer, PerGate
from atn_norms.normalizers.base import has_population

TOLERANCE = 1e-10  # largest difference on random rows of a few dozen features in float64, whose rounding is about 1e-14
MOST = 1024  # number of traced normalizers in the cache
TYPES = {"dtype", "finfo", "is_floating_point", "element_size", "itemsize", "get_default_dtype", "type"}
TYPED = 1e-3  # largest difference of code that runs in float32
MOST_TRACES = 32  # of one normalizer; a trace takes a tenth of a second
MODES = {
    "requires_grad",
    "is_leaf",
    "grad_fn",
    "retains_grad",
    "is_grad_enabled",
    "is_inference",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
}
# Names that read what no code shows.
HIDDEN = {"globals", "eval", "exec", "__import__", "environ", "getenv", "to_dlpack", "_to_dlpack"}

UNPREPARED = (
    "was not called before a compiler or a transform of torch, which cannot trace it; call the layer once before"
)

CHANGES = "it has a value that changes between calls, and every value needs a trace; keep the value in a buffer"

_traces: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_kept: dict[Any, TracedNorm | str] = {}  # by features, default type and fingerprint


def traced_norm(normalizer: Normalizer, features: int) -> TracedNorm | str:
    """Return the programs of a normalizer over `features` features, or the reason why there are none."""
    if has_population(normalizer) and type(normalizer) is not PerGate:
        return "it overrides population, which has no native kernel"
    if normalizer.uses_batch_statistics:
        return "it merges the rows of a batch before the window and is not declared as batch_moments"
    if torch.jit.is_tracing():
        with _paused_trace():
            return traced_norm(normalizer, features)
    try:
        key = features, torch.get_default_dtype(), fingerprint(normalizer)
        found = _kept.get(key)
    except _Unfrozen as error:
        return str(error)
    if found is None:
        if any(tensor.is_meta for tensor in (*normalizer.parameters(), *normalizer.buffers())):
            return "its tensors are on the meta device, which has no values"  # not cached: they may get values
        if torch.compiler.is_compiling() or in_transform() or not _is_plain(normalizer):
            warn_unprepared()
            return UNPREPARED  # not cached: the next call may trace it
        _traces[normalizer] = _traces.get(normalizer, 0) + 1
        if _traces[normalizer] > MOST_TRACES:
            return CHANGES
        found = _checked(normalizer, features)
        if len(_kept) >= MOST:
            _kept.clear()
        _kept[key] = found
    return found


@contextmanager
def _paused_trace() -> Iterator[None]:
    """Pause `torch.jit.trace`, in which sizes are tensors."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@constant_to_compilers
def warn_unprepared() -> None:
    """Warn if a norm has no program yet and none can be made here."""
    warnings.warn(f"got a norm that {UNPREPARED}; the reference runs it", RuntimeWarning, stacklevel=2)


def _is_plain(normalizer: Normalizer) -> bool:
    """Return True if all tensors of a normalizer can be copied: none is fake, functional, distributed or computed."""
    tensors = (*normalizer.parameters(), *normalizer.buffers())
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_leaf for tensor in tensors)


def _checked(normalizer: Normalizer, features: int) -> TracedNorm | str:
    for name, function in _names_in(normalizer, MODES):
        return f"it reads {name} in {function}, which may change between two calls of a program"
    for name, function in _names_in(normalizer, HIDDEN):
        return f"it uses {name} in {function}, so a value could change unnoticed"
    # The first layer of a kind may be built inside any mode of torch; no mode may affect the trace.
    with (
        on_cpu(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        _disable_current_modes(),
    ):
        executed: dict[CodeType, str] = {}
        traced = trace(normalizer, features, executed)
        if isinstance(traced, str):
            return traced
        followed = {code for snapshot in _snapshots(normalizer) for code in snapshot.codes}
        for code, module in executed.items():
            if code not in followed and not is_generated(code) and is_own(module, type(normalizer)):
                place = f"{Path(code.co_filename).name}, line {code.co_firstlineno}"
                return f"it calls {code.co_qualname} ({place}), whose changes could not be noticed"
        try:
            found = differences(normalizer, traced)
            if _changes_itself(normalizer, features):
                return "its methods change an attribute or a global at every call"
        except (Untraceable, _Unfrozen) as error:
            return str(error)
        if any(_names_in(normalizer, TYPES)) and not difference_in_float32(normalizer, traced) <= TYPED:
            return "its result depends on the type of x in another way than by rounding"
    worst = {name: value for name, value in found.items() if not value <= TOLERANCE}
    if not worst:
        return narrowed(normalizer, traced)
    numbers = ", ".join(f"{name} by {value:.1e}" for name, value in worst.items())
    reason = f"its native program differs from its Python ({numbers}, relative, on random rows in float64)"
    warnings.warn(f"{type(normalizer).__name__}: {reason}; the reference runs it", RuntimeWarning, stacklevel=2)
    return reason


def _changes_itself(normalizer: Normalizer, features: int) -> bool:
    """Check whether every call changes an attribute, or a global that the code reads; the first call may set them."""
    twin = twin_of(normalizer, 0)
    x = torch.randn(2, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = []
    for _ in range(2):
        twin.normalize(x, twin.measure(x))
        states.append(fingerprint(twin))
    return states[0] != states[1]


def _names_in(normalizer: Normalizer, names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield each name that the code of a normalizer has, with the function that has it."""
    for snapshot in _snapshots(normalizer):
        for function, code, *_ in snapshot.functions:
            yield from ((name, function.__qualname__) for name in code_names(code) if name in names)


def _snapshots(normalizer: Normalizer) -> Iterator[Snapshot]:
    """Yield the snapshots of everything that the fingerprint of a normalizer follows."""
    for module in normalizer.modules():
        yield snapshot_of(type(module), NORM if isinstance(module, Normalizer) else ())
        for _, value in _values(module, is_followed(type(module))):
            yield from (each for each in held(value, type(module)) if isinstance(each.state, int))


class _Unfrozen(Exception):
    pass


_MODULE = frozenset(nn.Module().__dict__) - {"training"}


def fingerprint(module: nn.Module) -> Any:
    """Return a hashable value that changes with everything a module's code may depend on, except tensor elements.

    Errors: an attribute that could change unnoticed, such as an object of a class of your own.
    """
    kind = type(module)
    state = norm_state(kind) if isinstance(module, Normalizer) else module_state(kind)
    if isinstance(state, str):
        raise _Unfrozen(state)
    own = []
    for name, value in _values(module, bool(state)):
        try:
            own.append((name, frozen(value), () if type(value) in SIMPLE else held_states(value, kind)))
        except TypeError:
            problem = f"its attribute {name!r} is {with_article(type(value).__name__)}, which may change unnoticed"
            raise _Unfrozen(problem) from None
    tensors = [
        (name, None if t is None else (t.shape, t.dtype.is_floating_point or t.dtype))
        for name, t in (*module._parameters.items(), *module._buffers.items())
    ]
    modules = [(name, None if child is None else fingerprint(child)) for name, child in module._modules.items()]
    return kind, state, tuple(own), tuple(tensors), tuple(modules)


def _values(module: nn.Module, in_snapshot: bool) -> list[tuple[str, Any]]:
    """Return the attributes of a module that torch does not set itself, and those of a class that is in no snapshot."""
    values = [item for item in module.__dict__.items() if item[0] not in _MODULE]
    kind = type(module)
    return values if in_snapshot else values + [(name, getattr(kind, name, None)) for name in _class_names(kind)]


@constant_to_compilers
def _class_names(kind: type) -> tuple[str, ...]:
    """Return the names of the attributes and methods of a class of this package or of torch."""
    return _found_names(kind)


@lru_cache(maxsize=1024)
def _found_names(kind: type) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if base in (Normalizer, nn.Module):
            break
        names |= dict.fromkeys(
            name for name in vars(base) if not name.startswith("__") and name not in ("_abc_impl", "_defined")
        )
    return tuple(names)
