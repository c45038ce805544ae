"""Laws of a backend: it gives what the reference gives, or says why it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.reference import Reference
from atn_norms.layers import Recurrent
from atn_norms.pytree import tree_leaves
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.layered import BackendSubject, run_cell
from atn_norms.testing.subjects import noise

CLOSE = 1e-8  # float64: sums in another order, through a handful of steps with norms over a feature or two
SINGLE = 5e-3  # float32 of the same, 1e-7 to start from


@law("backend")
def refusals_are_sentences(subject: BackendSubject) -> None:
    """`unsupported_reason` returns one sentence or None, raises nothing, and accepts at least one case.

    The sentence is what a person reads who asked for the backend by name. One that refuses everything is no backend.
    """
    for case, said in subject.refusals:
        fine = isinstance(said, str) and len(said.split()) > 2 and "\n" not in said
        demand(fine, f"of {case} refuses says {said!r}; allowed: None, or a sentence of one line")
    demand(len(subject.refusals) < subject.tried, "it refuses every built-in case")
    layer = subject.make(subject.sample())
    demand(subject.unsupported_reason(layer) == subject.unsupported_reason(layer), "asked twice, it says two things")


def _both(subject: BackendSubject, case: Case) -> tuple[Recurrent, tuple[Tensor, ...]] | None:
    layer = subject.make(case)
    return None if subject.unsupported_reason(layer) is not None else (layer, subject.inputs(case))


@law("backend")
def values_are_the_reference_s(subject: BackendSubject, case: Case) -> None:
    """Outputs and final state are the reference's, in the layer's own type, for every case that is not refused.

    The reference is the definition. In float64 the two may part only by the order in which they add.
    """
    for dtype, tolerance in ((torch.float64, CLOSE), (torch.float32, SINGLE)):
        layer = subject.make(case).to(dtype)
        if subject.unsupported_reason(layer) is not None:
            continue
        xs, *carried = (each.to(dtype) for each in subject.inputs(case))
        mine, theirs = (run_cell(backend, layer, xs, tuple(carried)) for backend in (subject.backend, Reference()))
        compare(mine[0], theirs[0], tolerance=tolerance, what=f"outputs in {dtype}")
        compare(list(mine[1][0]), list(theirs[1][0]), tolerance=tolerance, what=f"final state in {dtype}")


@law("backend", batch=(2, 3))
def lengths_are_honoured(subject: BackendSubject, case: Case) -> None:
    """With `lengths`, rows end where they end: outputs 0 beyond, the state of their own last step, padding never read.

    A length of 0 is among them, and NaN in the padding.
    """
    if (found := _both(subject, case)) is None:
        return
    layer, (xs, *carried) = found
    lengths = torch.full((case.batch,), case.steps)
    lengths[-1] = case.seed % (case.steps + 1) if case.batch > 2 else case.steps
    mask = (torch.arange(case.steps).unsqueeze(1) < lengths).unsqueeze(-1)
    dirty = torch.where(mask, xs, float("nan"))
    mine, theirs = (run_cell(each, layer, dirty, tuple(carried), lengths) for each in (subject.backend, Reference()))
    compare(mine[0], theirs[0], tolerance=CLOSE, what="outputs of ragged rows")
    compare(list(mine[1][0]), list(theirs[1][0]), tolerance=CLOSE, what="final state of ragged rows")


@law("backend")
def gradients_are_the_reference_s(subject: BackendSubject, case: Case) -> None:
    """Every gradient is the reference's: by inputs, weights, norms and initial state, from outputs and final state.

    Where training goes by segments the loss reaches a segment through its final state alone.
    """
    if (found := _both(subject, case)) is None:
        return
    layer, inputs = found
    mine, theirs = (_gradients(each, layer, inputs, case) for each in (subject.backend, Reference()))
    compare(mine, theirs, tolerance=1e-6, what="gradients")


def _gradients(backend: Any, layer: Recurrent, inputs: tuple[Tensor, ...], case: Case) -> dict[str, Tensor]:
    xs, *carried = (each.clone().requires_grad_() for each in inputs)
    ys, state = run_cell(backend, layer, xs, tuple(carried))
    named = {"xs": xs} | {f"initial {name}": c for name, c in zip(layer.cell.carried, carried, strict=True)}
    named |= dict(layer.named_parameters())
    found = {}
    for place, outs in (("outputs", [ys]), ("final state", list(state[0]))):
        loss = torch.stack([(each * noise(case.seed + 8, *each.shape)).sum() for each in outs]).sum()
        demand(loss.requires_grad, f"the {place} carry no gradient")
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
            found[f"{place} by {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return found


@law("backend", steps=(2, 3, 4, 5))
def its_state_continues_in_the_reference(subject: BackendSubject, case: Case) -> None:
    """Two backends may take turns in the middle of a sequence: each goes on from the state that the other returned.

    A state holds statements, not the aggregates of some algorithm, so a stream that was trained in C can be debugged in
    Python, and a checkpoint can be read on another machine.
    """
    if (found := _both(subject, case)) is None:
        return
    layer, (xs, *carried) = found
    weights = layer._weights("_l0")
    whole, final = run_cell(Reference(), layer, xs, tuple(carried))
    cut = 1 + case.seed % (case.steps - 1)
    for order in ((subject.backend, Reference()), (Reference(), subject.backend)):
        first, state = run_cell(order[0], layer, xs[:cut], tuple(carried))
        second, state = order[1].run(layer.cell, weights, xs[cut:], state)
        compare(torch.cat([first, second]), whole, tolerance=CLOSE, what="in turns")
        compare(list(tree_leaves(state[0])), list(tree_leaves(final[0])), tolerance=CLOSE, what="final state, in turns")
