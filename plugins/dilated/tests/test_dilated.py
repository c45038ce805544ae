"""Conformance tests of the dilated window, and tests of the steps it pools."""

import atn_norms as an
import pytest
import torch
from atn_norms.registry import registry
from atn_norms.testing import parametrize_checks

from atn_norms_dilated import Dilated, DilatedSpec


@parametrize_checks([DilatedSpec(), DilatedSpec(steps=1, dilation=3), DilatedSpec(steps=3, dilation=3)])
def test_laws(check):
    check()


def test_it_is_installed_under_its_kind():
    assert registry.lookup("window", "dilated") is DilatedSpec


@pytest.mark.parametrize(("steps", "dilation"), [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (5, 2)])
def test_it_pools_every_dth_step(steps, dilation):
    xs = torch.randn(14, 2, 5, dtype=torch.float64)
    ys, _ = an.AssortedTime(an.LayerNorm(5).double(), Dilated(steps, dilation)).scan(xs)
    for t in range(14):
        seen = xs[[s for s in range(t, -1, -dilation)][:steps]].transpose(0, 1).flatten(1)
        mean, var = seen.mean(1, keepdim=True), seen.var(1, correction=0, keepdim=True)
        torch.testing.assert_close(ys[t], (xs[t] - mean) / (var + 1e-5).sqrt(), rtol=0, atol=1e-12)


def test_a_dilation_of_1_is_the_sliding_window_and_its_state():
    xs, lengths = torch.randn(9, 3, 4), [9, 0, 5]
    ours, theirs = an.AssortedTime(an.RMSNorm(4), Dilated(3, 1)), an.AssortedTime(an.RMSNorm(4), window=3)
    _, state = ours.scan(xs, lengths=lengths)
    torch.testing.assert_close(ours.scan(xs, state)[0], theirs.scan(xs, theirs.scan(xs, lengths=lengths)[1])[0])
    torch.testing.assert_close(theirs.scan(xs, state)[0], ours.scan(xs, state)[0])


@pytest.mark.parametrize("options", [(0, 1), (1, 0), (2.0, 1), (1, True)])
def test_an_invalid_number_of_steps_is_rejected(options):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        Dilated(*options)


@pytest.mark.parametrize("option", ["steps", "dilation"])
def test_the_options_name_their_limits(option):
    with pytest.raises(ValueError, match=f"window.{option}: got 0; expected at least 1"):
        an.LSTM(2, 3, norm="layer", window={"kind": "dilated", option: 0})
