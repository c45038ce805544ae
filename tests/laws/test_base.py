"""A window of 1 equals the plain normalizer, as torch computes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import Case, affine, cases, level, seeds, sequence, stirred, window

one = st.just(("sliding", 1))


@given(cases(bases=["layer", "rms"], kinds=one, regimes=["normal", "spike", "tiny", "huge", "flat"], features=(2, 8)))
def test_window_one_is_torch_s_layer_norm_and_rms_norm(case: Case):
    norm, xs = case.norm(), case.xs()
    if case.base == "layer":
        expected = F.layer_norm(xs, (case.features,), norm.normalizer.weight, norm.normalizer.bias, case.eps)
    else:
        expected = F.rms_norm(xs, (case.features,), norm.normalizer.weight, case.eps)
    compare(norm.scan(xs)[0], expected, tolerance=1e-12)


@given(cases(bases=["batch"], kinds=one, regimes=["normal", "tiny"], batch=(3, 6)))
def test_window_one_is_torch_s_batch_norm_in_training_and_evaluation(case: Case):
    norm, xs = case.norm(), case.xs()
    theirs = torch.nn.BatchNorm1d(case.features, eps=case.eps, dtype=torch.float64)
    theirs.load_state_dict(norm.normalizer.state_dict())
    for x in xs:  # one scan per step, so one update each, as in torch
        compare(norm.scan(x[None])[0][0], theirs(x), tolerance=1e-12)
    compare(dict(norm.normalizer.state_dict()), dict(theirs.state_dict()), tolerance=1e-12)
    norm.eval()
    theirs.eval()
    compare(norm.scan(xs)[0], torch.stack([theirs(x) for x in xs]), tolerance=1e-12)


@given(cases(bases=["batch"], kinds=one, regimes=["normal"], batch=(2, 6)))
def test_batch_statistics_of_one_step_are_torch_s_with_gradients(case: Case):
    norm, xs = case.norm(), case.xs().requires_grad_()
    module = norm.normalizer
    expected = torch.stack([F.batch_norm(x, None, None, module.weight, module.bias, True, 0.1, case.eps) for x in xs])
    compare(norm.scan(xs)[0], expected, tolerance=1e-12)
    weight = sequence("normal", case.seed + 1, xs.shape)
    theirs = torch.autograd.grad((expected * weight).sum(), [xs, *norm.parameters()])
    mine = torch.autograd.grad((norm.scan(xs)[0] * weight).sum(), [xs, *norm.parameters()])
    largest = level(*theirs)
    compare(mine, theirs, tolerance=1e-10, scale=largest)  # rows may be close: 1 / sqrt(1e-5) per derivative


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_the_momentum_is_torch_s(momentum):
    xs = sequence("normal", 0, (4, 5, 3))
    norm = an.AssortedTime(an.BatchNorm(3, momentum=momentum).double(), window=1)
    theirs = torch.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    for x in xs:
        norm.step(x)
        theirs(x)
    compare(dict(norm.normalizer.state_dict()), dict(theirs.state_dict()), tolerance=1e-14)


@given(seed=seeds)
def test_float32_agrees_with_torch_where_torch_is_accurate(seed):
    """Torch sums 64 values in float32; the tolerance is its error of about sqrt(64) 6e-8."""
    xs = sequence("normal", seed, (3, 4, 64)).float()
    compare(an.AssortedTime(an.LayerNorm(64)).scan(xs)[0], F.layer_norm(xs, (64,)), tolerance=2e-6)
    compare(an.AssortedTime(an.RMSNorm(64)).scan(xs)[0], F.rms_norm(xs, (64,), eps=1e-5), tolerance=2e-6)


def test_the_parameters_are_torch_s():
    for mine, theirs in (
        (an.LayerNorm(4), torch.nn.LayerNorm(4)),
        (an.RMSNorm(4), torch.nn.RMSNorm(4)),
        (an.BatchNorm(4), torch.nn.BatchNorm1d(4)),
    ):
        compare(dict(mine.state_dict()), dict(theirs.state_dict()), tolerance=0)
        assert [name for name, _ in mine.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in an.RMSNorm(4, bias=True).named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("base", ["LayerNorm", "RMSNorm", "BatchNorm"])
def test_eps_is_added_inside_the_root(base):
    """At x = +-1e-3 and eps = 1e-2 the two conventions differ by a factor of ten."""
    xs = torch.tensor([1e-3, -1e-3], dtype=torch.float64)
    xs = xs[None, :, None].expand(1, 2, 1) if base == "BatchNorm" else xs[None, None]
    norm = stirred(
        an.AssortedTime(getattr(an, base)(xs.shape[-1], eps=1e-2).double(), window=window(("sliding", 1))), 0
    )
    gain, shift = affine(norm.normalizer)
    compare(norm.scan(xs)[0], gain * xs / (1e-6 + 1e-2) ** 0.5 + shift, tolerance=1e-15)


def test_one_value_per_feature_is_rejected_in_training_as_in_torch():
    norm = an.AssortedTime(an.BatchNorm(4), window=1)
    with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel"):
        norm.scan(torch.zeros(3, 1, 4))
    norm.eval()
    norm.scan(torch.zeros(3, 1, 4))
