"""Laws of a cell: sizes match their declarations, ended rows keep their state, every part has an effect."""

from __future__ import annotations

import torch

from atn_norms.cells import Placement
from atn_norms.normalizers import LayerNormSpec
from atn_norms.pytree import tree_leaves, tree_map
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.layered import CellSubject, first_refusal, layer_spec
from atn_norms.testing.subjects import noise

CLOSE = 1e-9


@law("cell")
def sizes_are_as_declared(subject: CellSubject, case: Case) -> None:
    """Output, carried tensors and sites have the sizes that `output_size`, `carried_sizes` and `sites` declare.

    Parameters, norms, states and the next layer are built from these declarations alone. The law also tries one row and
    one hidden unit.
    """
    layer, (xs, *carried) = subject.make(case), subject.inputs(case)
    cell, weights = layer.cell, layer.cell_weights("_l0")
    demand(
        len(cell.carried) == len(cell.carried_sizes()),
        f"carried: got {cell.carried} for sizes {cell.carried_sizes()}",
    )
    state = cell.initial(weights, case.batch, tuple(carried))
    us, state = cell.project(weights, xs, state)
    demand(us.shape[:2] == xs.shape[:2], f"project: got shape {list(us.shape)} for an input of {list(xs.shape)}")
    for u in us:
        y, after = cell.step(weights, u, state)
        demand(
            list(y.shape) == [case.batch, cell.output_size],
            f"y: got shape {list(y.shape)}; expected {[case.batch, cell.output_size]}",
        )
        shapes = [list(leaf.shape) for leaf in after[0]]
        declared = [[case.batch, size] for size in cell.carried_sizes()]
        demand(shapes == declared, f"carried: got shapes {shapes}; expected {declared}, by carried_sizes")
        demand(
            len(after[1]) == len(cell.sites),
            f"got {len(after[1])} states; expected {len(cell.sites)}",
        )
        for mine, theirs in zip(tree_leaves(after), tree_leaves(state), strict=True):
            demand(
                mine.dtype == theirs.dtype,
                f"state: got {mine.dtype} after a step; expected {theirs.dtype}",
            )
        state = after
    for site, features in cell.sites.items():
        gates = cell.gates_at(site)
        demand(features % gates == 0, f"site {site!r} has {features} features for {gates} gates")


@law("cell", batch=(2, 3))
def masked_rows_keep_their_state(subject: CellSubject, case: Case) -> None:
    """A masked row keeps its state, in value and gradient, and its output is 0, whatever its input.

    Rows of a batch end at different times. The final state of a shorter row is its state at its own last step.
    """
    layer, (xs, *carried) = subject.make(case), subject.inputs(case)
    cell, weights = layer.cell, layer.cell_weights("_l0")
    carried = [each.requires_grad_() for each in carried]
    us, before = cell.project(weights, xs, cell.initial(weights, case.batch, tuple(carried)))
    mask = torch.arange(case.batch) != 0
    u = torch.where(mask.unsqueeze(1), us[0], us[0] + 7)
    y, after = cell.step(weights, u, before, mask)
    demand(bool((y[0] == 0).all()), "the output of an ended row is not 0")
    first = [tree_map(lambda leaf: leaf[:1], state) for state in (after, before)]
    compare(*first, tolerance=0, what="the state of an ended row")
    whole, _ = cell.step(weights, us[0], before)
    compare(y[1:], whole[1:], tolerance=CLOSE, what="rows next to an ended one")
    total = torch.stack([leaf[0].sum() for leaf in after[0]]).sum()
    for gradient in torch.autograd.grad(total, carried, allow_unused=True):
        passed = gradient is not None and bool((gradient[0] == 1).all())
        demand(passed, "the gradient does not pass unchanged through an ended row")


@law("cell", steps=(2, 3, 4))
def projecting_is_not_recurrent(subject: CellSubject, case: Case) -> None:
    """`project` of a whole sequence equals `project` of its parts in order, with the state passed on.

    `project` runs for all steps at once, since no step depends on the result of another. For the same reason it must
    not look ahead.
    """
    layer, (xs, *carried) = subject.make(case), subject.inputs(case)
    cell, weights = layer.cell, layer.cell_weights("_l0")
    start = cell.initial(weights, case.batch, tuple(carried))
    whole, final = cell.project(weights, xs, start)
    for cut in range(1, case.steps):
        first, state = cell.project(weights, xs[:cut], start)
        second, state = cell.project(weights, xs[cut:], state)
        compare(torch.cat([first, second]), whole, tolerance=CLOSE, what=f"projected in two parts, cut at {cut}")
        compare(list(tree_leaves(state)), list(tree_leaves(final)), tolerance=CLOSE, what=f"the state, cut at {cut}")


@law("cell")
def every_part_has_an_effect(subject: CellSubject) -> None:
    """Every parameter, every norm of a site and every carried tensor affects the result.

    A norm that is never called, or a carried tensor that the next step does not read, is trained, stored and reported
    for nothing. A gradient lost on its way into the final state harms truncated backpropagation alone.
    """
    wide = subject.axes["hidden"][-1]
    reached: dict[str, bool] = {}
    for seed in range(4):  # a relu unit may be inactive in one draw, not in four
        case = subject.sample().but(seed=seed, norm=LayerNormSpec(), steps=3, batch=3, hidden=wide)
        layer, (xs, *carried) = subject.make(case), subject.inputs(case)
        parts = dict(layer.named_parameters())
        parts |= {f"carried {n}": c.requires_grad_() for n, c in zip(layer.cell.carried, carried, strict=True)}
        ys, *finals = (each for each in subject.run(layer, (xs, *carried)) if each.is_floating_point())
        for place, out in (("the outputs", ys), ("the final state", finals[: len(carried)])):
            outs = [out] if isinstance(out, torch.Tensor) else list(out)
            loss = torch.stack([(each * noise(seed + 9, *each.shape)).sum() for each in outs]).sum()
            gradients = torch.autograd.grad(loss, list(parts.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(parts, gradients, strict=True):
                key = f"{name} has no effect on {place}"
                reached[key] = reached.get(key, False) or (gradient is not None and bool(gradient.any()))
    # an output site may affect the outputs alone, so norms and parameters need not affect the final state
    without_effect = [key for key, seen in reached.items() if not seen and not _of_the_output_alone(key)]
    demand(not without_effect, "; ".join(without_effect))


def _of_the_output_alone(key: str) -> bool:
    return key.endswith("the final state") and not key.startswith("carried")


@law("cell")
def placements_are_rejected_or_have_an_effect(subject: CellSubject) -> None:
    """Every placement that the cell accepts changes what it computes; any other placement is rejected.

    If the cell ignores a placement, a study that varies it compares a model with itself and reports no difference.
    """
    wide = subject.axes["hidden"][-1]
    case = subject.sample().but(norm=LayerNormSpec(), steps=4, batch=3, hidden=wide)
    usual, inputs = subject.make(case), subject.inputs(case)
    expected, *_ = subject.run(usual, inputs)
    for option, value in (("sum", "joint"), ("gates", "per_gate"), ("carry", "normed")):
        placement = Placement.model_validate({option: value})
        if first_refusal(layer_spec, case, placement=placement):
            continue
        layer = subject.make(case, placement=placement)
        if option == "gates" and all(layer.cell.gates_at(site) == 1 for site in layer.cell.sites):
            continue  # per_gate and joint are the same for a single gate
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                theirs = dict(usual.named_parameters()).get(name)
                start = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(theirs) if theirs is not None else parameter.fill_(start)
        outputs, *_ = subject.run(layer, inputs)
        changed = outputs.shape != expected.shape or float((outputs - expected).detach().abs().max()) > 1e-6
        demand(changed, f"placement.{option}: {value!r} is accepted, and changes nothing")
