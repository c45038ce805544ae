"""Textbook form in plain torch: keep every pre-activation, and stack and reduce all of them at every step.

This module shares no code with the package. A window is a tuple: `("sliding", k)`, `("cumulative",)` or
`("exponential", half_life)`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Window = tuple[Any, ...]
Weights = Mapping[str, Any]


def weight_of(window: Window, age: Tensor) -> Tensor:
    """Return the weight of a step by its age in unmasked steps."""
    if window[0] == "sliding":
        return (age < window[1]).double()
    return torch.ones_like(age) if window[0] == "cumulative" else 0.5 ** (age / window[1])


class Site:
    """One normalizer over a window: y_t = gain (a_t - mu_t) / sqrt(v_t + eps) + shift, over the stacked past."""

    def __init__(
        self, base: str, window: Window, gain: Tensor | None = None, shift: Tensor | None = None, eps=1e-5, groups=1
    ):
        self.base, self.window, self.eps, self.groups = base, window, eps, groups
        self.gain = torch.ones((), dtype=torch.float64) if gain is None else gain
        self.shift = torch.zeros((), dtype=torch.float64) if shift is None else shift
        self.past: list[Tensor] = []
        self.mask: list[Tensor] = []
        self.pooled: list[tuple[Tensor, Tensor, Tensor]] = []  # per step: mean, biased variance, total weight

    def __call__(self, a: Tensor, mask: Tensor | None = None) -> Tensor:
        self.past.append(a)
        self.mask.append(torch.ones(len(a), dtype=torch.bool) if mask is None else mask)
        live = torch.stack(self.mask)  # [m, B]
        stack = torch.stack([torch.where(on[:, None], p, 0.0) for p, on in zip(self.past, self.mask, strict=True)])
        stack = stack.unflatten(-1, (self.groups, -1))  # [m, B, G, D / G]
        counted = (live.any(1, keepdim=True) if self.base == "batch" else live).double()
        age = counted.sum(0) - counted.cumsum(0)
        w = (weight_of(self.window, age) * live)[..., None, None].expand_as(stack)
        over = (0, 1) if self.base == "batch" else (0, 3)
        total = w.sum(over, keepdim=True)
        total = torch.where(total > 0, total, 1.0)
        mu = torch.zeros_like(total) if self.base == "rms" else (w * stack).sum(over, keepdim=True) / total
        v = (w * (stack - mu) ** 2).sum(over, keepdim=True) / total
        self.pooled.append((mu[0], v[0], total[0]))
        y = ((stack[-1] - mu[0]) / torch.sqrt(v[0] + self.eps)).flatten(-2)
        return self.gain * y + self.shift


def normalized(base: str, window: Window, xs: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """Normalize a whole sequence `xs` [T, B, D]; masked steps are 0."""
    return run(Site(base, window, **options), xs, mask)


def run(site: Site, xs: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(xs.shape[:2], dtype=torch.bool) if mask is None else mask
    return torch.stack([torch.where(on[:, None], site(x, on), 0.0) for x, on in zip(xs, mask, strict=True)])


def lstm(w: Weights, x: Tensor, state: tuple[Tensor, Tensor], ih, hh, cell, joint=False, normed=False):
    """gates = N_ih(W x + b) + N_hh(U h + b); c' = f c + i g; h' = o tanh(N_c(c')), c' carried raw unless `normed`."""
    h, c = state
    a, b = _affine(x, w["weight_ih"], w["bias_ih"]), _affine(h, w["weight_hh"], w["bias_hh"])
    i, f, g, o = (ih(a + b) if joint else ih(a) + hh(b)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    shown = cell(c)
    h = torch.sigmoid(o) * torch.tanh(shown)
    if w.get("weight_hr") is not None:
        h = h @ w["weight_hr"].T
    return h, (h, shown if normed else c)


def gru(w: Weights, x: Tensor, state: tuple[Tensor], ih, hh):
    """r, z, n with the reset gate after the matrix product, as in torch.nn."""
    (h,) = state
    xr, xz, xn = ih(_affine(x, w["weight_ih"], w["bias_ih"])).chunk(3, -1)
    hr, hz, hn = hh(_affine(h, w["weight_hh"], w["bias_hh"])).chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    h = (1 - z) * torch.tanh(xn + r * hn) + z * h
    return h, (h,)


def rnn(w: Weights, x: Tensor, state: tuple[Tensor], ih, hh, joint=False, nonlinearity="tanh"):
    """h' = tanh(N_ih(W x + b) + N_hh(U h + b)), or relu."""
    a, b = _affine(x, w["weight_ih"], w["bias_ih"]), _affine(state[0], w["weight_hh"], w["bias_hh"])
    h = getattr(torch, nonlinearity)(ih(a + b) if joint else ih(a) + hh(b))
    return h, (h,)


def unroll(
    step, w: Weights, xs: Tensor, state: tuple[Tensor, ...], sites: Mapping[str, Site | None], lengths=None, **placement
):
    """Run `step` over xs [T, B, I]; rows past their length keep their state and return 0."""
    lengths = torch.full((xs.shape[1],), len(xs)) if lengths is None else lengths
    ys = []
    for t, x in enumerate(xs):
        on = t < lengths
        live = {name: _bound(site, on) for name, site in sites.items()}
        y, new = step(w, torch.where(on[:, None], x, 0.0), state, **live, **placement)
        state = tuple(torch.where(on[:, None], n, s) for n, s in zip(new, state, strict=True))
        ys.append(torch.where(on[:, None], y, 0.0))
    return torch.stack(ys), state


def _bound(site: Site | None, on: Tensor):
    return (lambda a: a) if site is None else (lambda a: site(a, on))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias
