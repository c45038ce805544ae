"""Laws of a window: its memory is passed along, its steps count as declared, and what has left it is forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.pytree import expand_mask, layout, reorder, tree_leaves, tree_map
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.subjects import WindowSubject, at, pushed
from atn_norms.windows import Window

CLOSE = 1e-9  # float64, merges of at most a few dozen steps: 1e-14 is due
FARTHEST = 64  # live steps: a window that reaches further back is taken not to forget
SPIKE = 1e8


def live(pooled: Any, weights: Tensor) -> list[Tensor]:
    """The pooled leaves of the steps that happened; elsewhere they mean nothing."""
    return [leaf[weights > 0] for leaf in pooled]


@law("window")
def a_scan_is_its_pushes(subject: WindowSubject, case: Case) -> None:
    """`scan` gives what `push` gives step by step, from any state, and a state that goes on in the same way.

    A cell pushes its recurrent side and scans its input side: the two must be one window. Pushes cannot look ahead, so
    neither can a scan that agrees with them.
    """
    window, steps, weights = subject.make(case), subject.statements(case), subject.weights(case)
    more = subject.statements(case, seed=700)
    ones = torch.ones(weights.shape, dtype=torch.float64)
    for cut in range(case.steps):
        state = subject.fresh(window, steps)
        if cut:
            _, state = window.scan(at(steps, slice(0, cut)), weights[:cut], state)
        rest, late = at(steps, slice(cut, None)), weights[cut:]
        pooled, scanned = window.scan(rest, late, state)
        expected, stepped = pushed(window, rest, late, state)
        compare(live(pooled, late), live(expected, late), tolerance=CLOSE, what=f"a scan after {cut} steps")
        mine, theirs = (list(pushed(window, more, ones, each)[0]) for each in (scanned, stepped))
        compare(mine, theirs, tolerance=CLOSE, what="what follows a scan")


@law("window", steps=(3, 4, 5, 6))
def a_step_that_did_not_happen_leaves_no_trace(subject: WindowSubject, case: Case) -> None:
    """A step of weight 0 leaves its row's state as it was, whatever it holds, and no age counts it.

    Rows of a batch end at different times, and a stream may pause: padding is not a step.
    """
    window, steps, weights = subject.make(case), subject.statements(case), subject.weights(case)
    dirty = type(steps)(*(torch.where(expand_mask(weights > 0, leaf), leaf, float("nan")) for leaf in steps))
    pooled, _ = pushed(window, dirty, weights, subject.fresh(window, steps))
    for row in range(case.batch):
        happened = weights[:, row] > 0
        if not happened.any():
            continue
        alone = at(steps, (happened, slice(row, row + 1)))
        expected, _ = pushed(window, alone, weights[happened, row : row + 1], subject.fresh(window, alone))
        mine = [leaf[happened, row] for leaf in pooled]
        compare(mine, [leaf[:, 0] for leaf in expected], tolerance=CLOSE, what="a row's own live steps")
    state = pushed(window, steps, torch.ones_like(weights), subject.fresh(window, steps))[1]
    nan = at(type(steps)(*(torch.full_like(leaf, float("nan")) for leaf in steps)), 0)
    _, after = window.push(nan, torch.zeros(case.batch, dtype=torch.float64), state)
    compare(after, state, tolerance=0, what="the state after a step that did not happen")


@law("window", batch=(2, 3))
def rows_have_states_of_their_own(subject: WindowSubject, case: Case) -> None:
    """Axis 0 of every leaf of the state is the batch, and no row sees another's.

    Beam search reorders rows, a batch is compacted, one row is reset: all of it is an index on axis 0.
    """
    window, steps, weights = subject.make(case), subject.statements(case), subject.weights(case)
    pooled, state = pushed(window, steps, weights, subject.fresh(window, steps))
    for leaf in tree_leaves(state):
        demand(leaf.ndim > 0 and leaf.shape[0] == case.batch, f"a leaf {list(leaf.shape)} for {case.batch} rows")
    order = torch.arange(case.batch).flip(0)
    turned, _ = pushed(window, at(steps, (slice(None), order)), weights[:, order], subject.fresh(window, steps))
    compare([leaf[:, order] for leaf in turned], list(pooled), tolerance=0, what="rows in another order")
    more, ones = at(subject.statements(case, seed=700), slice(0, 2)), torch.ones(2, case.batch, dtype=torch.float64)
    ones = ones[: len(more[0])]
    expected, _ = pushed(window, more, ones, state)
    mine, _ = pushed(window, at(more, (slice(None), order)), ones, reorder(state, order))
    compare([leaf[:, order] for leaf in mine], list(expected), tolerance=0, what="a reordered state")
    other = at(steps, slice(None))
    for leaf in other:
        leaf[:, 1] += 5
    apart, _ = pushed(window, other, weights, subject.fresh(window, steps))
    compare([leaf[:, 0] for leaf in apart], [leaf[:, 0] for leaf in pooled], tolerance=0, what="a row beside another")


@law("window")
def a_state_may_be_used_twice(subject: WindowSubject, case: Case) -> None:
    """Continued twice from one state, a window gives the same twice, whatever else it was asked in between.

    A window is a value; its memory is what it hands back. One that remembers by itself mixes up two streams that take
    turns, and one that writes into the state it was given destroys the other branch of a beam.
    """
    window, steps = subject.make(case), subject.statements(case)
    other = subject.statements(case, seed=700)
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
def equal_statements_stay_as_they_are(subject: WindowSubject, case: Case) -> None:
    """Where every step says the same, so does the window, from the first step on.

    Shares of a merge sum to 1. A running average that starts at 0 and is not corrected for it says less at first.
    """
    window, steps, weights = subject.make(case), subject.statements(case), subject.weights(case)
    same = type(steps)(*(leaf[:1].expand_as(leaf).clone() for leaf in steps))
    pooled, _ = pushed(window, same, weights, subject.fresh(window, same))
    compare(live(pooled, weights), live(same, weights), tolerance=CLOSE, what="one statement, again and again")


def _undeclared(subject: WindowSubject) -> str | None:
    found = subject.spec.build().weight_at(torch.zeros(1, dtype=torch.float64))
    return "weight_at declares nothing" if found is None else None


def declared_weights(window: Window[Any], count: int) -> Tensor:
    """What a window declares of steps 0, 1, ... count - 1 live steps back."""
    weights = window.weight_at(torch.arange(count, dtype=torch.float64))
    demand(weights is not None and weights.shape == (count,), f"weight_at of {count} ages gives {weights!r:.60}")
    assert weights is not None
    demand(bool(((weights >= 0) & weights.isfinite()).all()), "weight_at gives negative or infinite weights")
    return weights.double()


@law("window", unless=_undeclared)
def steps_count_as_declared(subject: WindowSubject, case: Case) -> None:
    """What is pooled is the merge of every live step so far, each with its own weight times `weight_at` of its age.

    It is the textbook form of any window, made of one declaration: it finds a window that is one step too long or too
    short, forgets late, decays by another factor, or takes three samples for one.
    """
    window, steps, weights = subject.make(case), subject.statements(case), subject.weights(case)
    pooled, _ = pushed(window, steps, weights, subject.fresh(window, steps))
    profile = declared_weights(window, case.steps)
    for row in range(case.batch):
        happened = (weights[:, row] > 0).nonzero().flatten()
        for count, t in enumerate(happened.tolist(), start=1):
            past = happened[:count]
            share = weights[past, row] * profile[:count].flip(0)
            if not bool(share.sum() > 0):
                continue
            expected = at(steps, (past, row)).pool(share, 0)
            compare(
                [leaf[t, row] for leaf in pooled], list(expected), tolerance=CLOSE, what=f"pooled at live step {count}"
            )


def _never_forgets(subject: WindowSubject) -> str | None:
    found = subject.spec.build().weight_at(torch.arange(FARTHEST, dtype=torch.float64))
    if found is None:
        return "weight_at declares nothing"
    return "weight_at declares that it never forgets" if bool(found[-1] > 0) else None


@law("window", unless=_never_forgets)
def a_spike_is_forgotten(subject: WindowSubject, case: Case) -> None:
    """Once a spike has left the window, everything is as if it had never been, to the last digit.

    Forgetting by subtracting what went in leaves its rounding behind: a spike of 1e8 in float64 leaves 1e-8 in a mean
    and far more in a variance, for ever. A window adds up what it holds.
    """
    window = subject.make(case)
    reach = int(declared_weights(window, FARTHEST).nonzero().max()) + 1
    longer = case.but(steps=reach + case.steps)
    steps = subject.statements(longer)
    weights = torch.ones(longer.steps, case.batch, dtype=torch.float64)
    spiked = type(steps)(*(torch.cat([torch.full_like(leaf[:1], SPIKE), leaf[1:]]) for leaf in steps))
    for name, run in (("push", pushed), ("scan", lambda w, *rest: w.scan(*rest))):
        mine, theirs = (run(window, each, weights, subject.fresh(window, each))[0] for each in (spiked, steps))
        after = [leaf[reach:] for leaf in mine]
        compare(after, [leaf[reach:] for leaf in theirs], tolerance=1e-12, what=f"{name}, {reach} steps after a spike")


@law("window")
def a_state_looks_as_laid_out(subject: WindowSubject, case: Case) -> None:
    """`layout` describes what `initial`, `push` and `scan` return, in the statements' own type.

    A state of another kind is refused by its layout before it can be misread; a memory in float32 would round every
    statement that float64 was so careful to make.
    """
    window, steps = subject.make(case), subject.statements(case)
    weights = torch.ones(case.steps, case.batch, dtype=torch.float64)
    wanted, fresh = window.layout(at(steps, 0)), subject.fresh(window, steps)
    for name, state in (
        ("initial", fresh),
        ("push", pushed(window, steps, weights, fresh)[1]),
        ("scan", window.scan(steps, weights, fresh)[1]),
    ):
        demand(layout(state) == wanted, f"{name} returns a state {layout(state)}, and layout says {wanted}")
        for leaf in tree_leaves(state):
            fits = not leaf.is_floating_point() or leaf.dtype == torch.float64
            demand(fits, f"{name} returns a leaf of {leaf.dtype} for statements of float64")
