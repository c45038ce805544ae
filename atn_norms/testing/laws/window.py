"""Laws of a window: its state is passed along, steps count as declared, and steps outside it are forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.pytree import expand_mask, layout, reorder, tree_leaves, tree_map
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.subjects import WindowSubject, at, pushed
from atn_norms.windows import Window

CLOSE = 1e-9  # float64: merges of a few dozen steps are exact to 1e-14
FARTHEST = 64  # unmasked steps: a window that reaches further back counts as one that never forgets
SPIKE = 1e8


def live(pooled: Any, weights: Tensor) -> list[Tensor]:
    """Return the pooled leaves of the unmasked steps; the others have no meaning."""
    return [leaf[weights > 0] for leaf in pooled]


@law("window")
def a_scan_is_its_pushes(subject: WindowSubject, case: Case) -> None:
    """`scan` gives what `push` gives step by step, from any state, and returns an equivalent state.

    A cell pushes its recurrent side and scans its input side, so both must be the same window. A push cannot look
    ahead, so a scan that agrees with it does not look ahead either.
    """
    window, steps, weights = subject.make(case), subject.statistics(case), subject.weights(case)
    more = subject.statistics(case, seed=700)
    ones = torch.ones(weights.shape, dtype=torch.float64)
    for cut in range(case.steps):
        state = subject.fresh(window, steps)
        if cut:
            _, state = window.scan(at(steps, slice(0, cut)), weights[:cut], state)
        remaining, late = at(steps, slice(cut, None)), weights[cut:]
        pooled, scanned = window.scan(remaining, late, state)
        expected, stepped = pushed(window, remaining, late, state)
        compare(live(pooled, late), live(expected, late), tolerance=CLOSE, what=f"a scan after {cut} steps")
        mine, theirs = (list(pushed(window, more, ones, each)[0]) for each in (scanned, stepped))
        compare(mine, theirs, tolerance=CLOSE, what="what follows a scan")


@law("window", steps=(3, 4, 5, 6))
def masked_steps_have_no_effect(subject: WindowSubject, case: Case) -> None:
    """A step of weight 0 leaves the state of its row unchanged, whatever its values, and does not change ages.

    Rows of a batch end at different times, and a stream may pause: padding is not a step.
    """
    window, steps, weights = subject.make(case), subject.statistics(case), subject.weights(case)
    dirty = type(steps)(*(torch.where(expand_mask(weights > 0, leaf), leaf, float("nan")) for leaf in steps))
    pooled, _ = pushed(window, dirty, weights, subject.fresh(window, steps))
    for row in range(case.batch):
        unmasked = weights[:, row] > 0
        if not unmasked.any():
            continue
        alone = at(steps, (unmasked, slice(row, row + 1)))
        expected, _ = pushed(window, alone, weights[unmasked, row : row + 1], subject.fresh(window, alone))
        mine = [leaf[unmasked, row] for leaf in pooled]
        compare(mine, [leaf[:, 0] for leaf in expected], tolerance=CLOSE, what="the unmasked steps of a row")
    state = pushed(window, steps, torch.ones_like(weights), subject.fresh(window, steps))[1]
    nan = at(type(steps)(*(torch.full_like(leaf, float("nan")) for leaf in steps)), 0)
    _, after = window.push(nan, torch.zeros(case.batch, dtype=torch.float64), state)
    compare(after, state, tolerance=0, what="the state after a step of weight 0")


@law("window", batch=(2, 3))
def rows_have_separate_states(subject: WindowSubject, case: Case) -> None:
    """Axis 0 of every leaf of the state is the batch, and no row depends on another.

    Beam search reorders rows, a batch is compacted, one row is reset: each of them is an index on axis 0. With batch
    statistics a layer has a window of one row for the whole batch, so no row of it can be reset.
    """
    window, steps, weights = subject.make(case), subject.statistics(case), subject.weights(case)
    pooled, state = pushed(window, steps, weights, subject.fresh(window, steps))
    for leaf in tree_leaves(state):
        demand(
            leaf.ndim > 0 and leaf.shape[0] == case.batch,
            f"state: got a leaf of shape {list(leaf.shape)}; expected {case.batch} rows",
        )
    order = torch.arange(case.batch).flip(0)
    turned, _ = pushed(window, at(steps, (slice(None), order)), weights[:, order], subject.fresh(window, steps))
    compare([leaf[:, order] for leaf in turned], list(pooled), tolerance=0, what="rows in another order")
    more, ones = at(subject.statistics(case, seed=700), slice(0, 2)), torch.ones(2, case.batch, dtype=torch.float64)
    ones = ones[: len(more[0])]
    expected, _ = pushed(window, more, ones, state)
    mine, _ = pushed(window, at(more, (slice(None), order)), ones, reorder(state, order))
    compare([leaf[:, order] for leaf in mine], list(expected), tolerance=0, what="a reordered state")
    other = at(steps, slice(None))
    for leaf in other:
        leaf[:, 1] += 5
    apart, _ = pushed(window, other, weights, subject.fresh(window, steps))
    compare(
        [leaf[:, 0] for leaf in apart], [leaf[:, 0] for leaf in pooled], tolerance=0, what="a row next to a changed one"
    )


@law("window")
def a_state_may_be_used_twice(subject: WindowSubject, case: Case) -> None:
    """Continued twice from one state, a window gives the same result twice, whatever was computed in between.

    A window is a value, and its state is what it returns. A window with hidden state mixes two interleaved streams. A
    window that modifies the state passed in destroys the other branch of a beam search.
    """
    window, steps = subject.make(case), subject.statistics(case)
    other = subject.statistics(case, seed=700)
    weights = torch.ones(case.steps, case.batch, dtype=torch.float64)
    state = pushed(window, steps, weights, subject.fresh(window, steps))[1]
    kept = tree_map(Tensor.clone, state)
    first, _ = pushed(window, steps, weights, state)
    pushed(window, other, weights, subject.fresh(window, other))
    again, _ = pushed(window, steps, weights, state)
    compare(list(again), list(first), tolerance=0, what="continued a second time")
    window.scan(steps, weights, state)
    compare(state, kept, tolerance=0, what="the state that was passed in")


@law("window")
def equal_statistics_pool_to_themselves(subject: WindowSubject, case: Case) -> None:
    """Where the statistics of all steps are equal, the pooled statistic equals them, from the first step on.

    The shares of a merge sum to 1. A running average that starts at 0 without a correction is too small at first.
    """
    window, steps, weights = subject.make(case), subject.statistics(case), subject.weights(case)
    same = type(steps)(*(leaf[:1].expand_as(leaf).clone() for leaf in steps))
    pooled, _ = pushed(window, same, weights, subject.fresh(window, same))
    compare(live(pooled, weights), live(same, weights), tolerance=CLOSE, what="equal statistics")


def _undeclared(subject: WindowSubject) -> str | None:
    declared = subject.spec.build().weight_at(torch.zeros(1, dtype=torch.float64))
    return "weight_at declares nothing" if declared is None else None


def declared_weights(window: Window[Any], count: int) -> Tensor:
    """Return the declared weights of the ages 0, 1, ... count - 1 in unmasked steps."""
    weights = window.weight_at(torch.arange(count, dtype=torch.float64))
    demand(
        weights is not None and weights.shape == (count,), f"weight_at: got {weights!r:.60}; expected {count} weights"
    )
    assert weights is not None
    demand(bool(((weights >= 0) & weights.isfinite()).all()), "weight_at: got negative or infinite weights")
    return weights.double()


@law("window", unless=_undeclared)
def steps_count_as_declared(subject: WindowSubject, case: Case) -> None:
    """The pooled statistic is the merge of all unmasked steps, each with its weight times `weight_at` of its age.

    This is the textbook form of any window, from one declaration. The law detects a window that is one step too long or
    too short, forgets late, decays with another factor, or counts three samples as one.
    """
    window, steps, weights = subject.make(case), subject.statistics(case), subject.weights(case)
    pooled, _ = pushed(window, steps, weights, subject.fresh(window, steps))
    profile = declared_weights(window, case.steps)
    for row in range(case.batch):
        unmasked = (weights[:, row] > 0).nonzero().flatten()
        for count, t in enumerate(unmasked.tolist(), start=1):
            past = unmasked[:count]
            share = weights[past, row] * profile[:count].flip(0)
            if not bool(share.sum() > 0):
                continue
            expected = at(steps, (past, row)).pool(share, 0)
            compare(
                [leaf[t, row] for leaf in pooled],
                list(expected),
                tolerance=CLOSE,
                what=f"pooled at unmasked step {count}",
            )


def _never_forgets(subject: WindowSubject) -> str | None:
    declared = subject.spec.build().weight_at(torch.arange(FARTHEST, dtype=torch.float64))
    if declared is None:
        return "weight_at declares nothing"
    return "weight_at declares a window that never forgets" if bool(declared[-1] > 0) else None


@law("window", unless=_never_forgets)
def a_spike_is_forgotten(subject: WindowSubject, case: Case) -> None:
    """Once a spike has left the window, every result is the same as without the spike, to the last digit.

    A window that subtracts old steps from a running sum keeps their rounding errors. In float64 a spike of 1e8 leaves
    an error of 1e-8 in a mean, and a far larger one in a variance, forever. A window must sum the steps that it holds.
    """
    window = subject.make(case)
    reach = int(declared_weights(window, FARTHEST).nonzero().max()) + 1
    longer = case.but(steps=reach + case.steps)
    steps = subject.statistics(longer)
    weights = torch.ones(longer.steps, case.batch, dtype=torch.float64)
    spiked = type(steps)(*(torch.cat([torch.full_like(leaf[:1], SPIKE), leaf[1:]]) for leaf in steps))
    for name, run in (("push", pushed), ("scan", lambda w, *arguments: w.scan(*arguments))):
        mine, theirs = (run(window, each, weights, subject.fresh(window, each))[0] for each in (spiked, steps))
        after = [leaf[reach:] for leaf in mine]
        compare(after, [leaf[reach:] for leaf in theirs], tolerance=1e-12, what=f"{name}, {reach} steps after a spike")


@law("window")
def a_state_has_the_declared_layout(subject: WindowSubject, case: Case) -> None:
    """`layout` describes the state that `initial`, `push` and `scan` return, in the type of the statistics.

    A state of another kind is rejected by its layout before it can be misread. A state in float32 would round every
    statistic that was computed in float64.
    """
    window, steps = subject.make(case), subject.statistics(case)
    weights = torch.ones(case.steps, case.batch, dtype=torch.float64)
    declared, fresh = window.layout(at(steps, 0)), subject.fresh(window, steps)
    for name, state in (
        ("initial", fresh),
        ("push", pushed(window, steps, weights, fresh)[1]),
        ("scan", window.scan(steps, weights, fresh)[1]),
    ):
        demand(layout(state) == declared, f"{name}: got a state {layout(state)}; expected {declared}, by layout")
        for leaf in tree_leaves(state):
            fits = not leaf.is_floating_point() or leaf.dtype == torch.float64
            demand(fits, f"{name}: got a leaf of {leaf.dtype}; expected torch.float64, as the statistics")


def _keeps_the_gradient(subject: WindowSubject) -> str | None:
    return None if subject.spec.build().detaches_past else "detaches_past is not declared"


@law("window", unless=_keeps_the_gradient, steps=(3, 4, 5, 6))
def no_gradient_reaches_the_past(subject: WindowSubject, case: Case) -> None:
    """Where `detaches_past` is declared, a pooled statistic has a gradient in the statistic of the current step only.

    This gradient is the derivative with the past held fixed, and the returned state has no gradient. A window that
    detaches the current step as well trains nothing, and one that detaches a part of its past is another control.
    """
    window, weights = subject.make(case), subject.weights(case)
    steps = subject.statistics(case)
    fresh = subject.fresh(window, steps)
    for leaf in steps:
        leaf.requires_grad_()
    probe = subject.statistics(case, seed=5)
    for name, run in (("push", pushed), ("scan", lambda w, *arguments: w.scan(*arguments))):
        results, after = run(window, steps, weights, fresh)
        demand(not any(leaf.requires_grad for leaf in tree_leaves(after)), f"{name}: the returned state has a gradient")
        for t in range(case.steps):
            loss = torch.stack([(a[t] * b[t])[weights[t] > 0].sum() for a, b in zip(results, probe, strict=True)]).sum()
            demand(loss.requires_grad, f"{name}: the pooled statistic does not depend on its own step")
            raw = torch.autograd.grad(loss, list(steps), retain_graph=True, allow_unused=True)
            gradients = [torch.zeros_like(a) if g is None else g for g, a in zip(raw, steps, strict=True)]
            others = [torch.cat([gradient[:t], gradient[t + 1 :]]) for gradient in gradients]
            nothing = [torch.zeros_like(each) for each in others]
            compare(others, nothing, tolerance=0, what=f"{name}, gradient by other steps")
            slope = torch.stack([(g[t] * b[t]).sum() for g, b in zip(gradients, probe, strict=True)]).sum()
            compare(slope, _slope(subject, window, steps, weights, probe, t), tolerance=1e-3, what=f"{name}, slope")


def _slope(subject: WindowSubject, window: Any, steps: Any, weights: Tensor, probe: Any, t: int) -> Tensor:
    """Return the difference quotient of step `t` along `probe`, with the past held fixed."""
    sides = []
    with torch.no_grad():
        state = subject.fresh(window, steps)
        for s in range(t):
            _, state = window.push(at(steps, s), weights[s], state)
        for sign in (1, -1):
            now = type(steps)(*(a[t] + sign * 1e-6 * b[t] for a, b in zip(steps, probe, strict=True)))
            result, _ = window.push(now, weights[t], state)
            sides.append(sum((a * b[t])[weights[t] > 0].sum() for a, b in zip(result, probe, strict=True)))
    return torch.as_tensor(sides[0] - sides[1]) / 2e-6
