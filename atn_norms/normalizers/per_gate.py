"""A normalizer that applies another normalizer to each gate of a site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from atn_norms.errors import mismatch
from atn_norms.normalizers.base import (
    BatchMoments,
    FeatureMoments,
    Normalizer,
    apply_norm,
    batch_moments,
    each_eps,
    feature_moments,
    scanning,
)
from atn_norms.normalizers.batch import synchronized


class _Gates(nn.ModuleList):
    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, synchronized(self._modules.get(name), module))


class PerGate(Normalizer):
    """Normalize each gate of a site with its own normalizer, over equal blocks of the features.

    Each gate has its own options and parameters: `norm.gates[0].eps = 1e-3`. To set `norm.eps` is an `AttributeError`.

    | symbol | meaning | shape |
    |---|---|---|
    | `gates` | G normalizers over D / G features each | |
    | statistic | the stacked statistics of the gates | leaves `[..., G, d]` |
    """

    _calls_modules = False

    def __init__(self, gates: Sequence[Normalizer]) -> None:
        super().__init__()
        self.stateless = all(gate.stateless for gate in gates)
        self.uses_batch_statistics = gates[0].uses_batch_statistics
        self.train_eval_differ = any(gate.train_eval_differ for gate in gates)
        self.scale_invariant = all(gate.scale_invariant for gate in gates)
        self.shift_invariant = all(gate.shift_invariant for gate in gates)
        # Permuting features across gates changes the statistics of both gates.
        self.permutation_equivariant = len(gates) == 1 and gates[0].permutation_equivariant
        features = [getattr(gate, "features", None) for gate in gates]
        self.features = sum(f for f in features if isinstance(f, int)) if None not in features else None
        self.gates = _Gates(gates)
        every = {name for gate in gates for name in (*vars(gate), *gate._parameters, *gate._buffers)}
        self._of_gates = frozenset(every - set(vars(self)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("_of_gates", ()):
            expected = f"an attribute of one gate, such as gates[0].{name}"
            raise AttributeError(mismatch(name, "an attribute of all gates", expected))
        super().__setattr__(name, value)

    def measure(self, x: Tensor) -> Any:
        return self._stack([gate.measure(part) for gate, part in self._parts(x)])

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return torch.cat([apply_norm(g, part, self._of(pooled, i)) for i, (g, part) in enumerate(self._parts(x))], -1)

    def population(self, pooled: Any, step: Tensor) -> Any:
        return self._stack([gate.population(self._of(pooled, i), step) for i, gate in enumerate(self._gates())])

    def counted_steps(self, rows: Tensor) -> Tensor:
        return self._gates()[0].counted_steps(rows)

    def merge_processes(self, statistic: Any, weight: Tensor, dim: int) -> tuple[Any, Tensor]:
        return self._gates()[0].merge_processes(statistic, weight, dim)

    @contextmanager
    def scanning(self) -> Iterator[None]:
        with scanning(self._gates()):
            yield

    def unsupported_reason(self, window: Any) -> str | None:
        return next(filter(None, (gate.unsupported_reason(window) for gate in self._gates())), None)

    def feature_moments(self) -> FeatureMoments | None:
        moments = _of_every_gate([feature_moments(gate) for gate in self._gates()])
        if moments is None or len({(m.groups, m.centred) for m in moments}) > 1:
            return None
        first, gates, eps = moments[0], len(moments), _joined_eps(moments)
        return FeatureMoments(first.groups * gates, first.centred, eps, *_joined_affine(moments), (gates, *first.leaf))

    def batch_moments(self) -> BatchMoments | None:
        moments = _of_every_gate([batch_moments(gate) for gate in self._gates()])
        if moments is None or len({(m.measured, m.per_step) for m in moments}) > 1 or moments[0].shape:
            return None
        first, gates = moments[0], len(moments)
        shape = (gates, (self.features or 0) // gates)
        return BatchMoments(_joined_eps(moments), *_joined_affine(moments), first.measured, first.per_step, shape)

    def _gates(self) -> list[Normalizer]:
        return [gate for gate in self.gates if isinstance(gate, Normalizer)]

    def _parts(self, x: Tensor) -> Iterator[tuple[Normalizer, Tensor]]:
        return zip(self._gates(), x.chunk(len(self.gates), -1), strict=True)

    @staticmethod
    def _stack(statistics: Sequence[Any]) -> Any:
        kinds = [type(statistic).__name__ for statistic in statistics]
        if len(set(kinds)) > 1:  # such as a batch norm in training beside one in evaluation
            expected = "one class of statistic: gates of one kind, all in training or all in evaluation mode"
            raise ValueError(mismatch("gates", ", ".join(kinds), expected))
        return type(statistics[0])(*(torch.stack(leaves, -2) for leaves in zip(*statistics, strict=True)))

    @staticmethod
    def _of(pooled: Any, gate: int) -> Any:
        return type(pooled)(*(leaf[..., gate, :] for leaf in pooled))


M = TypeVar("M", FeatureMoments, BatchMoments)


def _of_every_gate(declarations: Sequence[M | None]) -> list[M] | None:
    """Return the declarations if every gate has one, and all or none have a gain and a shift; None otherwise."""
    moments = [each for each in declarations if each is not None]
    if not moments or len(moments) < len(declarations):
        return None
    kinds = {(m.gain is None, m.shift is None, m.shape, len(each_eps(m))) for m in moments}
    return moments if len(kinds) == 1 else None


def _joined_eps(moments: Sequence[FeatureMoments] | Sequence[BatchMoments]) -> float | tuple[float, ...]:
    """Return the only eps, or those of every gate in turn: a gate may have several, and all gates as many."""
    every = tuple([eps for each in moments for eps in each_eps(each)])
    return every[0] if len(set(every)) == 1 else every


def _joined_affine(moments: Sequence[FeatureMoments] | Sequence[BatchMoments]) -> tuple[Tensor | None, Tensor | None]:
    """Concatenate the gains and the shifts of all gates."""
    gains = [each.gain for each in moments if each.gain is not None]
    shifts = [each.shift for each in moments if each.shift is not None]
    return torch.cat(gains) if gains else None, torch.cat(shifts) if shifts else None
