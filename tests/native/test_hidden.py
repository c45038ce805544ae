"""Statistics of weight 0 in an initial state are masked in values and in gradients."""

import pytest
import torch

from tests.compare import compare
from tests.laws.strategies import level
from tests.native.batched import a_pair
from tests.native.strategies import EXACT, Pair, needs_kernels, outcome

pytestmark = needs_kernels

WINDOWS = [  # window, steps of the initial state, and the index of the statistic that is also masked
    ("4", 2, None),
    ("4", 0, None),
    ("4", 5, 1),
    ("100", 3, 97),
    ("cumulative", 0, None),
    ("exponential", 0, None),
]


def hiding(pair, place, dirt):
    """Return the pair's state with `place` of every window masked, and all masked entries set to `dirt`."""

    def of_site(site):
        if not site:
            return site
        index, (weights, statistic) = site
        if place is not None:
            weights = weights.index_fill(1, torch.tensor(place), 0.0)
        mask = weights == 0
        assert mask.any()
        kept = (leaf.masked_fill(mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim)), dirt) for leaf in statistic)
        return index, (weights, tuple(kept))

    return tuple(
        tuple((carried, tuple(of_site(site) for site in norms)) for carried, norms in cells) for cells in pair.state()
    )


@pytest.mark.parametrize("dirt", [float("nan"), float("inf")])
@pytest.mark.parametrize(("window", "before", "place"), WINDOWS, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_masked_entries_are_not_read(norm, cell, window, before, place, dirt):
    if norm == "batch":
        pair = a_pair(cell, window=window, batch=4, steps=7, before=before, seed=2)
    else:
        pair = Pair(cell, norm, window, batch=4, steps=7, before=before, seed=2)
    results = []
    for backend, what in (("native", 0.0), ("native", dirt), ("reference", dirt)):
        found = outcome(pair.layer(backend), pair.xs(), hiding(pair, place, what))
        places = [leaf.isfinite() for leaf in found.state]  # a long window keeps masked entries
        results.append((found.ys, found.gradients, [leaf.nan_to_num(0, 0, 0) for leaf in found.state], places))
    (clean, slopes, *_), (ys, gradients, state, places), (expected, others, final, still) = results
    compare([ys, gradients], [clean, slopes], tolerance=0)
    compare(ys, expected, tolerance=EXACT)
    compare(state, final, tolerance=EXACT)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(places, still, strict=True))
    compare(gradients, others, tolerance=EXACT, scale=level(*others))
