"""Every formula of docs/mathematics.md, verified in float64 against the definition.

The definition is that of `tests.oracle`. The package itself is used only for properties of a whole layer or of another
method.
"""

import math
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

import atn_norms as an
from tests import oracle

EPS = 1e-5
EXACT = 1e-12  # a few hundred float64 roundings (1.1e-16 each) on quantities of order 1
K, T, D = 3, 7, 5


def window(t: int, k: int) -> range:
    return range(max(0, t + 1 - k), t + 1)


def normalized(base: str) -> Callable[..., torch.Tensor]:
    """Return the definition of a normalizer over the last k steps, for a [T, D] or [T, B, D]."""

    def norm(a: torch.Tensor, k: int, eps: float = EPS) -> torch.Tensor:
        return oracle.normalized(base, ("sliding", k), a.reshape(len(a), -1, a.shape[-1]), eps=eps).reshape(a.shape)

    return norm


layer, rms, batch = map(normalized, ("layer", "rms", "batch"))
NORMS = {"layer": layer, "rms": rms, "batch": batch}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def derivative(function: Callable[[torch.Tensor], torch.Tensor], a: torch.Tensor) -> torch.Tensor:
    jacobian = torch.autograd.functional.jacobian(function, a)
    assert isinstance(jacobian, torch.Tensor)
    return jacobian


def pooled(a: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mu_t, v_t [T, 1] and m_t [T, 1] of a window from the mean and variance of each step, as on the page."""
    mean, var = a.mean(-1, keepdim=True), a.var(-1, unbiased=False, keepdim=True)
    mu = torch.stack([mean[list(window(t, k))].mean(0) for t in range(len(a))])
    v = torch.stack(
        [(var[list(window(t, k))] + (mean[list(window(t, k))] - mu[t]).square()).mean(0) for t in range(len(a))]
    )
    return mu, v, torch.tensor([[len(window(t, k))] for t in range(len(a))])


# ---- the definition, from the statistics of single steps


@pytest.mark.parametrize("k", [1, K, T + 2])
def test_a_window_needs_only_each_steps_mean_and_variance(k):
    a = 2 + 3 * normal(T, D)
    mu, v, _ = pooled(a, k)
    assert apart((a - mu) / torch.sqrt(v + EPS), layer(a, k)) < EXACT


def test_window_one_is_layer_rms_and_batch_normalization():
    a = normal(T, 4, D)
    assert apart(layer(a, 1), torch.nn.functional.layer_norm(a, (D,), eps=EPS)) < EXACT
    assert apart(rms(a, 1), torch.nn.functional.rms_norm(a, (D,), eps=EPS)) < EXACT
    flat = torch.stack([torch.nn.functional.batch_norm(row, None, None, training=True, eps=EPS) for row in a])
    assert apart(batch(a, 1), flat) < EXACT


def test_pooling_by_weights_is_the_within_plus_the_between():
    a, weights = normal(T, D), torch.rand(T, dtype=torch.float64)
    share = (weights / weights.sum()).unsqueeze(-1)
    mean, var = a.mean(-1, keepdim=True), a.var(-1, unbiased=False, keepdim=True)
    mu = (share * mean).sum(0)
    v = (share * (var + (mean - mu).square())).sum(0)
    assert apart(mu, (share * a).sum(0).mean(-1, keepdim=True)) < EXACT
    assert apart(v, (share * (a - mu).square()).sum(0).mean(-1, keepdim=True)) < EXACT


def test_an_exponential_window_is_one_recurrent_merge():
    half_life, a = 2.0, normal(T, D)
    decay = 0.5 ** (1 / half_life)
    weight, mu, v = 0.0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t in range(T):
        mean, var, old = a[t].mean(), a[t].var(unbiased=False), weight * decay
        weight = old + 1
        now = (old * mu + mean) / weight
        v = (old * (v + (mu - now).square()) + var + (mean - now).square()) / weight
        mu = now
        shares = torch.tensor([0.5 ** ((t - s) / half_life) for s in range(t + 1)], dtype=torch.float64)
        shares = (shares / shares.sum()).unsqueeze(-1)
        direct = (shares * a[: t + 1]).sum(0).mean()
        assert apart(mu, direct) < EXACT
        assert apart(v, (shares * (a[: t + 1] - direct).square()).sum(0).mean()) < EXACT


def test_a_difference_of_squares_gives_negative_variances_and_the_centred_form_does_not():
    a = (1e4 + 1e-2 * normal(1000, 64)).float()
    squares = a.square().mean(-1) - a.mean(-1).square()
    assert (squares < 0).float().mean() > 0.2
    assert (a.var(-1, unbiased=False) >= 0).all()


# ---- gradients


def layer_gradient(
    a: torch.Tensor, k: int, gain: torch.Tensor, upstream: torch.Tensor, reach: int | None = None
) -> torch.Tensor:
    """Return dL/da; `reach`: the steps whose gradient arrives at a step, k by default."""
    mean = a.mean(-1, keepdim=True)
    mu, v, m = pooled(a, k)
    r = (v + EPS).rsqrt()
    x, w = (a - mu) * r, gain * upstream
    d_mu, d_v = -r * w.sum(-1, keepdim=True), -0.5 * r.square() * (w * x).sum(-1, keepdim=True)
    rows = []
    for s in range(len(a)):
        reached = range(s, min(len(a), s + (reach or k)))  # the step itself and at most k - 1 later ones
        slope = sum(2 * d_v[t] / (m[t] * D) for t in reached)
        level = sum((d_mu[t] + 2 * d_v[t] * (mean[s] - mu[t])) / (m[t] * D) for t in reached)
        rows.append(w[s] * r[s] + slope * (a[s] - mean[s]) + level)
    return torch.stack(rows)


def rms_gradient(a: torch.Tensor, k: int, gain: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    square = a.square().mean(-1, keepdim=True)
    q = torch.stack([square[list(window(t, k))].mean(0) for t in range(len(a))])
    r = (q + EPS).rsqrt()
    w = gain * upstream
    d_q = -0.5 * r.square() * (w * a * r).sum(-1, keepdim=True)
    rows = []
    for s in range(len(a)):
        reached = range(s, min(len(a), s + k))
        rows.append(w[s] * r[s] + sum(2 * d_q[t] / (len(window(t, k)) * D) for t in reached) * a[s])
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, K, T, T + 5])
@pytest.mark.parametrize(("norm", "formula"), [(layer, layer_gradient), (rms, rms_gradient)])
def test_the_backward_pass_is_a_sliding_sum_of_scalars(norm, formula, k):
    a = normal(T, D).requires_grad_()
    gain, shift, upstream = normal(D), normal(D), normal(T, D)
    (gain * norm(a, k) + shift).backward(upstream)
    assert a.grad is not None
    assert apart(a.grad, formula(a.detach(), k, gain, upstream)) < EXACT


@pytest.mark.parametrize("k", [1, 2, K, T])
def test_a_detached_window_keeps_the_term_of_the_step_alone(k):
    a, gain, upstream = normal(T, D), normal(D), normal(T, D)
    norm = an.AssortedTime(an.LayerNorm(D, eps=EPS).double(), an.Detached(k))
    with torch.no_grad():
        norm.normalizer.get_parameter("weight").copy_(gain)
    leaf = a.clone().requires_grad_()
    norm.scan(leaf.unsqueeze(1))[0].squeeze(1).backward(upstream)
    assert leaf.grad is not None
    assert apart(leaf.grad, layer_gradient(a, k, gain, upstream, reach=1)) < EXACT
    full = an.AssortedTime(norm.normalizer, k)
    jacobian = derivative(lambda a: norm.scan(a.unsqueeze(1))[0].squeeze(1), a)
    whole = derivative(lambda a: full.scan(a.unsqueeze(1))[0].squeeze(1), a)
    for t in range(T):
        assert apart(jacobian[t, :, t], whole[t, :, t]) < EXACT
        assert not jacobian[t, :, [s for s in range(T) if s != t]].any()


@pytest.mark.parametrize("k", [1, 2, K, T])
def test_batch_normalization_has_the_gradient_of_layer_normalization_with_samples_as_features(k):
    """With 1 in place of the gain: the gain of batch normalization is constant over what it normalizes."""
    a, upstream = normal(T, D, 4).requires_grad_(), normal(T, D, 4)  # D samples of 4 features
    batch(a, k).backward(upstream)
    assert a.grad is not None
    ones = torch.ones(D, dtype=torch.float64)
    for i in range(4):
        assert apart(a.grad[..., i], layer_gradient(a.detach()[..., i], k, ones, upstream[..., i])) < EXACT


@pytest.mark.parametrize("k", [1, 2, K])
@pytest.mark.parametrize("name", NORMS)
def test_the_gradients_of_a_sites_weight_and_bias_are_sums_over_steps(name, k):
    """dL/dW = sum_t (dL/da_t) x_t', dL/dc = sum_t dL/da_t, with the windowed dL/da_t in both."""
    weight, bias, x, upstream = normal(D, 4), normal(D), normal(T, 6, 4), normal(T, 6, D)
    leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    NORMS[name](x @ leaves[0].T + leaves[1], k).backward(upstream)
    a = (x @ weight.T + bias).requires_grad_()
    NORMS[name](a, k).backward(upstream)
    assert a.grad is not None
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert apart(leaves[0].grad, torch.einsum("tbi,tbj->ij", a.grad, x)) < 1e2 * EXACT  # sums of 42 products
    assert apart(leaves[1].grad, a.grad.sum((0, 1))) < 1e2 * EXACT


def blocks(norm: Callable, a: torch.Tensor, k: int, eps: float = EPS) -> torch.Tensor:
    """J [T, D, T, D] of a norm of one sample."""
    return derivative(lambda a: norm(a, k, eps=eps), a)


@pytest.mark.parametrize("k", [1, K])
def test_the_jacobian_within_a_step_and_to_an_earlier_one(k):
    a = normal(T, D)
    jacobian = blocks(layer, a, k)
    mu, v, m = pooled(a, k)
    r, ones = (v + EPS).rsqrt(), torch.ones(D, D, dtype=torch.float64)
    x = (a - mu) * r
    for t in range(T):
        for s in range(T):
            if s == t:
                expected = r[t] * (torch.eye(D) - (ones + torch.outer(x[t], x[t])) / (m[t] * D))
            elif s in window(t, k):
                expected = -r[t] / (m[t] * D) * (ones + torch.outer(x[t], (a[s] - mu[t]) * r[t]))
            else:
                expected = torch.zeros(D, D)
            assert apart(jacobian[t, :, s], expected) < EXACT


@pytest.mark.parametrize("k", [1, K])
def test_the_jacobian_of_rms_normalization(k):
    a = normal(T, D)
    jacobian = blocks(rms, a, k)
    for t in range(T):
        m = len(window(t, k))
        r = (a[list(window(t, k))].square().mean() + EPS).rsqrt()
        for s in range(T):
            direct = r * torch.eye(D, dtype=torch.float64) * (s == t)
            shared = r / (m * D) * torch.outer(a[t] * r, a[s] * r) * (s in window(t, k))
            assert apart(jacobian[t, :, s], direct - shared) < EXACT


@pytest.mark.parametrize("norm", [layer, rms])
def test_a_window_that_holds_one_step_annihilates_and_a_longer_one_does_not(norm):
    a = normal(T, D)
    directions = {layer: [torch.ones(D, dtype=torch.float64)], rms: []}[norm]
    for k, step, annihilates in ((1, T - 1, True), (K, 0, True), (K, T - 1, False)):
        jacobian, y = blocks(norm, a, k, eps=0.0), norm(a, k, eps=0.0)
        for direction in [*directions, y[step]]:
            change = float((jacobian[step, :, step] @ direction).abs().max())
            assert (change < EXACT) == annihilates
            assert annihilates or change > 1e-3


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("k", [1, K, T])
def test_the_joint_jacobian_annihilates_the_common_scaling_and_the_common_shift(name, k):
    a = normal(T, 4, D)
    norm = NORMS[name]

    def change(direction: torch.Tensor) -> float:
        return float(torch.func.jvp(lambda a: norm(a, k, eps=0.0), (a,), (direction,))[1].abs().max())

    assert change(a) < EXACT
    assert (change(torch.ones_like(a)) < EXACT) == (name != "rms")
    assert (change(normal(D).expand(T, 4, D)) < EXACT) == (name == "batch")


@pytest.mark.parametrize(("norm", "rank"), [(layer, 2), (rms, 1)])
def test_the_direct_paths_have_a_low_rank_and_a_bounded_norm(norm, rank):
    for scale in (0.0, 0.3, 1.0, 3.0):  # from equal steps to steps of very different size
        a = normal(T, 8) * torch.exp(scale * normal(T, 1)) + scale * normal(T, 1)
        jacobian = blocks(norm, a, K, eps=0.0)
        for t in range(1, T):
            m = len(window(t, K))
            stacked = a[list(window(t, K))]
            spread = stacked.var(unbiased=False) if norm is layer else stacked.square().mean()
            bound = spread.rsqrt() * (rank - 1 + m / 2) / m  # 1/m for the shared mean, 1/2 for the shared spread
            for s in window(t, K)[:-1]:
                values = torch.linalg.svdvals(jacobian[t, :, s])
                assert float(values[rank]) < EXACT
                assert float(values[0]) <= float(bound) * (1 + EXACT)


def test_a_window_widens_the_bound_of_the_output_and_the_bound_is_reached():
    steps, features, samples = 4, 6, 3
    bounds = {
        "layer": lambda m: math.sqrt(m * features - 1),
        "rms": lambda m: math.sqrt(m * features),
        "batch": lambda m: math.sqrt(m * samples - 1),
    }
    lone = torch.zeros(steps, samples, features, dtype=torch.float64)
    lone[-1, 0, 0] = 1.0  # a single number that differs from all others
    for name, bound in bounds.items():
        for k in (1, 2, steps):
            wild = (
                torch.exp(3 * normal(200, steps, samples, features)).sign() * normal(200, steps, samples, features) ** 5
            )
            assert max(float(NORMS[name](a, k, eps=0.0).abs().max()) for a in wild) <= bound(k) * (1 + EXACT)
            assert abs(float(NORMS[name](lone, k, eps=1e-300)[-1, 0, 0]) - bound(k)) < EXACT


@pytest.mark.parametrize("name", NORMS)
def test_beyond_the_window_value_and_gradient_are_exactly_zero(name):
    a = normal(T, 4, D).requires_grad_()
    y = NORMS[name](a, K)
    assert a.grad is None
    y[-1].square().sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad[: T - K], torch.zeros(T - K, 4, D, dtype=torch.float64))
    assert (a.grad[T - K :] != 0).all()
    other = a.detach().clone()
    other[: T - K] = 1e6
    assert torch.equal(NORMS[name](other, K)[-1], y[-1])


# ---- invariances: the table, row by row, "not" entries included

INVARIANT, CHANGED = True, False
TABLE = {  # transform: (layer k = 1, layer k > 1, rms k = 1, rms k > 1, batch k = 1, batch k > 1)
    "weights": (INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT),
    "weights, window carried": (INVARIANT, CHANGED, INVARIANT, CHANGED, INVARIANT, CHANGED),
    "weights per feature": (CHANGED, CHANGED, CHANGED, CHANGED, INVARIANT, INVARIANT),
    "recentred": (INVARIANT, CHANGED, CHANGED, CHANGED, CHANGED, CHANGED),
    "feature shift": (CHANGED, CHANGED, CHANGED, CHANGED, INVARIANT, INVARIANT),
    "sequence": (INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT),
    "one step scaled": (INVARIANT, CHANGED, INVARIANT, CHANGED, INVARIANT, CHANGED),
    "one step shifted": (INVARIANT, CHANGED, CHANGED, CHANGED, INVARIANT, CHANGED),
    "one step of one sample shifted": (INVARIANT, CHANGED, CHANGED, CHANGED, CHANGED, CHANGED),
    "inputs, no bias": (INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT),
    "inputs, with a bias": (CHANGED, CHANGED, CHANGED, CHANGED, INVARIANT, INVARIANT),
    "sample dropped": (INVARIANT, INVARIANT, INVARIANT, INVARIANT, CHANGED, CHANGED),
}


def transformed(row: str, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    a = x @ weight.T + bias
    match row:
        case "weights":
            return x @ (3.7 * weight).T + 3.7 * bias
        case "weights, window carried":  # the optimizer changes the weights between two segments
            return torch.cat([a[: T - 1], 3 * a[T - 1 :]])
        case "weights per feature":
            scale = torch.linspace(0.5, 2, D, dtype=torch.float64)
            return x @ (scale[:, None] * weight).T + scale * bias
        case "recentred":
            return x @ (weight + normal(weight.shape[1])).T + bias
        case "feature shift":
            return a + normal(D)
        case "sequence":
            return 0.2 * a
        case "one step scaled":
            scale = torch.ones(T, 1, 1, dtype=torch.float64)
            scale[T - 2] = 3.7
            return scale * a
        case "one step shifted":
            a[T - 2] += 1.5
            return a
        case "one step of one sample shifted":
            a[T - 2, 0] += 1.5
            return a
        case "inputs, no bias":
            return (3.7 * x) @ weight.T
        case "inputs, with a bias":
            return (3.7 * x) @ weight.T + bias
        case "sample dropped":
            return a[:, :-1]
    raise ValueError(row)


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize(
    ("column", "name", "k"), [(2 * i + j, n, k) for i, n in enumerate(NORMS) for j, k in enumerate((1, K))]
)
def test_the_table_of_invariances(row, column, name, k):
    weight, bias, x = normal(D, 4), normal(D), normal(T, 6, 4)
    if row.endswith("no bias"):
        bias = torch.zeros(D, dtype=torch.float64)
    before = NORMS[name](x @ weight.T + bias, k, eps=0.0)
    after = NORMS[name](transformed(row, weight, bias, x), k, eps=0.0)
    difference = apart(before[:, : after.shape[1]], after)
    if TABLE[row][column]:
        assert difference < EXACT
    else:
        assert difference > 1e-3


def test_recentring_leaves_a_window_alone_where_the_inputs_projection_is_constant():
    weight, x = normal(D, 4), normal(1, 6, 4).expand(T, 6, 4)
    a, moved = x @ weight.T + normal(T, 1, D), normal(4)
    assert apart(layer(a, K), layer(a + (x @ moved)[..., None], K)) < EXACT


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("k", [1, K])
def test_scaled_weights_and_biases_scale_their_gradients_inversely(name, k):
    parameters, x, target = (normal(D, 4), normal(D)), normal(T, 6, 4), normal(T, 6, D)
    gradients = []
    for scale in (1.0, 4.0):
        weight, bias = ((scale * each).requires_grad_() for each in parameters)
        (NORMS[name](x @ weight.T + bias, k, eps=0.0) * target).sum().backward()
        gradients.append((weight.grad, bias.grad))
    for plain, scaled in zip(*gradients, strict=True):
        assert apart(plain, 4 * scaled) < 1e2 * EXACT  # sums of 42 products of order 1
        assert name != "rms" or float(plain.abs().max()) > 1e-3


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("k", [1, K])
def test_a_scale_is_exactly_another_epsilon(name, k):
    a = normal(T, 6, D)
    for scale in (0.01, 3.0):
        assert apart(NORMS[name](scale * a, k, eps=EPS), NORMS[name](a, k, eps=EPS / scale**2)) < EXACT


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_layer_is_invariant_to_the_scale_of_its_weights_with_fresh_windows_and_not_with_carried_ones(norm):
    """One LSTM layer without a norm of its cell state's own scale: all site weights times 3 after 30 steps."""
    site = {"kind": norm, "eps": 0.0}
    spec = {"cell": "lstm", "input_size": 3, "hidden_size": 6, "norm": {"sites": {"ih": site, "hh": site}}, "window": 4}
    layer = an.build(spec).double()
    x = normal(40, 2, 3)
    with torch.no_grad():
        _, carried = layer.unroll(x[:30])
        fresh = layer.initial(2, layer.hidden(carried))
        before = [layer.unroll(x[30:], state)[0] for state in (carried, fresh)]
        for name, parameter in layer.named_parameters():
            if re.match(r"(weight|bias)_(ih|hh)_l0", name):
                parameter.mul_(3)
        after = [layer.unroll(x[30:], state)[0] for state in (carried, fresh)]
    changes = [apart(*pair) for pair in zip(before, after, strict=True)]
    assert changes[0] > 1e-2
    assert changes[1] < 1e2 * EXACT  # ten recurrent steps


@pytest.mark.parametrize("name", NORMS)
def test_permuted_samples_permute_the_result(name):
    a, order = normal(T, 6, D), torch.randperm(6)
    assert apart(NORMS[name](a[:, order], K), NORMS[name](a, K)[:, order]) < EXACT


# ---- facts about the tasks and about averaging


def test_one_momentum_update_per_step_forgets_all_but_the_last_steps():
    assert math.isclose(1 - (1 - 0.1) ** 10, 0.65, abs_tol=0.005)


def test_guessing_one_on_the_adding_task_costs_a_sixth():
    """The target is the sum of two independent uniforms: mean 1, variance 2/12."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert math.isclose(float((u[:, None] + u[None, :] - 1).square().mean()), 1 / 6, rel_tol=1e-5)


@pytest.mark.parametrize("k", [1, K])
def test_layer_normalization_erases_the_magnitude_of_unmarked_numbers_while_the_bias_is_zero(k):
    """The input's share of the adding problem: u w + marker w' + bias, a step in the middle changed alone."""
    u, weights, bias = torch.rand(T, 1, dtype=torch.float64) + 0.1, normal(2, D), normal(D)
    larger = u.clone()
    larger[-1] *= 2.0

    def change(marker: float, bias: torch.Tensor) -> float:
        first, second = (layer(each * weights[0] + marker * weights[1] + bias, k, eps=0.0) for each in (u, larger))
        return apart(first[-1], second[-1])

    assert (change(0.0, 0 * bias) < EXACT) == (k == 1), "unmarked"
    assert change(1.0, 0 * bias) > 1e-3, "marked"
    assert change(0.0, bias) > 1e-3, "with a bias"


def test_group_normalization_over_all_of_the_past_is_timestep_norm(monkeypatch):
    """arXiv 2404.08801: mean and variance of a group's features over all steps so far, current one included."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugins/group/src"))
    group_norm, groups = import_module("atn_norms_group").GroupNorm, 2
    norm = an.AssortedTime(group_norm(6, groups=groups, eps=EPS).double(), window=an.Cumulative())
    a = normal(T, 3, 6)
    parts = a.unflatten(-1, (groups, -1))
    rows = []
    for t in range(T):
        var, mean = torch.var_mean(parts[: t + 1], dim=(0, 3), correction=0, keepdim=True)
        rows.append((parts[t] - mean[0]) / torch.sqrt(var[0] + EPS))
    assert apart(norm.scan(a)[0], torch.stack(rows).flatten(-2)) < EXACT
