"""Normalizers drawn at random: trees of the operations that programs have, over rows, groups and pooled leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import atn_norms as an
from atn_norms.statistics import promoted

# Values and derivatives of all functions are within a few orders of magnitude for arguments of order 10.
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "square": lambda x: torch.tanh(x).square(),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.3),
    "reciprocal": lambda x: 1 / (x.abs() + 0.5),
    "log": lambda x: (x.abs() + 0.3).log(),
    "log1p": lambda x: torch.log1p(x.abs()),
    "exp": lambda x: torch.tanh(x).exp(),
    "expm1": lambda x: torch.expm1(torch.tanh(x)),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
    "silu": nn.functional.silu,
    "relu": torch.relu,
    "leaky": nn.functional.leaky_relu,
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "hardtanh": nn.functional.hardtanh,
    "power": lambda x: (x.abs() + 0.2) ** 1.7,
    "cube": lambda x: torch.tanh(x) ** 3,
    "inverse": lambda x: (x.abs() + 0.4) ** -1.3,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "sign": lambda x: torch.sign(x) * x,
    "fill": lambda x: x.masked_fill(x > 0.5, 0.25),
    "ones": lambda x: x + torch.ones_like(x),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda a, b: torch.tanh(a) * b,
    "div": lambda a, b: a / (b.abs() + 0.5),
    "max": torch.maximum,
    "min": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, 0.5 * b),
    "both": lambda a, b: torch.where((a > 0) & (b <= 1), a, b),
    "power": lambda a, b: (a.abs() + 0.3) ** torch.tanh(b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, torch.tanh(a), b, value=0.5),
}
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1),
    "sum": lambda x: x.sum(-1) / x.shape[-1],
    "var": lambda x: x.var(-1, correction=0),
    "norm": lambda x: (torch.linalg.vector_norm(x, dim=-1) + 0.1) / x.shape[-1] ** 0.5,
}


def grown(source: random.Random, leaves: tuple[str, ...], depth: int) -> Any:
    """Return a random expression over names."""
    if depth == 0 or source.random() < 0.15:
        return source.choice(leaves)
    if source.random() < 0.5:
        return source.choice(sorted(UNARY)), grown(source, leaves, depth - 1)
    pair = grown(source, leaves, depth - 1), grown(source, leaves, depth - 1)
    return (source.choice(sorted(BINARY)), *pair)


def value(tree: Any, names: dict[str, Tensor]) -> Tensor:
    """Compute a random expression."""
    if isinstance(tree, str):
        return names[tree]
    name, *parts = tree
    arguments = [value(part, names) for part in parts]
    return UNARY[name](arguments[0]) if len(arguments) == 1 else BINARY[name](*arguments)


class RandomNorm(an.Normalizer):
    """Normalizer of random expressions in `groups` groups, determined by the seed."""

    def __init__(self, features: int, seed: int) -> None:
        super().__init__()
        source = random.Random(seed)
        self.features = features
        divisors = [count for count in range(1, features + 1) if features % count == 0]
        self.groups = source.choice([1, 1, *divisors])
        self.kind = source.choice(["average", "average", "moments", "none"])
        self.stateless = self.kind == "none"
        self.reduce = source.choice(sorted(REDUCE) if features > self.groups else ["mean"])
        self.measured = tuple(
            grown(source, ("x", "gain", "alpha"), 2)
            for _ in range(source.choice([1, 1, 2, 3]) if self.kind == "average" else 1)
        )
        leaves = (
            ()
            if self.stateless
            else tuple(f"leaf{i}" for i in range(2 if self.kind == "moments" else len(self.measured)))
        )
        self.normed = grown(source, ("x", "gain", "bias", "alpha", *leaves, *leaves), 4)
        self.own = source.random() < 0.2
        shape = (features // self.groups,) if source.random() < 0.2 else (features,)
        self.gain = nn.Parameter(torch.tensor([source.gauss() for _ in range(*shape)]))
        self.bias = nn.Parameter(torch.tensor([source.gauss() for _ in range(features)]))
        self.alpha = nn.Parameter(torch.tensor(source.gauss()))

    def _names(self, x: Tensor) -> dict[str, Tensor]:
        def split(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (self.groups, -1)) if tensor.shape[-1] == self.features else tensor

        return {"x": split(x), "gain": split(self.gain), "bias": split(self.bias), "alpha": self.alpha}

    def measure(self, x: Tensor) -> Any:
        if self.stateless:
            return super().measure(x)
        names = self._names(promoted(x))
        # The variance of a statistic that does not depend on x is 0 up to roundings, where functions may have kinks.
        values = [value(tree, names) + 0.3 * names["x"] for tree in self.measured]
        if self.kind == "moments":
            return an.Moments(values[0].mean(-1), values[0].var(-1, correction=0))
        return an.Average(torch.cat([REDUCE[self.reduce](each) for each in values], -1))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        names = self._names(x)
        leaves = (
            list(pooled)
            if self.kind == "moments"
            else []
            if self.stateless
            else pooled.mean.chunk(len(self.measured), -1)
        )
        names |= {f"leaf{i}": leaf.unsqueeze(-1) for i, leaf in enumerate(leaves)}
        y = value(self.normed, names) + 0.1 * names["x"]
        if self.own:
            y = y - y.mean(-1, keepdim=True)
        return y.expand(names["x"].shape).flatten(-2)


class RandomSpec(an.NormSpec):
    """Options of a random normalizer."""

    kind: Literal["random"] = "random"
    seed: int

    def build(self, features: int) -> RandomNorm:
        return RandomNorm(features, self.seed)
