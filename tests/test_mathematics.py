"""Every formula of docs/mathematics.md, verified in float64 against the definition before the page states it.

The definition is written out here once, by stacking the window's pre-activations; the package takes no part.
"""

import math
from collections.abc import Callable

import pytest
import torch

EPS = 1e-5
EXACT = 1e-12  # a few hundred float64 roundings (1.1e-16 each) on quantities of order 1
K, T, D = 3, 7, 5


def window(t: int, k: int) -> range:
    return range(max(0, t + 1 - k), t + 1)


def layer(a: torch.Tensor, k: int, eps: float = EPS) -> torch.Tensor:
    """a [T, D] (or [T, ..., D]); the pooled mean and biased variance of the last k steps' features normalize step t."""
    rows = []
    for t in range(len(a)):
        stacked = torch.stack([a[s] for s in window(t, k)])
        mean = stacked.mean(dim=(0, -1), keepdim=True)[0]
        var = (stacked - mean).square().mean(dim=(0, -1), keepdim=True)[0]
        rows.append((a[t] - mean) / torch.sqrt(var + eps))
    return torch.stack(rows)


def rms(a: torch.Tensor, k: int, eps: float = EPS) -> torch.Tensor:
    rows = []
    for t in range(len(a)):
        square = torch.stack([a[s] for s in window(t, k)]).square().mean(dim=(0, -1), keepdim=True)[0]
        rows.append(a[t] / torch.sqrt(square + eps))
    return torch.stack(rows)


def batch(a: torch.Tensor, k: int, eps: float = EPS) -> torch.Tensor:
    """a [T, B, D]; per feature, over the batch and the window."""
    rows = []
    for t in range(len(a)):
        stacked = torch.stack([a[s] for s in window(t, k)])
        mean = stacked.mean(dim=(0, 1))
        var = (stacked - mean).square().mean(dim=(0, 1))
        rows.append((a[t] - mean) / torch.sqrt(var + eps))
    return torch.stack(rows)


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
    """What the page says of a window in terms of each step's own mean and variance: mu_t, v_t [T, 1] and m_t [T, 1]."""
    mean, var = a.mean(-1, keepdim=True), a.var(-1, unbiased=False, keepdim=True)
    mu = torch.stack([mean[list(window(t, k))].mean(0) for t in range(len(a))])
    v = torch.stack(
        [(var[list(window(t, k))] + (mean[list(window(t, k))] - mu[t]).square()).mean(0) for t in range(len(a))]
    )
    return mu, v, torch.tensor([[len(window(t, k))] for t in range(len(a))])


# ---- the definition, and what a step must say about itself


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


def derived_gradient(a: torch.Tensor, k: int, gain: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    mean = a.mean(-1, keepdim=True)
    mu, v, m = pooled(a, k)
    r = (v + EPS).rsqrt()
    x, w = (a - mu) * r, gain * upstream
    d_mu, d_v = -r * w.sum(-1, keepdim=True), -0.5 * r.square() * (w * x).sum(-1, keepdim=True)
    rows = []
    for s in range(len(a)):
        reached = [t for t in range(len(a)) if s in window(t, k)]
        slope = sum(2 * d_v[t] / (m[t] * D) for t in reached)
        level = sum((d_mu[t] + 2 * d_v[t] * (mean[s] - mu[t])) / (m[t] * D) for t in reached)
        rows.append(w[s] * r[s] + slope * (a[s] - mean[s]) + level)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, K, T, T + 5])
def test_the_backward_pass_is_a_sliding_sum_of_scalars(k):
    a = normal(T, D).requires_grad_()
    gain, shift, upstream = normal(D), normal(D), normal(T, D)
    (gain * layer(a, k) + shift).backward(upstream)
    assert a.grad is not None
    assert apart(a.grad, derived_gradient(a.detach(), k, gain, upstream)) < EXACT


@pytest.mark.parametrize("k", [1, K])
def test_the_jacobian_within_a_step_and_to_an_earlier_one(k):
    a = normal(T, D)
    jacobian = derivative(lambda a: layer(a, k), a)
    mu, v, m = pooled(a, k)
    r, ones = (v + EPS).rsqrt(), torch.ones(D, D, dtype=torch.float64)
    x = (a - mu) * r
    for t in range(T):
        for s in range(T):
            if s == t:
                said = r[t] * (torch.eye(D) - (ones + torch.outer(x[t], x[t])) / (m[t] * D))
            elif s in window(t, k):
                said = -r[t] / (m[t] * D) * (ones + torch.outer(x[t], (a[s] - mu[t]) * r[t]))
            else:
                said = torch.zeros(D, D)
            assert apart(jacobian[t, :, s], said) < EXACT


def test_a_step_alone_annihilates_two_directions_and_a_window_does_not():
    a = normal(T, D)
    one = torch.ones(D, dtype=torch.float64)
    for k, annihilated in ((1, True), (K, False)):
        jacobian = derivative(lambda a, k=k: layer(a, k, eps=0.0), a)
        y = layer(a, k, eps=0.0)
        for direction in (one, y[-1]):
            assert (float((jacobian[-1, :, -1] @ direction).abs().max()) < EXACT) == annihilated


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
    "weights per feature": (CHANGED, CHANGED, CHANGED, CHANGED, INVARIANT, INVARIANT),
    "recentred": (INVARIANT, CHANGED, CHANGED, CHANGED, CHANGED, CHANGED),
    "feature shift": (CHANGED, CHANGED, CHANGED, CHANGED, INVARIANT, INVARIANT),
    "sequence": (INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT, INVARIANT),
    "one step": (INVARIANT, CHANGED, INVARIANT, CHANGED, INVARIANT, CHANGED),
    "sample dropped": (INVARIANT, INVARIANT, INVARIANT, INVARIANT, CHANGED, CHANGED),
}


def transformed(row: str, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    a = x @ weight.T + bias
    match row:
        case "weights":
            return x @ (3.7 * weight).T + 3.7 * bias
        case "weights per feature":
            scale = torch.linspace(0.5, 2, D, dtype=torch.float64)
            return x @ (scale[:, None] * weight).T + scale * bias
        case "recentred":
            return x @ (weight + normal(weight.shape[1])).T + bias
        case "feature shift":
            return a + normal(D)
        case "sequence":
            return 0.2 * a
        case "one step":
            scale = torch.ones(T, 1, 1, dtype=torch.float64)
            scale[T - 2] = 3.7
            return scale * a
        case "sample dropped":
            return a[:, :-1]
    raise ValueError(row)


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize(
    ("column", "name", "k"), [(2 * i + j, n, k) for i, n in enumerate(NORMS) for j, k in enumerate((1, K))]
)
def test_the_table_of_invariances(row, column, name, k):
    weight, bias, x = normal(D, 4), normal(D), normal(T, 6, 4)
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


def test_scaled_weights_scale_their_gradient_inversely():
    weight, x, target = normal(D, 4), normal(T, 6, 4), normal(T, 6, D)
    gradients = []
    for scale in (1.0, 4.0):
        leaf = (scale * weight).requires_grad_()
        (layer(x @ leaf.T, K, eps=0.0) * target).sum().backward()
        gradients.append(leaf.grad)
    assert apart(gradients[0], 4 * gradients[1]) < EXACT


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


def test_layer_normalization_erases_an_inputs_magnitude_and_a_window_keeps_it():
    u, direction = torch.rand(T, 1, dtype=torch.float64) + 0.1, normal(D)
    a = u * direction
    alone = layer(a, 1, eps=0.0)
    assert apart(alone, alone[:1].expand_as(alone)) < EXACT
    assert apart(layer(a, K, eps=0.0), alone) > 1e-2
