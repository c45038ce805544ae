"""Laws of a statistic: pooling is a weighted merge, and the statistic of a union is the merge of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.subjects import NormalizerSubject, at, noise, used

CLOSE = 1e-9  # float64: a few merges are exact to 1e-13, and errors are far larger


def entries(subject: NormalizerSubject, case: Case, count: int) -> tuple[Any, Any, Tensor]:
    """Return a normalizer, `count` statistics (leaves `[B, count, d]`), and a probe to normalize with pooled ones."""
    normalizer = subject.normalizer(case)
    statistic = normalizer.measure(noise(case.seed, case.batch, count, case.features))
    return normalizer, statistic, noise(case.seed + 1, case.batch, case.features)


def _whole(case: Case, *weights: float) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64).expand(case.batch, -1)


def without_statistic(subject: NormalizerSubject) -> str | None:
    """Return why laws of statistics do not apply to a stateless normalizer, or None."""
    return "it is stateless: there is no statistic" if subject.declares("stateless") else None


@law("statistic")
def a_statistic_is_a_tuple_of_tensors(subject: NormalizerSubject) -> None:
    """`measure` returns a tuple of tensors with a method `pool`, and its type can be rebuilt from those tensors.

    Windows, states, copies and backends handle a statistic by its tensors alone, so a statistic nested in another one
    cannot be pooled. Where this law fails nothing can be pooled, and the other laws are skipped.
    """
    subject.check_statistic()


@law("statistic", unless=without_statistic, batch=(2, 3))
def merging_needs_no_order(subject: NormalizerSubject, case: Case) -> None:
    """The merge does not depend on the order of the entries, nor on how they are grouped.

    A cumulative window merges entries one by one, a sliding window merges all at once, a batch in any order. They agree
    only if the merge is commutative and associative, with the total weight of its entries for each group.
    """
    normalizer, statistic, probe = entries(subject, case, 4)
    weights = _whole(case, 1, 2, 3, 1)
    whole = used(normalizer, probe, statistic.pool(weights, 1))
    order = torch.tensor([2, 0, 3, 1])
    turned = at(statistic, (slice(None), order)).pool(weights[:, order], 1)
    compare(used(normalizer, probe, turned), whole, tolerance=CLOSE, what="entries in another order")
    halves = [at(statistic, (slice(None), part)).pool(weights[:, part], 1) for part in (slice(0, 2), slice(2, 4))]
    stacked = type(statistic)(*(torch.stack(leaves, 1) for leaves in zip(*halves, strict=True)))
    merged = stacked.pool(_whole(case, 3, 4), 1)
    compare(used(normalizer, probe, merged), whole, tolerance=CLOSE, what="entries merged in two groups")


@law("statistic", unless=without_statistic, batch=(2, 3))
def a_weight_counts_copies(subject: NormalizerSubject, case: Case) -> None:
    """An entry of weight 2 equals two copies of that entry, and a single entry of weight 1 is pooled to itself.

    A step counts with its number of samples. Merging batches of 3 and 1 with equal weights gives the mean of means.
    """
    normalizer, statistic, probe = entries(subject, case, 2)
    alone = at(statistic, (slice(None), slice(0, 1))).pool(_whole(case, 1), 1)
    itself = at(statistic, (slice(None), 0))
    compare(used(normalizer, probe, alone), used(normalizer, probe, itself), tolerance=CLOSE, what="one entry")
    twice = at(statistic, (slice(None), torch.tensor([0, 0, 1]))).pool(_whole(case, 1, 1, 1), 1)
    heavy = statistic.pool(_whole(case, 2, 1), 1)
    compare(used(normalizer, probe, heavy), used(normalizer, probe, twice), tolerance=CLOSE, what="an entry twice")


@law("statistic", unless=without_statistic, batch=(2, 3))
def a_weight_of_zero_hides(subject: NormalizerSubject, case: Case) -> None:
    """An entry of weight 0 has no effect on value or gradient, even if NaN; a total weight of 0 is finite.

    Padding may hold any value, and the state of a window is empty at first. 0 times NaN is NaN, so a weight of 0 must
    select (`torch.where`), not multiply.
    """
    normalizer, statistic, probe = entries(subject, case, 3)
    seen = at(statistic, (slice(None), slice(1, 3))).pool(_whole(case, 1, 2), 1)
    for dirt in (float("nan"), float("inf")):
        leaves = [torch.cat([torch.full_like(leaf[:, :1], dirt), leaf[:, 1:]], 1) for leaf in statistic]
        dirty = [leaf.detach().requires_grad_() for leaf in leaves]
        after = used(normalizer, probe, type(statistic)(*dirty).pool(_whole(case, 0, 1, 2), 1))
        compare(after, used(normalizer, probe, seen), tolerance=CLOSE, what=f"next to a hidden {dirt}")
        gradients = torch.autograd.grad(after.sum(), dirty, allow_unused=True)
        for gradient in gradients:
            if gradient is not None:
                demand(bool((gradient[:, 0] == 0).all()), f"a hidden {dirt} has a gradient")
                demand(bool(gradient.isfinite().all()), f"a hidden {dirt} makes the others' gradient NaN")
    nothing = statistic.pool(_whole(case, 0, 0, 0), 1)
    demand(all(bool(leaf.isfinite().all()) for leaf in nothing), "a total weight of 0 is pooled to NaN or infinity")


@law("statistic", unless=without_statistic, batch=(2, 3))
def pooling_works_along_any_axis(subject: NormalizerSubject, case: Case) -> None:
    """`pool(weights, dim)` merges along axis `dim`, whatever axes lie before and after it, and removes that axis.

    A batch is pooled along axis 0 or 1, a window along 1, a window over a whole sequence along 2. Gates that are
    normalized separately stack their statistics, which adds a trailing axis to each leaf.
    """
    normalizer, statistic, probe = entries(subject, case, 3)
    weights = torch.stack([torch.roll(torch.tensor([1.0, 2.0, 0.0]).double(), row) for row in range(case.batch)])
    pooled = statistic.pool(weights, 1)
    expected = used(normalizer, probe, pooled)
    rows = [at(statistic, row).pool(weights[row], 0) for row in range(case.batch)]
    stacked = type(statistic)(*(torch.stack(leaves) for leaves in zip(*rows, strict=True)))
    compare(used(normalizer, probe, stacked), expected, tolerance=CLOSE, what="row by row along axis 0")
    deeper = type(statistic)(*(leaf.unsqueeze(0) for leaf in statistic)).pool(weights.unsqueeze(0), 2)
    compare(used(normalizer, probe, at(deeper, 0)), expected, tolerance=CLOSE, what="along axis 2")
    gates = type(statistic)(*(torch.stack([leaf, leaf.flip(1)], -2) for leaf in statistic)).pool(weights, 1)
    first = type(statistic)(*(leaf[..., 0, :] for leaf in gates))
    compare(used(normalizer, probe, first), expected, tolerance=CLOSE, what="of two gates, the first")


def _no_union(subject: NormalizerSubject) -> str | None:
    if subject.declares("stateless"):
        return without_statistic(subject)
    if not subject.declares("permutation_equivariant"):
        return "permutation_equivariant is not declared"
    if subject.couples:
        return "batch statistics do not summarize the features of a row"
    return None if _doubles(subject) else "no number of features is accepted together with its double"


def _doubles(subject: NormalizerSubject) -> list[int]:
    return [size for size in subject.sizes if size > 1 and 2 * size in subject.sizes]


@law("statistic", unless=_no_union, batch=(2, 3))
def a_union_equals_its_pooled_parts(subject: NormalizerSubject, case: Case) -> None:
    """The statistic of two concatenated rows equals the pooled statistics of both rows.

    This property makes a window exact: it obtains the statistic of all features of its steps from the small statistics
    of the steps. A variance divided by D - 1, or a merge that omits the spread between the means of the steps, violates
    it.
    """
    features = _doubles(subject)[case.seed % len(_doubles(subject))]
    one, two = noise(case.seed, case.batch, features), noise(case.seed + 1, case.batch, features) + 3
    narrow, wide = (subject.normalizer(case.but(features=n)) for n in (features, 2 * features))
    union = wide.measure(torch.cat([one, two], -1))
    parts = narrow.measure(torch.stack([one, two], 1)).pool(_whole(case, 1, 1), 1)
    probe = noise(case.seed + 2, case.batch, features)
    demand(
        [leaf.shape for leaf in union] == [leaf.shape for leaf in parts],
        f"statistics of {features} and {2 * features} features have leaves of different shapes",
    )
    compare(used(narrow, probe, parts), used(narrow, probe, union), tolerance=CLOSE, what="two concatenated rows")
