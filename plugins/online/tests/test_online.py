"""Conformance tests of the online window, the paper's recursion, and the exclusion of the current step."""

import atn_norms as an
import pytest
import torch
from atn_norms.registry import registry
from atn_norms.testing import parametrize_checks

from atn_norms_online import Online, OnlineSpec


@parametrize_checks([OnlineSpec(), OnlineSpec(decay=0.5)])
def test_laws(check):
    check()


def test_it_is_installed_under_its_kind():
    assert registry.lookup("window", "online") is OnlineSpec


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_it_is_the_recursion_of_the_paper(decay):
    """With one feature, the variance of a step is 0; the factor tends to the paper's after the first steps."""
    a = torch.randn(40, dtype=torch.float64)
    ones = torch.ones(40, 1, dtype=torch.float64)
    steps = an.Moments.of(a.reshape(40, 1, 1))
    window = Online(decay)
    pooled, _ = window.scan(steps, ones, window.initial(an.Moments(*(leaf[0] for leaf in steps))))
    mean, var, total = a[0], torch.zeros((), dtype=torch.float64), 1.0
    for t in range(1, 40):
        torch.testing.assert_close(pooled.mean[t].squeeze(), mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pooled.var[t].squeeze(), var, rtol=1e-12, atol=1e-12)
        total = 1 + decay * total
        factor = 1 - 1 / total
        var = factor * var + factor * (1 - factor) * (a[t] - mean) ** 2
        mean = factor * mean + (1 - factor) * a[t]


def test_a_step_does_not_count_in_its_own_normalization():
    torch.manual_seed(0)
    xs = torch.randn(6, 2, 5, dtype=torch.float64)
    xs[3] = torch.linspace(1, 2, 10, dtype=torch.float64).view(2, 5)  # no number near 0
    other = xs.clone()
    other[3] *= 100
    ours = an.AssortedTime(an.LayerNorm(5, eps=0.0).double(), Online(0.8))
    (ys, _), (zs, _) = ours.scan(xs), ours.scan(other)
    torch.testing.assert_close(ys[:3], zs[:3], rtol=0, atol=0)
    assert (zs[3] - ys[3]).abs().min() > 1  # the spike is not normalized by itself
    assert (zs[4] - ys[4]).abs().min() > 1e-3  # the spike counts from the next step


def test_the_first_step_of_each_row_is_normalized_with_its_own_statistic():
    xs = torch.randn(4, 3, 5, dtype=torch.float64)
    ours = an.AssortedTime(an.LayerNorm(5).double(), Online(0.8))
    torch.testing.assert_close(ours.scan(xs)[0][0], torch.nn.functional.layer_norm(xs[0], (5,)), rtol=0, atol=1e-12)
    _, state = ours.scan(xs, lengths=[4, 0, 2])
    late, _ = ours.scan(xs, state)
    torch.testing.assert_close(late[:, 1], ours.scan(xs)[0][:, 1], rtol=0, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1.0, float("nan"), True, "0.5"])
def test_an_invalid_decay_is_rejected(decay):
    with pytest.raises(ValueError, match="decay"):
        Online(decay)
    with pytest.raises(ValueError, match="window.decay"):
        an.LSTM(2, 3, norm="layer", window={"kind": "online", "decay": decay})
