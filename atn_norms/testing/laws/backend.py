"""Laws of a backend: it computes what the reference computes, or returns the reason why it does not run a layer."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from atn_norms.backends.program import Code, Unsupported
from atn_norms.backends.reference import Reference
from atn_norms.layers import Recurrent
from atn_norms.pytree import tree_leaves
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.layered import BackendSubject, continue_cell, run_cell
from atn_norms.testing.subjects import noise

CLOSE = 1e-8  # float64: sums in another order, over a few steps, with norms over one or two features
SINGLE = 5e-3  # float32: the same sums, with a rounding error of 1e-7 each


@law("backend")
def unsupported_reasons_are_sentences(subject: BackendSubject) -> None:
    """`prepare` returns a program, or `Unsupported` with a sentence; it raises nothing, and supports at least one case.

    The sentence is the error message of a layer that requires this backend by name, and code compares its code. A
    backend that supports no built-in case cannot be tested.
    """
    for case, reason in subject.refusals:
        fine = isinstance(reason, Unsupported) and len(reason.text.split()) > 2 and "\n" not in reason.text
        fine = fine and reason.code in get_args(Code)
        demand(fine, f"prepare({case}): got {reason!r}; expected a program, or Unsupported with a code and one line")
    demand(len(subject.refusals) < subject.tried, "it supports no built-in case")
    layer = subject.make(subject.sample())
    demand(subject.supports(layer) == subject.supports(layer), "prepare: two calls return two different results")


def _both(subject: BackendSubject, case: Case) -> tuple[Recurrent, tuple[Tensor, ...]] | None:
    layer = subject.make(case)
    return (layer, subject.inputs(case)) if subject.supports(layer) else None


@law("backend")
def values_match_the_reference(subject: BackendSubject, case: Case) -> None:
    """Outputs and final state equal those of the reference, in the type of the layer, for every supported case.

    The reference defines the result. In float64 the two may differ only by the order of their additions.
    """
    for dtype, tolerance in ((torch.float64, CLOSE), (torch.float32, SINGLE)):
        layer = subject.make(case).to(dtype)
        if not subject.supports(layer):
            continue
        xs, *carried = (each.to(dtype) for each in subject.inputs(case))
        mine, theirs = (run_cell(backend, layer, xs, tuple(carried)) for backend in (subject.backend, Reference()))
        compare(mine[0], theirs[0], tolerance=tolerance, what=f"outputs in {dtype}")
        compare(list(mine[1][0]), list(theirs[1][0]), tolerance=tolerance, what=f"final state in {dtype}")


@law("backend", batch=(2, 3))
def lengths_are_honoured(subject: BackendSubject, case: Case) -> None:
    """With `lengths`, rows end at their length: outputs are 0 beyond it, the state is that of the last valid step.

    Padding is never read. The law also tries a length of 0, and NaN in the padding.
    """
    if (supported := _both(subject, case)) is None:
        return
    layer, (xs, *carried) = supported
    lengths = torch.full((case.batch,), case.steps)
    lengths[-1] = case.seed % (case.steps + 1) if case.batch > 2 else case.steps
    mask = (torch.arange(case.steps).unsqueeze(1) < lengths).unsqueeze(-1)
    dirty = torch.where(mask, xs, float("nan"))
    mine, theirs = (run_cell(each, layer, dirty, tuple(carried), lengths) for each in (subject.backend, Reference()))
    compare(mine[0], theirs[0], tolerance=CLOSE, what="outputs of ragged rows")
    compare(list(mine[1][0]), list(theirs[1][0]), tolerance=CLOSE, what="final state of ragged rows")


@law("backend")
def gradients_match_the_reference(subject: BackendSubject, case: Case) -> None:
    """Every gradient equals that of the reference: by inputs, weights, norms and initial state.

    Gradients are taken from the outputs and from the final state. In truncated backpropagation the loss reaches a
    segment through its final state alone.
    """
    if (supported := _both(subject, case)) is None:
        return
    layer, inputs = supported
    mine, theirs = (_gradients(each, layer, inputs, case) for each in (subject.backend, Reference()))
    compare(mine, theirs, tolerance=1e-6, what="gradients")


def _gradients(backend: Any, layer: Recurrent, inputs: tuple[Tensor, ...], case: Case) -> dict[str, Tensor]:
    xs, *carried = (each.clone().requires_grad_() for each in inputs)
    ys, state = run_cell(backend, layer, xs, tuple(carried))
    named = {"xs": xs} | {f"initial {name}": c for name, c in zip(layer.cell.carried, carried, strict=True)}
    named |= dict(layer.named_parameters())
    gradients_by_name = {}
    for place, outs in (("outputs", [ys]), ("final state", list(state[0]))):
        loss = torch.stack([(each * noise(case.seed + 8, *each.shape)).sum() for each in outs]).sum()
        demand(loss.requires_grad, f"the {place} carry no gradient")
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
            gradients_by_name[f"{place} by {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return gradients_by_name


@law("backend", steps=(2, 3, 4, 5))
def its_state_continues_in_the_reference(subject: BackendSubject, case: Case) -> None:
    """Two backends may alternate within a sequence: each continues from the state that the other returned.

    A state holds statistics, not the running sums of one algorithm. So a model trained in C can be debugged in Python,
    and a checkpoint can be loaded on another machine.
    """
    if (supported := _both(subject, case)) is None:
        return
    layer, (xs, *carried) = supported
    whole, final = run_cell(Reference(), layer, xs, tuple(carried))
    cut = 1 + case.seed % (case.steps - 1)
    for order in ((subject.backend, Reference()), (Reference(), subject.backend)):
        first, state = run_cell(order[0], layer, xs[:cut], tuple(carried))
        second, state = continue_cell(order[1], layer, xs[cut:], state)
        compare(torch.cat([first, second]), whole, tolerance=CLOSE, what="outputs of two backends in turns")
        compare(list(tree_leaves(state[0])), list(tree_leaves(final[0])), tolerance=CLOSE, what="final state, in turns")
