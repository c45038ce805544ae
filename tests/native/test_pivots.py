"""Wide rows of float32: summed in float32 around a value near their mean, in float64 where that is not good enough."""

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
    """Each instruction set of the processor; a higher limit than it has means its highest."""
    kernels = library.load()
    assert isinstance(kernels, library.Library)
    kernels.level(request.param)
    yield
    kernels.level(2)


def judged(norm, xs):
    """Outputs within the limit in ulps, and statistics that are accurate enough for them."""
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
    """Squares of 1e30 and of 1e-20 are not in the range of float32, and where all is flat there is no deviation."""
    judged(norm, sequence(regime, 7, (9, 3, width)).float())


@pytest.mark.parametrize("apart", [3.0, -30.0])
def test_where_the_pivot_is_no_value_like_the_others(instructions, apart):
    """The eight features whose mean is the pivot lie a hundred times further off than the rest is spread."""
    width = 1024
    xs = sequence("offset", 5, (6, 3, width))
    for place in (0, width // 2):
        xs[..., place : place + 4] += apart
    judged("layer", xs.float())
