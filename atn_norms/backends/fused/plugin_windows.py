"""Windows of plugins that the kernels run: with weights by age, or with a running state."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import log2
from os import urandom
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atn_norms.backends.code import frozen, held_states, window_state
from atn_norms.backends.traced.linearity import check_linear
from atn_norms.backends.traced.recorder import Untraceable
from atn_norms.modes import on_cpu
from atn_norms.pytree import Tree, expand_mask, tree_leaves, where_mask
from atn_norms.statistics import Average, CountedMoments, Moments
from atn_norms.windows import Cumulative, Detached, Exponential, Sliding, Window

MOST_WINDOWS = 256  # number of windows whose comparison is kept
MOST_AGES = 1024  # largest number of weights by age; a window must have no weight from here to four times this age
_LEAST = torch.finfo(torch.float64).tiny  # the smallest weight by age
_TOLERANCE = 1e-12  # rounding of sums of so many numbers near 1
_STEPS = 12
_SIZES = 1.0, 1e-3, 1e-1, 1e1, 1e3, 0.0, 1.0  # of the statistics of each row; 0 shows an added constant
_TOTALS = 1.0, 2.0, 1e1, 1e2, 1e4, 1e1, 1e6  # weights of a running state
_TINY = 2.0**-70  # weight of a step that leaves the rounded total weight of the past as it is
_KINDS: tuple[tuple[Any, tuple[int, ...]], ...] = ((Average, (2,)), (Moments, (2, 2)), (CountedMoments, (2, 2, 1)))


@dataclass(frozen=True)
class Weighted(Window[Any]):
    """A weight for each age, zero beyond; the state is that of the sliding window of the same length.

    | symbol | meaning | |
    |---|---|---|
    | `taps` | weights by age in unmasked steps, the last one positive | |
    """

    taps: tuple[float, ...]

    @property
    def reach(self) -> Sliding[Any]:
        """Return the sliding window of the same length."""
        return Sliding(len(self.taps))

    def initial(self, now: Any) -> Tree:
        return self.reach.initial(now)

    def layout(self, now: Any) -> Any:
        return self.reach.layout(now)

    def push(self, now: Any, weight: Tensor, state: Tree) -> tuple[Any, Tree]:
        weights = torch.cat([state[0].detach(), weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        pooled = type(now)(*leaves).pool(weights * weights.new_tensor(self.taps[::-1]), 1)
        return pooled, where_mask(weight > 0, (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves)), state)


@dataclass(frozen=True)
class Past(Window[Any]):
    """The unmasked steps before the current step, with weights that fall by `decay`; at first the current step."""

    decay: float

    def initial(self, now: Any) -> Tree:
        return Cumulative[Any]().initial(now)

    def layout(self, now: Any) -> Any:
        return Cumulative[Any]().layout(now)

    def push(self, now: Any, weight: Tensor, state: Tree) -> tuple[Any, Tree]:
        total, past = state[0].detach(), state[1]
        pairs = list(zip(past, now, strict=True))
        pooled = type(now)(*(torch.where(expand_mask(total > 0, new), old, new) for old, new in pairs))
        both = type(now)(*(torch.stack(pair, 1) for pair in pairs))
        after = both.pool(torch.stack([total * self.decay, weight], 1), 1)
        return pooled, where_mask(weight > 0, (total * self.decay + weight, tuple(after)), state)


class Recognized(NamedTuple):
    """The form in which the kernels run a window: weights by age, or the decay per step of a running state."""

    taps: tuple[float, ...] = ()
    decay: float = 1.0
    past: bool = False  # the current step is excluded


def recognized(window: Window[Any]) -> Recognized | None:
    """Return the form in which the kernels run a plugin's window, or None.

    The window must be a frozen dataclass, with declared weights by age and a state like that of `Sliding`, or with a
    state like that of `Exponential`. Its code must be linear in the statistics, with weights that do not depend on
    them. Values, states and gradients are compared once for each window, on random steps.
    """
    found = _form_or_reason(window)
    return None if isinstance(found, str) else found


def unrecognized_reason(window: Window[Any]) -> str:
    """Return why the kernels do not run a plugin's window that has one of their forms; empty if it has none of them."""
    found = _form_or_reason(window)
    return found if isinstance(found, str) else ""


def _form_or_reason(window: Window[Any]) -> Recognized | str:
    kept, now = getattr(window, _KEPT, None), (_PROCESS, window_state(type(window)), _held(window))
    if kept is not None and kept[0] == now:
        return kept[1] if isinstance(kept[1], str) else Recognized(*kept[1])
    parameters = getattr(type(window), "__dataclass_params__", None)
    if torch.compiler.is_compiling() or parameters is None or not parameters.frozen:
        return ""
    if type(window).scan is not Window.scan or isinstance(now[1], str) or any(isinstance(s, str) for s in now[2]):
        return ""
    try:
        key = now, frozen(window)
        if key not in _compared:
            if len(_compared) >= MOST_WINDOWS:
                _compared.clear()
            _compared[key] = _recognized(window)
        found = _compared[key]
    except Exception:  # noqa: BLE001 - a plugin's own code may raise anything on numbers that it does not expect
        found = ""
    with suppress(AttributeError):  # a dataclass with slots
        object.__setattr__(window, _KEPT, (now, found if isinstance(found, str) else tuple(found)))
    return found


# The attribute of a window in which a compiler finds the result without running the comparison. A window from another
# process, where the plugin may have been different, is compared again.
_KEPT, _PROCESS = "_atn_norms_recognized", urandom(8).hex()


_compared: dict[Any, Recognized | str] = {}


def _held(window: Window[Any]) -> tuple[int | str, ...]:
    """Return the states of the functions and classes of plugins in the fields of a window."""
    values = [getattr(window, name, None) for name in getattr(type(window), "__dataclass_fields__", ())]
    return held_states(values, type(window)) if any(type(value) not in (int, float, bool) for value in values) else ()


def _recognized(window: Window[Any]) -> Recognized | str:
    """Compare a window with those of the kernels; return its form, or the reason why they do not run it."""
    with (
        on_cpu(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        taps = _taps(window)
        decay = None if taps else _decay(window)
        if not taps and decay is None:
            return ""
        try:
            for kind, sizes in _KINDS:
                _check_structure(window, kind, sizes)
        except Untraceable as error:
            return str(error)
        forms = [Recognized(taps)] if decay is None else [Recognized(decay=decay, past=past) for past in (True, False)]
        return next((form for form in forms if _agrees(window, _window_of(form))), "")


def _window_of(form: Recognized) -> Window[Any]:
    if form.taps:
        return Weighted(form.taps)
    if form.past:
        return Past(form.decay)
    return Cumulative[Any]() if form.decay == 1.0 else Exponential[Any](-1.0 / log2(form.decay))


def _check_structure(window: Window[Any], kind: Any, sizes: tuple[int, ...]) -> None:
    """Raise `Untraceable` unless the code of a window is linear in the statistics, whatever their numbers."""
    source, rows = torch.Generator().manual_seed(5), len(_SIZES)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=source, dtype=torch.float64) + 0.5

    now = kind(*(random(rows, size).requires_grad_() for size in sizes))
    check_linear(lambda: ((), list(tree_leaves(window.initial(now)))), now, ())
    like = window.initial(now)
    weights, past = random(*like[0].shape), tuple(random(*leaf.shape).requires_grad_() for leaf in like[1])
    mask = random(rows).gt(1.0).double()

    def push() -> tuple[list[Tensor], list[Tensor]]:
        pooled, (after, leaves) = window.push(now, mask, (weights, past))
        return [*pooled, *leaves], [after]

    check_linear(push, [*now, *past], [weights, mask], gradients=kind is Average)


def _taps(window: Window[Any]) -> tuple[float, ...]:
    """Return the declared weights by age; empty if there are none, or too many.

    The kernels use the reciprocal of a total weight, so weights with an infinite reciprocal have no kernel.
    """
    weights = window.weight_at(torch.arange(4 * MOST_AGES, dtype=torch.float64))
    if weights is None or not bool((weights.isfinite() & ((weights == 0) | (weights >= _LEAST))).all()):
        return ()
    ages = torch.nonzero(weights).flatten()
    if len(ages) == 0 or int(ages[-1]) >= MOST_AGES:
        return ()
    return tuple(weights[: int(ages[-1]) + 1].double().tolist())


def _decay(window: Window[Any]) -> float | None:
    """Return the factor of the total weight of a running state for one step; None for another kind of state."""
    now = Average(torch.zeros(1, 1, dtype=torch.float64))
    if window.layout(now) != Cumulative[Any]().layout(now):
        return None
    one, tiny = torch.ones(1, dtype=torch.float64), torch.full((1,), _TINY, dtype=torch.float64)
    total = float(window.push(now, tiny, (one, (now.mean,)))[1][0])
    return total if 0.0 < total <= 1.0 else None


def _agrees(window: Window[Any], known: Window[Any]) -> bool:
    """Return True if two windows agree in values, states and gradients, over masked steps from a random state."""
    other = Detached(known) if window.detaches_past else known
    for kind, sizes in _KINDS:
        now = kind(*(torch.zeros(len(_SIZES), size, dtype=torch.float64) for size in sizes))
        if window.layout(now) != known.layout(now):
            return False
        found, expected = (_outcome(each, kind, sizes, known.initial(now)) for each in (window, other))
        if len(found) != len(expected) or not all(map(_close, found, expected)):
            return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    """Return True if each row is equal up to the rounding of its largest number."""
    if a.shape != b.shape:
        return False
    largest = b.abs().reshape(len(b), -1).amax(1).reshape(-1, *[1] * (b.ndim - 1)) if b.numel() else b
    return bool(((a - b).abs() <= _TOLERANCE * largest).all())


def _outcome(window: Window[Any], kind: Any, sizes: tuple[int, ...], like: Tree) -> list[Tensor]:
    """Return pooled statistics, states and gradients of some steps, from a random state and from the initial state.

    Each row has statistics of another size, and after the random state another total weight, so that a window is found
    whose result depends on them in another way. The rows of every tensor come first.
    """
    source, rows = torch.Generator().manual_seed(3), len(_SIZES)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=source, dtype=torch.float64) + 0.5

    def statistic(place: int, *shape: int) -> Tensor:
        """Return a random leaf: a mean of both signs, a variance, or a count."""
        value = random(*shape)
        scale = value.new_tensor(_SIZES).reshape(-1, *[1] * (value.ndim - 1))
        if place == 0:
            return scale * value * (torch.rand(shape, generator=source) - 0.5).sign()
        return value if place == 2 else scale.square() * value

    steps = [kind(*(statistic(place, rows, size) for place, size in enumerate(sizes))) for _ in range(_STEPS)]
    if kind is CountedMoments:  # a window of one step returns the count of the step, others their total weight
        steps = [kind(mean, var, torch.ones_like(count)) for mean, var, count in steps]
    for step in steps:
        for leaf in step:
            leaf.requires_grad_()
    factors = [random(rows, size) for size in sizes]
    weights = random(*like[0].shape).gt(0.8).double()
    weights[-1] = 1.0
    if weights.ndim == 1:
        weights = weights * weights.new_tensor(_TOTALS)
    opened = weights, tuple(statistic(place, *leaf.shape).requires_grad_() for place, leaf in enumerate(like[1]))
    masks = torch.rand(_STEPS, rows, generator=source, dtype=torch.float64).gt(0.3).double()
    masks[0] = 1.0
    results: list[Tensor] = []
    losses = []
    for state in (opened, window.initial(steps[0])):
        for step, mask in zip(steps, masks, strict=True):
            pooled, state = window.push(step, mask, state)
            shown = [torch.where((mask > 0).unsqueeze(1), leaf, 0.0) for leaf in pooled]
            losses += [(leaf * factor).sum() for leaf, factor in zip(shown, factors, strict=True)]
            results += shown
        results += list(tree_leaves(state))
    wanted = [leaf for step in steps for leaf in step] + list(opened[1])
    found = torch.autograd.grad(torch.stack(losses).sum(), wanted, allow_unused=True)
    results += [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
    return [leaf.detach() for leaf in results]
