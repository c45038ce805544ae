"""Windows over time: the textbook form, causality, forgetting, and cutting of sequences."""

import copy
import functools
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import atn_norms as an
from atn_norms.pytree import where_mask
from atn_norms.testing import check_window
from tests import oracle
from tests.compare import compare
from tests.laws.strategies import KINDS, Case, cases, leaves, lengths, level, seeds, sequence, window

sliding = st.tuples(st.just("sliding"), st.sampled_from([1, 2, 3, 5]))


@given(cases())
def test_scan_is_the_textbook_form_in_every_regime(case: Case):
    norm, xs = case.norm(), case.xs()
    site = case.site(norm)
    expected = oracle.run(site, xs)
    compare(norm.scan(xs)[0], expected, tolerance=case.rounding(site))


@given(cases(regimes=["normal", "drifting"]))
def test_every_gradient_of_a_scan_is_the_textbook_form_s(case: Case):
    norm, xs = case.norm(), case.xs().requires_grad_()
    wanted = [xs, *norm.parameters()]
    site = case.site(norm)
    expected = oracle.run(site, xs)
    weight = sequence("normal", case.seed + 1, xs.shape)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    mine = torch.autograd.grad((norm.scan(xs)[0] * weight).sum(), wanted)
    largest = level(*theirs)
    # a gradient has one more factor 1 / sqrt(v + eps) than the value: at most 1 / sqrt(1e-5)
    compare(mine, theirs, tolerance=case.rounding(site) * 320, scale=largest)


@given(cases(regimes=["normal", "offset", "spike", "flat"]))
def test_a_scan_is_its_steps(case: Case):
    norm, xs = case.norm(), case.xs()
    site = case.site(norm)
    oracle.run(site, xs)
    ys, final = norm.scan(xs)
    state = norm.initial(xs[0])
    for x, y in zip(xs, ys, strict=True):
        stepped, state = norm.step(x, state)
        compare(stepped, y, tolerance=case.rounding(site))
    assert len(leaves(state)) == len(leaves(final))
    for mine, theirs in zip(leaves(state), leaves(final), strict=True):
        compare(mine, theirs, tolerance=1e-13, scale=level(theirs))  # at most 10 merges of 2e-16 each


@given(cases(steps=(2, 8)))
def test_a_scan_may_be_cut_anywhere(case: Case):
    norm, xs = case.norm(), case.xs()
    site = case.site(norm)
    oracle.run(site, xs)
    whole, final = norm.scan(xs)
    for cut in range(1, case.steps):
        first, state = norm.scan(xs[:cut])
        second, state = norm.scan(xs[cut:], state)
        compare(torch.cat([first, second]), whole, tolerance=case.rounding(site), what=f"cut at {cut}")
        for mine, theirs in zip(leaves(state), leaves(final), strict=True):
            compare(mine, theirs, tolerance=1e-13, scale=level(theirs), what=f"state, cut at {cut}")


@given(cases(steps=(2, 8), regimes=["normal"]))
def test_outputs_do_not_depend_on_future_steps(case: Case):
    norm, xs = case.norm(), case.xs().requires_grad_()
    ys, _ = norm.scan(xs)
    for t in range(case.steps - 1):
        (gradient,) = torch.autograd.grad(ys[t].square().sum(), xs, retain_graph=True)
        assert (gradient[t + 1 :] == 0).all()
    changed = xs.detach().clone()
    changed[-1] = 1e6
    compare(norm.scan(changed)[0][:-1], ys.detach()[:-1], tolerance=0)


@given(cases(kinds=sliding, steps=(2, 10), regimes=["normal", "spike", "huge"]))
def test_steps_outside_the_window_have_no_effect_on_value_or_gradient(case: Case):
    norm, xs = case.norm(), case.xs().requires_grad_()
    k = int(case.window[1])
    ys, _ = norm.scan(xs)
    for t in range(k, case.steps):
        (gradient,) = torch.autograd.grad(ys[t].square().sum(), xs, retain_graph=True)
        assert (gradient[: t - k + 1] == 0).all()
        other = xs.detach().clone()
        other[: t - k + 1] = sequence("offset", case.seed + 9, other[: t - k + 1].shape)
        compare(norm.scan(other)[0][t:], ys.detach()[t:], tolerance=0)


@given(cases(kinds=sliding, steps=(2, 8), features=(3, 6), regimes=["normal"]))
def test_every_step_of_the_window_has_an_effect(case: Case):
    norm, xs = case.norm(), case.xs().requires_grad_()
    k = int(case.window[1])
    ys, _ = norm.scan(xs)
    weight = sequence("normal", case.seed + 1, xs.shape)
    for t in range(case.steps):
        (gradient,) = torch.autograd.grad((ys[t] * weight[t]).sum(), xs, retain_graph=True)
        assert (gradient[max(0, t - k + 1) : t + 1].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("kind", [("cumulative",), ("exponential", 2.0)])
@given(seed=seeds)
def test_a_cumulative_window_keeps_all_steps(kind, seed):
    case = Case(seed, 8, 3, 4, "layer", kind, torch.float64, "normal")
    xs = case.xs().requires_grad_()
    ys, _ = case.norm().scan(xs)
    weight = sequence("normal", seed + 1, xs.shape)
    (gradient,) = torch.autograd.grad((ys[-1] * weight[-1]).sum(), xs)
    assert (gradient.abs().amax((1, 2)) > 0).all()


@given(cases(kinds=st.just(("sliding", 1)), regimes=["normal", "offset", "drifting"]), st.integers(0, 5))
def test_a_window_as_long_as_the_sequence_is_cumulative(case: Case, extra: int):
    xs = case.xs()
    norms = [
        Case(**{**case.__dict__, "window": kind}).norm() for kind in (("sliding", case.steps + extra), ("cumulative",))
    ]
    site = Case(**{**case.__dict__, "window": ("cumulative",)}).site(norms[1])
    oracle.run(site, xs)
    compare(norms[0].scan(xs)[0], norms[1].scan(xs)[0], tolerance=case.rounding(site))


@given(cases(kinds=st.just(("sliding", 1)), regimes=["normal"]))
def test_a_very_long_half_life_is_cumulative_and_a_very_short_one_the_step_alone(case: Case):
    xs = case.xs()
    cumulative = Case(**{**case.__dict__, "window": ("cumulative",)}).norm().scan(xs)[0]
    slow = Case(**{**case.__dict__, "window": ("exponential", 1e15)}).norm().scan(xs)[0]
    fast = Case(**{**case.__dict__, "window": ("exponential", 1e-3)}).norm().scan(xs)[0]  # 2^-1000 of the step before
    compare(slow, cumulative, tolerance=1e-9)  # weights differ by 10 / 1e15; 1 / sqrt(1e-5) magnifies at most 320 times
    compare(fast, case.norm().scan(xs)[0], tolerance=1e-9)


def test_the_window_counts_the_current_step():
    xs = sequence("normal", 0, (4, 2, 3))
    ys, _ = an.AssortedTime(an.LayerNorm(3).double(), window=2).scan(xs)
    pair = xs[2:4].transpose(0, 1).flatten(1)
    mean, var = pair.mean(1, keepdim=True), pair.var(1, correction=0, keepdim=True)
    compare(ys[3], (xs[3] - mean) / (var + 1e-5).sqrt(), tolerance=1e-12)


def test_an_int_is_a_sliding_window_and_one_is_the_default():
    xs = sequence("normal", 0, (5, 2, 3))
    norm = an.LayerNorm(3).double()
    compare(
        an.AssortedTime(norm, window=3).scan(xs)[0],
        an.AssortedTime(norm, window=an.Sliding(3)).scan(xs)[0],
        tolerance=0,
    )
    compare(an.AssortedTime(norm).scan(xs)[0], an.AssortedTime(norm, window=1).scan(xs)[0], tolerance=0)


@given(cases(batch=(2, 4), steps=(1, 8)), st.booleans())
def test_lengths_are_the_textbook_form_over_unmasked_steps(case: Case, zero: bool):
    norm, xs = case.norm(), case.xs()
    limit = lengths(case, zero)
    mask = torch.arange(case.steps)[:, None] < limit
    site = case.site(norm)
    expected = oracle.run(site, xs, mask)
    dirty = torch.where(mask[..., None], xs, float("nan"))
    ys, _ = norm.scan(dirty, lengths=limit)
    compare(ys, expected, tolerance=case.rounding(site))


@given(cases(batch=(2, 4), steps=(2, 8), regimes=["normal", "offset"]), seeds)
def test_a_masked_step_is_not_counted(case: Case, seed: int):
    """Use a random mask per row: ages count only unmasked steps."""
    norm, xs = case.norm(), case.xs()
    mask = torch.rand(case.steps, case.batch, generator=torch.Generator().manual_seed(seed)) < 0.6
    if case.base == "batch":  # at least two rows, or the step is masked
        mask[mask.sum(1) == 1] = True
    site = case.site(norm)
    expected = oracle.run(site, xs, mask)
    state = norm.initial(xs[0])
    for t in range(case.steps):
        x = torch.where(mask[t][:, None], xs[t], float("nan"))
        y, state = norm.step(x, state, mask[t])
        shown = torch.where(mask[t][:, None], y, 0.0)
        compare(shown, expected[t], tolerance=case.rounding(site), what=f"step {t}")


@given(cases(batch=(2, 4), steps=(2, 8), regimes=["normal", "flat"], bases=["layer", "rms"]))
def test_a_padded_row_equals_that_row_alone(case: Case):
    norm, xs = case.norm(), case.xs()
    limit = lengths(case, zero=True)
    mask = torch.arange(case.steps)[:, None] < limit
    dirty = torch.where(mask[..., None], xs, float("nan")).requires_grad_()
    weight = sequence("normal", case.seed + 1, xs.shape)
    ys, state = norm.scan(dirty, lengths=limit)
    (gradient,) = torch.autograd.grad((ys * weight).sum(), dirty)
    for row, n in enumerate(limit.tolist()):
        assert (ys[n:, row] == 0).all()
        assert (gradient[n:, row] == 0).all()
        if n == 0:
            continue
        alone = xs[:n, row : row + 1].clone().requires_grad_()
        y, final = norm.scan(alone)
        (expected,) = torch.autograd.grad((y * weight[:n, row : row + 1]).sum(), alone)
        compare(ys[:n, row], y[:, 0], tolerance=1e-12)  # the same sums in another order, over at most 8 steps
        compare(gradient[:n, row], expected[:, 0], tolerance=1e-12, scale=level(expected))
        for mine, theirs in zip(leaves(state), leaves(final), strict=True):
            compare(mine[row : row + 1], theirs, tolerance=1e-13)


@pytest.mark.parametrize("base", ["layer", "rms", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_length_of_zero_leaves_the_state_untouched(base, kind):
    case = Case(0, 4, 3, 5, base, kind, torch.float64, "normal")
    norm, xs = case.norm(), case.xs()
    _, state = norm.scan(xs)
    ys, after = norm.scan(torch.full_like(xs, float("nan")), state, torch.zeros(3, dtype=torch.int64))
    assert (ys == 0).all()
    compare(leaves(after), leaves(state), tolerance=0)


@given(cases(batch=(3, 4), steps=(4, 8), regimes=["normal"]), st.integers(1, 3))
def test_ragged_streams_are_the_textbook_form_over_unmasked_steps(case: Case, cut: int):
    """Use two consecutive ragged chunks: masked steps of the first chunk do not separate the steps of a row."""
    norm, xs = case.norm(), case.xs()
    source = torch.Generator().manual_seed(case.seed + 7)
    mask = []
    for steps in (cut, case.steps - cut):
        limit = torch.randint(0, steps + 1, (case.batch,), generator=source)
        limit[:2] = steps
        mask.append(torch.arange(steps)[:, None] < limit[torch.randperm(case.batch, generator=source)])
    site = case.site(norm)
    expected = oracle.run(site, xs, torch.cat(mask))
    first, state = norm.scan(xs[:cut], lengths=mask[0].sum(0))
    second, _ = norm.scan(xs[cut:], state, mask[1].sum(0))
    compare(torch.cat([first, second]), expected, tolerance=case.rounding(site))


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_equals_the_textbook_form(kind):
    xs = sequence("normal", 3, (6, 2, 3))
    now = an.Moments.of(xs)
    pooled, _ = window(kind).scan(
        now, torch.ones(6, 2, dtype=torch.float64), window(kind).initial(an.Moments.of(xs[0]))
    )
    site = oracle.Site("layer", kind)
    oracle.run(site, xs)
    for t, (mean, var, _) in enumerate(site.pooled):
        compare(pooled.mean[t].flatten(), mean.flatten(), tolerance=1e-13, what=f"mean at {t}")
        compare(pooled.var[t].flatten(), var.flatten(), tolerance=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_a_window_takes_any_weights_and_its_scan_is_its_pushes(kind, seed):
    """Weights are numbers of samples; steps of weight 0 are masked."""
    source = torch.Generator().manual_seed(seed)
    xs = sequence("normal", seed, (7, 3, 2))
    weights = torch.randint(0, 4, (7, 3), generator=source).double()
    view, steps = window(kind), an.Moments.of(xs)
    pooled, final = view.scan(steps, weights, view.initial(an.Moments.of(xs[0])))
    state = view.initial(an.Moments.of(xs[0]))
    for t in range(7):
        now, state = view.push(an.Moments(steps.mean[t], steps.var[t]), weights[t], state)
        live = weights[t] > 0
        compare(now.mean[live], pooled.mean[t][live], tolerance=1e-13)
        compare(now.var[live], pooled.var[t][live], tolerance=1e-13)
        for row in range(3):
            if live[row]:
                past = [s for s in range(t + 1) if weights[s, row] > 0]
                age = torch.tensor([len(past) - 1 - i for i in range(len(past))]).double()
                share = oracle.weight_of(kind, age) * weights[past, row]
                mean = (share * steps.mean[past, row, 0]).sum() / share.sum()
                compare(now.mean[row, 0], mean, tolerance=1e-13)
    compare(leaves(state), leaves(final), tolerance=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["layer", "rms", "batch"])
def test_a_detached_window_has_the_values_of_its_window_and_no_gradient_through_the_past(base, kind):
    case = Case(3, 6, 3, 4, base, kind, torch.float64, "normal")
    norm, xs = case.norm(), case.xs().requires_grad_()
    detached = an.AssortedTime(norm.normalizer, an.Detached(norm.window))
    weight = sequence("normal", 11, xs.shape)
    ys, state = detached.scan(xs)
    compare(ys, norm.scan(xs)[0], tolerance=1e-13)
    assert not any(leaf.requires_grad for leaf in leaves(state))
    (gradient,) = torch.autograd.grad((ys * weight).sum(), xs)
    for t in range(case.steps):  # the textbook form, in which the past is a constant
        site = case.site(norm)
        past = [site(x.detach()) for x in xs[:t]]
        assert len(past) == t
        (expected,) = torch.autograd.grad((site(xs[t]) * weight[t]).sum(), xs)
        compare(gradient[t], expected[t], tolerance=1e-12, what=f"gradient at {t}")


def test_a_detached_window_takes_a_window_without_parameters():
    assert an.Detached(3) == an.Detached(an.Sliding(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="window: got Learned, a module"):
        an.Detached(Learned())
    with pytest.raises(ValueError, match="steps: got 0"):
        an.Detached(0)  # type: ignore[arg-type]


def test_a_sequence_without_steps_is_rejected():
    norm = an.AssortedTime(an.LayerNorm(3), window=2)
    with pytest.raises(ValueError, match=r"\b0\b|step|T"):
        norm.scan(torch.zeros(0, 2, 3))


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "3"])
def test_a_window_is_a_positive_number_of_steps(wrong):
    with pytest.raises((TypeError, ValueError)):
        an.Sliding(wrong)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_half_life_is_positive_and_finite(wrong):
    with pytest.raises((TypeError, ValueError)):
        an.Exponential(wrong)


class Learned(nn.Module, an.Window):
    """Window over all unmasked steps with weights that decay by a trainable `factor` per step."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.level)

    def initial(self, now: Any) -> Any:
        return an.Cumulative().initial(now)

    def push(self, now: Any, weight: torch.Tensor, state: Any) -> Any:
        factor = torch.sigmoid(self.level).to(weight)
        total, past = state[0] * factor, state[1]
        both = type(now)(*(torch.stack(pair, 1) for pair in zip(past, now, strict=True)))
        pooled = both.pool(torch.stack([total, weight], 1), 1)
        return pooled, where_mask(weight > 0, (total + weight, tuple(pooled)), state)


class LearnedSpec(an.WindowSpec):
    kind: Literal["learned"] = "learned"

    def build(self) -> an.Window:
        return Learned()


def test_a_window_that_is_a_module_belongs_to_its_layer():
    """Its parameters are in parameters() and state_dict(), once for each site, and are trained, saved and copied."""
    make = functools.partial(an.LSTM, 2, 3, num_layers=2, norm="layer", window=LearnedSpec(), backend="auto")
    layer = make()
    names = {f"window_{site}_l{n}.level" for site in ("ih", "hh", "c") for n in (0, 1)}
    assert names <= set(layer.state_dict()) and names <= {name for name, _ in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    xs = torch.randn(6, 4, 2)
    layer(xs)[0].square().sum().backward()
    optimizer.step()
    levels = {name: parameter for name, parameter in layer.named_parameters() if name in names}
    assert all(float(level.detach()) != 0 for level in levels.values())
    other = make()
    other.load_state_dict(layer.state_dict())
    compare(other(xs), layer(xs), tolerance=0)
    compare(copy.deepcopy(layer)(xs), layer(xs), tolerance=0)
    window: Any = layer.double().window_ih_l0
    assert window.level.dtype == torch.float64
    layer.reset_parameters()
    assert all(float(level.detach()) == 0 for level in levels.values())


def test_the_conformance_suite_accepts_a_window_with_parameters():
    failed = [result for result in check_window(LearnedSpec()) if result.status == "failed"]
    assert not failed, failed
