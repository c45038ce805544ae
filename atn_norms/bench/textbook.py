"""The textbook window: keep the last k pre-activations, stack them, and reduce the stack at every step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atn_norms.cells import Placement
from atn_norms.layers import Recurrent
from atn_norms.normalizers import LayerNorm, RMSNorm

KNOWN = ("layer", "rms")


class Textbook(nn.Module):
    """Direct translation of the definition: LSTM, GRU, RNN with layer or RMS norm.

    It uses the parameters of a layer. Each step costs time and memory proportional to k. `state` is
    `(carried, past)`: past pre-activations of each site, oldest first.

    >>> import torch, atn_norms as an
    >>> layer = an.LSTM(2, 3, norm="layer", window=4, dtype=torch.float64)
    >>> xs = torch.randn(9, 5, 2, dtype=torch.float64)
    >>> torch.allclose(Textbook(layer, 4)(xs)[0], layer(xs)[0], atol=1e-12)
    True
    """

    def __init__(self, layer: Recurrent, window: int | str) -> None:
        super().__init__()
        if not isinstance(window, int):
            raise ValueError("it is written for windows of k steps")
        if layer.spec.placement != Placement():
            raise ValueError("it is written for the default placement")
        self.layer, self.window, self.kind = layer, window, layer.spec.cell.kind
        self.sites: dict[str, Any] = {site: getattr(layer, f"norm_{site}_l0") for site in layer.cell.sites}
        unknown = [type(norm).__name__ for norm in self.sites.values() if type(norm) not in (LayerNorm, RMSNorm)]
        if self.kind not in ("lstm", "gru", "rnn") or unknown:
            raise ValueError(f"it is written for {' and '.join(KNOWN)} norm in lstm, gru and rnn")

    def forward(self, xs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Outputs `[T, B, H]` of inputs `[T, B, D]`, and the state that follows."""
        p: Any = self.layer
        if state is None:
            zeros = tuple(xs.new_zeros(xs.shape[1], p.hidden_size) for _ in p.cell.carried)
            state = zeros, dict.fromkeys(self.sites, ())
        carried, past = state[0], dict(state[1])
        ys = []
        for u in F.linear(xs, p.weight_ih_l0, p.bias_ih_l0).unbind(0):
            a = self.normed("ih", u, past)
            b = self.normed("hh", F.linear(carried[0], p.weight_hh_l0, p.bias_hh_l0), past)
            carried = getattr(self, self.kind)(a, b, carried, past)
            ys.append(carried[0])
        return torch.stack(ys), (carried, past)

    def normed(self, site: str, a: Tensor, past: dict[str, tuple[Tensor, ...]]) -> Tensor:
        """Normalize pre-activations `a` `[B, D]` over the features of the last k steps."""
        norm = self.sites[site]
        steps = (*past[site], a)
        past[site] = steps[1:] if len(steps) == self.window else steps
        stack = torch.stack(steps)  # [m, B, D]
        if isinstance(norm, RMSNorm):
            y = a / torch.sqrt(stack.square().mean((0, 2)).unsqueeze(-1) + norm.eps)
        else:
            var, mean = torch.var_mean(stack, (0, 2), correction=0)
            y = (a - mean.unsqueeze(-1)) / torch.sqrt(var.unsqueeze(-1) + norm.eps)
        return norm.weight * y if norm.bias is None else norm.weight * y + norm.bias

    def lstm(self, a: Tensor, b: Tensor, carried: tuple[Tensor, ...], past: dict[str, Any]) -> tuple[Tensor, ...]:
        """c' = f c + i g, h' = o tanh(N(c'))."""
        i, f, g, o = (a + b).chunk(4, -1)
        c = torch.sigmoid(f) * carried[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.normed("c", c, past)), c

    def gru(self, a: Tensor, b: Tensor, carried: tuple[Tensor, ...], past: dict[str, Any]) -> tuple[Tensor, ...]:
        """h' = (1 - z) n + z h, the reset gate after the product as in torch.nn."""
        (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
        z, n = torch.sigmoid(az + bz), torch.tanh(an + torch.sigmoid(ar + br) * bn)
        return ((1 - z) * n + z * carried[0],)

    def rnn(self, a: Tensor, b: Tensor, carried: tuple[Tensor, ...], past: dict[str, Any]) -> tuple[Tensor, ...]:
        """h' = tanh(a + b), or relu."""
        return (getattr(torch, self.layer.cell.nonlinearity)(a + b),)  # type: ignore[attr-defined]


def footprint(window: int, steps: int, batch: int, features: int, itemsize: int) -> int:
    """Lower bound of the bytes of a training step: the stacks of all steps, which autograd keeps.

    >>> footprint(window=2, steps=3, batch=1, features=10, itemsize=4)
    200
    """
    full = max(0, steps - window) * window
    filling = min(steps, window) * (min(steps, window) + 1) // 2
    return (full + filling) * batch * features * itemsize
