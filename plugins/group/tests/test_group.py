"""Conformance tests of group normalization, and tests against torch, per gate, of errors and kernels."""

import atn_norms as an
import pytest
import torch
from atn_norms.registry import registry
from atn_norms.testing import parametrize_checks

from atn_norms_group import GroupNorm, GroupNormSpec


@parametrize_checks([GroupNormSpec(groups=1), GroupNormSpec(groups=2), GroupNormSpec(groups=3, eps=1e-3)])
def test_laws(check):
    check()


def test_it_is_installed_under_its_kind():
    assert registry.lookup("normalizer", "group") is GroupNormSpec


@pytest.mark.parametrize("groups", [1, 2, 3, 6, 12])
def test_one_step_is_torchs_group_norm(groups):
    x = torch.randn(20, 12, dtype=torch.float64)
    ours = GroupNorm(12, groups, eps=1e-4).double()
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    theirs = torch.nn.functional.group_norm(x, groups, ours.weight, ours.bias, 1e-4)
    torch.testing.assert_close(ours.normalize(x, ours.measure(x)), theirs, rtol=0, atol=1e-12)


def test_one_group_is_layer_norm_over_any_window():
    xs = torch.randn(9, 3, 10, dtype=torch.float64)
    ours = an.AssortedTime(GroupNorm(10, 1), window=4).scan(xs)[0]
    torch.testing.assert_close(ours, an.AssortedTime(an.LayerNorm(10), window=4).scan(xs)[0], rtol=0, atol=1e-12)


def test_four_groups_of_an_lstms_site_are_its_gates():
    xs = torch.randn(9, 3, 2, dtype=torch.float64)
    norms = {"sites": {"ih": {"kind": "group", "groups": 4}, "hh": {"kind": "group", "groups": 4}}}
    joint = an.LSTM(2, 5, norm=norms, window={"sites": {"ih": 3, "hh": 3}}, dtype=torch.float64)
    gates = an.LSTM(
        2,
        5,
        norm={"sites": {"ih": "layer", "hh": "layer"}},
        window={"sites": {"ih": 3, "hh": 3}},
        placement={"gates": "per_gate"},
        dtype=torch.float64,
    )
    names = [name for name, _ in joint.named_parameters() if not name.startswith("norm")]
    gates.load_state_dict({name: joint.state_dict()[name] for name in names}, strict=False)
    torch.testing.assert_close(joint(xs)[0], gates(xs)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("placement", [{}, {"gates": "per_gate"}])
def test_every_backend_that_runs_it_gives_the_same_numbers(placement):
    xs = torch.randn(9, 3, 2, dtype=torch.float64)
    options = {"norm": {"kind": "group", "groups": 3}, "window": 4, "placement": placement, "dtype": torch.float64}
    layer, truth = an.LSTM(2, 6, **options), an.LSTM(2, 6, **options, backend="reference")
    truth.load_state_dict(layer.state_dict())
    assert "norm GroupNorm" not in an.explain(layer)  # every backend supports GroupNorm
    torch.testing.assert_close(layer(xs)[0], truth(xs)[0], rtol=1e-10, atol=1e-10)


def test_groups_that_do_not_divide_the_features_are_rejected():
    with pytest.raises(ValueError, match=r"groups: got 3 for 20 features; expected one of 1, 2, 4, 5, 10, 20"):
        an.LSTM(2, 5, norm={"kind": "group", "groups": 3})
