"""Conformance tests of the power mean, and tests of its exponents, infinity and unsupported windows."""

import math

import atn_norms as an
import pytest
import torch
from atn_norms.registry import registry
from atn_norms.testing import parametrize_checks

from atn_norms_pmean import PMean, PMeanSpec


@parametrize_checks([PMeanSpec(), PMeanSpec(p=2.0), PMeanSpec(p=3.5, eps=0.1), PMeanSpec(p="inf")])
def test_laws(check):
    check()


def test_it_is_installed_under_its_kind():
    assert registry.lookup("normalizer", "pmean") is PMeanSpec


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 7.0, math.inf])
def test_a_window_normalizes_by_the_mean_of_all_its_features(p):
    xs = torch.randn(6, 2, 5, dtype=torch.float64)
    ys, _ = an.AssortedTime(PMean(5, p, eps=1e-20), window=3).scan(xs)
    for t in range(6):
        seen = xs[max(0, t - 2) : t + 1].transpose(0, 1).flatten(1).abs()
        mean = seen.amax(1) if math.isinf(p) else seen.pow(p).mean(1).pow(1 / p)
        torch.testing.assert_close(ys[t], xs[t] / mean.unsqueeze(1), rtol=1e-12, atol=0)


def test_a_large_exponent_comes_close_to_the_maximum_at_every_scale():
    x = torch.rand(50, 8, dtype=torch.float64) + 0.5
    for scale in (1e-2, 1.0, 1e6):
        most, much = (PMean(8, p) for p in (math.inf, 32.0))
        of_most, of_much = (n.normalize(scale * x, n.measure(scale * x)) for n in (most, much))
        assert (of_much / of_most - 1).abs().max() < 8 ** (1 / 32) - 1 + 1e-12


def test_zeros_have_finite_gradients():
    for p in (1.0, 1.5, 2.0, 32.0, math.inf):
        x = torch.zeros(2, 4, requires_grad=True)
        norm = PMean(4, p)
        norm.normalize(x, norm.measure(x)).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("window", [3, "cumulative", {"sites": {"ih": 3, "hh": "cumulative"}}])
def test_infinity_supports_windows_with_uniform_weights(window):
    layer = an.LSTM(2, 3, norm={"kind": "pmean", "p": "inf"}, window=window)
    assert layer(torch.randn(5, 2, 2))[0].isfinite().all()


@pytest.mark.parametrize("placement", ["joint", "per_gate"])
@pytest.mark.parametrize("at_one_site", [False, True])
def test_infinity_rejects_decaying_windows_when_the_layer_is_described(at_one_site, placement):
    decaying = {"kind": "exponential", "half_life": 2.0}
    window = {"sites": {"hh": decaying}} if at_one_site else decaying
    place = "window.sites.hh" if at_one_site else "window"
    message = rf"{place}: 'exponential' with norm pmean at site '\w+': a maximum \(p infinite\) requires a window"
    with pytest.raises(ValueError, match=message):
        an.LSTM(2, 3, norm={"kind": "pmean", "p": "inf"}, window=window, placement={"gates": placement})
    an.LSTM(2, 3, norm={"kind": "pmean", "p": 4.0}, window=window)


def test_infinity_is_a_string_in_options():
    assert PMeanSpec.model_validate({"p": math.inf}) == PMeanSpec(p="inf")
    assert PMeanSpec.model_validate_json(PMeanSpec(p="inf").model_dump_json()) == PMeanSpec(p="inf")


@pytest.mark.parametrize("p", [0.5, 33.0, -math.inf, math.nan, "infinite", True])
def test_other_exponents_are_rejected(p):
    with pytest.raises(ValueError, match=r"norm\.p|norm: "):
        an.LSTM(2, 3, norm={"kind": "pmean", "p": p})
