"""Laws of a statistic: pooling is a weighted merge, and the statement of a whole is what its parts merge to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.subjects import NormalizerSubject, at, noise, used

CLOSE = 1e-9  # float64, a handful of merges: 1e-13 is due, and what is wrong is wrong by far more


def entries(subject: NormalizerSubject, case: Case, count: int) -> tuple[Any, Any, Tensor]:
    """A normalizer, `count` statements (leaves `[B, count, d]`), and a probe to use pooled ones on."""
    normalizer = subject.normalizer(case)
    said = normalizer.measure(noise(case.seed, case.batch, count, case.features))
    return normalizer, said, noise(case.seed + 1, case.batch, case.features)


def _whole(case: Case, *weights: float) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64).expand(case.batch, -1)


def without_statistic(subject: NormalizerSubject) -> str | None:
    """Return why laws of statistics do not apply to a stateless normalizer, or None."""
    return "it is stateless: there is no statistic" if subject.declares("stateless") else None


@law("statistic")
def a_statement_is_a_tuple_of_tensors(subject: NormalizerSubject) -> None:
    """`measure` returns a tuple of tensors that has `pool`, and that its type makes again of those tensors.

    Windows, states, copies and backends know a statement by its tensors alone, so a statement inside a statement has
    none that they could pool. Where this one fails there is nothing to pool, and the other laws are skipped.
    """
    subject.check_statement()


@law("statistic", unless=without_statistic, batch=(2, 3))
def merging_needs_no_order(subject: NormalizerSubject, case: Case) -> None:
    """However entries are ordered, and however they are grouped, the merge is the same.

    A cumulative window merges one by one, a sliding one all at once, a batch in whatever order it came: they may only
    agree if the merge is commutative and associative, each group weighing what its entries weigh together.
    """
    normalizer, said, probe = entries(subject, case, 4)
    weights = _whole(case, 1, 2, 3, 1)
    whole = used(normalizer, probe, said.pool(weights, 1))
    order = torch.tensor([2, 0, 3, 1])
    turned = at(said, (slice(None), order)).pool(weights[:, order], 1)
    compare(used(normalizer, probe, turned), whole, tolerance=CLOSE, what="entries in another order")
    halves = [at(said, (slice(None), part)).pool(weights[:, part], 1) for part in (slice(0, 2), slice(2, 4))]
    stacked = type(said)(*(torch.stack(leaves, 1) for leaves in zip(*halves, strict=True)))
    merged = stacked.pool(_whole(case, 3, 4), 1)
    compare(used(normalizer, probe, merged), whole, tolerance=CLOSE, what="entries merged in two groups")


@law("statistic", unless=without_statistic, batch=(2, 3))
def a_weight_counts_copies(subject: NormalizerSubject, case: Case) -> None:
    """An entry of weight 2 is that entry twice, and one entry of weight 1 is pooled to itself.

    A step counts for as many samples as it has: merging batches of 3 and 1 as if they were alike is the mean of means.
    """
    normalizer, said, probe = entries(subject, case, 2)
    alone = at(said, (slice(None), slice(0, 1))).pool(_whole(case, 1), 1)
    itself = at(said, (slice(None), 0))
    compare(used(normalizer, probe, alone), used(normalizer, probe, itself), tolerance=CLOSE, what="one entry")
    twice = at(said, (slice(None), torch.tensor([0, 0, 1]))).pool(_whole(case, 1, 1, 1), 1)
    heavy = said.pool(_whole(case, 2, 1), 1)
    compare(used(normalizer, probe, heavy), used(normalizer, probe, twice), tolerance=CLOSE, what="an entry twice")


@law("statistic", unless=without_statistic, batch=(2, 3))
def a_weight_of_zero_hides(subject: NormalizerSubject, case: Case) -> None:
    """An entry of weight 0 is not there, in value or gradient, NaN and infinity included; no weight at all is finite.

    Padding may hold anything, and a window's memory is empty at first. 0 times NaN is NaN, so hiding is choosing
    (`torch.where`), not multiplying.
    """
    normalizer, said, probe = entries(subject, case, 3)
    seen = at(said, (slice(None), slice(1, 3))).pool(_whole(case, 1, 2), 1)
    for dirt in (float("nan"), float("inf")):
        leaves = [torch.cat([torch.full_like(leaf[:, :1], dirt), leaf[:, 1:]], 1) for leaf in said]
        dirty = [leaf.detach().requires_grad_() for leaf in leaves]
        after = used(normalizer, probe, type(said)(*dirty).pool(_whole(case, 0, 1, 2), 1))
        compare(after, used(normalizer, probe, seen), tolerance=CLOSE, what=f"beside a hidden {dirt}")
        gradients = torch.autograd.grad(after.sum(), dirty, allow_unused=True)
        for gradient in gradients:
            if gradient is not None:
                demand(bool((gradient[:, 0] == 0).all()), f"a hidden {dirt} has a gradient")
                demand(bool(gradient.isfinite().all()), f"a hidden {dirt} makes the others' gradient NaN")
    nothing = said.pool(_whole(case, 0, 0, 0), 1)
    demand(all(bool(leaf.isfinite().all()) for leaf in nothing), "no weight at all is pooled to NaN or infinity")


@law("statistic", unless=without_statistic, batch=(2, 3))
def pooling_works_along_any_axis(subject: NormalizerSubject, case: Case) -> None:
    """`pool(weights, dim)` merges along the axis it is told, whatever axes lie before and behind it, and removes it.

    A batch is pooled along axis 0 or 1, a window along 1, a window over a whole sequence along 2; gates that are normed
    one by one stack their statements, which gives each leaf an axis more behind.
    """
    normalizer, said, probe = entries(subject, case, 3)
    weights = torch.stack([torch.roll(torch.tensor([1.0, 2.0, 0.0]).double(), row) for row in range(case.batch)])
    pooled = said.pool(weights, 1)
    expected = used(normalizer, probe, pooled)
    rows = [at(said, row).pool(weights[row], 0) for row in range(case.batch)]
    stacked = type(said)(*(torch.stack(leaves) for leaves in zip(*rows, strict=True)))
    compare(used(normalizer, probe, stacked), expected, tolerance=CLOSE, what="row by row along axis 0")
    deeper = type(said)(*(leaf.unsqueeze(0) for leaf in said)).pool(weights.unsqueeze(0), 2)
    compare(used(normalizer, probe, at(deeper, 0)), expected, tolerance=CLOSE, what="along axis 2")
    gates = type(said)(*(torch.stack([leaf, leaf.flip(1)], -2) for leaf in said)).pool(weights, 1)
    first = type(said)(*(leaf[..., 0, :] for leaf in gates))
    compare(used(normalizer, probe, first), expected, tolerance=CLOSE, what="of two gates, the first")


def _no_union(subject: NormalizerSubject) -> str | None:
    if subject.declares("stateless"):
        return without_statistic(subject)
    if not subject.declares("permutation_equivariant"):
        return "permutation_equivariant is not declared"
    if subject.couples:
        return "a row's own statement is not about its features together"
    return None if _doubles(subject) else "no number of features and its double are both taken"


def _doubles(subject: NormalizerSubject) -> list[int]:
    return [size for size in subject.sizes if size > 1 and 2 * size in subject.sizes]


@law("statistic", unless=_no_union, batch=(2, 3))
def a_union_says_what_its_parts_pool_to(subject: NormalizerSubject, case: Case) -> None:
    """What is said of two rows side by side is what their own statements pool to.

    It is what makes a window exact: the statement of its steps' vectors together, from their small statements alone. A
    variance divided by D - 1, or one that forgets the spread between the steps' means, breaks it.
    """
    features = _doubles(subject)[case.seed % len(_doubles(subject))]
    one, two = noise(case.seed, case.batch, features), noise(case.seed + 1, case.batch, features) + 3
    narrow, wide = (subject.normalizer(case.but(features=n)) for n in (features, 2 * features))
    union = wide.measure(torch.cat([one, two], -1))
    parts = narrow.measure(torch.stack([one, two], 1)).pool(_whole(case, 1, 1), 1)
    probe = noise(case.seed + 2, case.batch, features)
    demand(
        [leaf.shape for leaf in union] == [leaf.shape for leaf in parts],
        f"statements of {features} and {2 * features} features have leaves of different shapes",
    )
    compare(used(narrow, probe, parts), used(narrow, probe, union), tolerance=CLOSE, what="two rows side by side")
