"""Laws of a cell: sizes as declared, rows that ended stand still, every part of it counts."""

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

    Parameters, norms, states and the next layer are made from the declarations alone, for one row and one hidden unit
    too.
    """
    layer, (xs, *carried) = subject.make(case), subject.inputs(case)
    cell, weights = layer.cell, layer._weights("_l0")
    demand(len(cell.carried) == len(cell.carried_sizes()), f"carried names {cell.carried}: {cell.carried_sizes()}")
    state = cell.initial(weights, case.batch, tuple(carried))
    us, state = cell.project(weights, xs, state)
    demand(us.shape[:2] == xs.shape[:2], f"project made {list(us.shape)} of {list(xs.shape)}")
    for u in us:
        y, after = cell.step(weights, u, state)
        demand(list(y.shape) == [case.batch, cell.output_size], f"y is {list(y.shape)}; R is {cell.output_size}")
        found = [list(leaf.shape) for leaf in after[0]]
        wanted = [[case.batch, size] for size in cell.carried_sizes()]
        demand(found == wanted, f"carries {found}; carried_sizes says {wanted}")
        demand(len(after[1]) == len(cell.sites), f"{len(after[1])} states for the sites {', '.join(cell.sites)}")
        for mine, theirs in zip(tree_leaves(after), tree_leaves(state), strict=True):
            demand(mine.dtype == theirs.dtype, f"a state of {theirs.dtype} becomes one of {mine.dtype}")
        state = after
    for site, features in cell.sites.items():
        gates = cell.gates_at(site)
        demand(features % gates == 0, f"site {site!r} has {features} features for {gates} gates")


@law("cell", batch=(2, 3))
def an_ended_row_stands_still(subject: CellSubject, case: Case) -> None:
    """A row that is not alive keeps its state, value and gradient, and its output is 0, whatever its input.

    Rows of a batch end at different times; what is carried on from the shorter ones is the state at their own end.
    """
    layer, (xs, *carried) = subject.make(case), subject.inputs(case)
    cell, weights = layer.cell, layer._weights("_l0")
    carried = [each.requires_grad_() for each in carried]
    us, before = cell.project(weights, xs, cell.initial(weights, case.batch, tuple(carried)))
    mask = torch.arange(case.batch) != 0
    u = torch.where(mask.unsqueeze(1), us[0], us[0] + 7)
    y, after = cell.step(weights, u, before, mask)
    demand(bool((y[0] == 0).all()), "a row that ended has an output that is not 0")
    first = [tree_map(lambda leaf: leaf[:1], state) for state in (after, before)]
    compare(*first, tolerance=0, what="the state of a row that ended")
    whole, _ = cell.step(weights, us[0], before)
    compare(y[1:], whole[1:], tolerance=CLOSE, what="rows beside one that ended")
    total = torch.stack([leaf[0].sum() for leaf in after[0]]).sum()
    for gradient in torch.autograd.grad(total, carried, allow_unused=True):
        kept = gradient is not None and bool((gradient[0] == 1).all())
        demand(kept, "the gradient does not pass through a row that ended as through the identity")


@law("cell", steps=(2, 3, 4))
def projecting_is_not_recurrent(subject: CellSubject, case: Case) -> None:
    """`project` of a whole sequence is `project` of its parts, one after the other with the state between them.

    It is done for all steps at once because nothing in it waits for a step; so it may not look ahead either.
    """
    layer, (xs, *carried) = subject.make(case), subject.inputs(case)
    cell, weights = layer.cell, layer._weights("_l0")
    start = cell.initial(weights, case.batch, tuple(carried))
    whole, final = cell.project(weights, xs, start)
    for cut in range(1, case.steps):
        first, state = cell.project(weights, xs[:cut], start)
        second, state = cell.project(weights, xs[cut:], state)
        compare(torch.cat([first, second]), whole, tolerance=CLOSE, what=f"projected in two parts, cut at {cut}")
        compare(list(tree_leaves(state)), list(tree_leaves(final)), tolerance=CLOSE, what=f"the state, cut at {cut}")


@law("cell")
def every_part_counts(subject: CellSubject) -> None:
    """Every parameter, every site's norm, and every carried tensor has a part in what comes out.

    A site whose norm is never called, or a carried tensor that the next step does not read, is trained, stored and
    reported for nothing. A gradient that is lost on its way into the final state harms training by segments alone.
    """
    wide = subject.axes["hidden"][-1]
    reached: dict[str, bool] = {}
    for seed in range(4):  # a unit of a relu may be dead, not in four draws
        case = subject.sample().but(seed=seed, norm=LayerNormSpec(), steps=3, batch=3, hidden=wide)
        layer, (xs, *carried) = subject.make(case), subject.inputs(case)
        parts = dict(layer.named_parameters())
        parts |= {f"carried {n}": c.requires_grad_() for n, c in zip(layer.cell.carried, carried, strict=True)}
        ys, *finals = (each for each in subject.run(layer, (xs, *carried)) if each.is_floating_point())
        for place, out in (("the outputs", ys), ("the final state", finals[: len(carried)])):
            outs = [out] if isinstance(out, torch.Tensor) else list(out)
            loss = torch.stack([(each * noise(seed + 9, *each.shape)).sum() for each in outs]).sum()
            found = torch.autograd.grad(loss, list(parts.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(parts, found, strict=True):
                key = f"{name} has no part in {place}"
                reached[key] = reached.get(key, False) or (gradient is not None and bool(gradient.any()))
    # an output site shapes outputs alone where its result is not carried, so only outputs are demanded of norms
    lost = [key for key, seen in reached.items() if not seen and not _of_the_output_alone(key)]
    demand(not lost, "; ".join(lost))


def _of_the_output_alone(key: str) -> bool:
    return key.endswith("the final state") and not key.startswith("carried")


@law("cell")
def a_placement_is_refused_or_matters(subject: CellSubject) -> None:
    """Every placement that the cell takes changes what it computes; one that it has no place for is refused.

    A study that varies a placement which the cell ignores compares a thing with itself, and reports no difference.
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
            continue  # one gate has nobody to be apart from
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                theirs = dict(usual.named_parameters()).get(name)
                start = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(theirs) if theirs is not None else parameter.fill_(start)
        found, *_ = subject.run(layer, inputs)
        changed = found.shape != expected.shape or float((found - expected).detach().abs().max()) > 1e-6
        demand(changed, f"placement.{option}: {value!r} is taken, and changes nothing")
