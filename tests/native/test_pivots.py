"""Wide rows of float32: sums in float32 around a pivot near the mean, or in float64 if that is not accurate."""

import pytest
import torch

from atn_norms.backends.native import library
from tests.compare import compare
from tests.laws.strategies import REGIMES, leaves, level, sequence
from tests.native.strategies import Pair, needs_kernels
from tests.native.test_digits import ULPS, both, normalization_alone, summed_in_float

pytestmark = needs_kernels


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "AVX2", "AVX-512"])
def instructions(request):
    """Run with each instruction set of the processor; a limit above its highest set has no effect."""
    kernels = library.load()
    assert isinstance(kernels, library.Library)
    kernels.level(request.param)
    yield
    kernels.level(2)


def judged(norm, xs):
    """Check outputs within the limit in ulps, and the accuracy of the statistics."""
    steps, batch, width = xs.shape
    assert summed_in_float(torch.float32, width)
    options = {"norm": {"sites": {"ih": norm}}}
    pair = Pair("relu", norm, "4", width, batch, steps, width, dtype=torch.float32, options=options)
    for sign in (1, -1):
        (ys, _, after), (expected, _, final) = both(pair, xs, prepare=normalization_alone(sign))
        compare(ys, expected, tolerance=ULPS)
    for mine, theirs in zip(leaves(after)[2:], leaves(final)[2:], strict=True):
        compare(mine, theirs, tolerance=ULPS, scale=level(theirs))


@pytest.mark.parametrize("width", [32, 70])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(instructions, regime, norm, width):
    """Squares of 1e30 and 1e-20 are outside the range of float32, and flat rows have no deviation."""
    judged(norm, sequence(regime, 7, (9, 3, width)).float())


@pytest.mark.parametrize("apart", [3.0, -30.0])
def test_a_pivot_far_from_the_other_values(instructions, apart):
    """The eight features of the pivot are a hundred times further from the mean than the spread of the others."""
    width = 1024
    xs = sequence("offset", 5, (6, 3, width))
    for place in (0, width // 2):
        xs[..., place : place + 4] += apart
    judged("layer", xs.float())
