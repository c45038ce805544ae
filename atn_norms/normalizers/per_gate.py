"""One normalizer for each gate of a site, as one normalizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.normalizers.base import (
    BatchMoments,
    FeatureMoments,
    Normalizer,
    apply_norm,
    batch_moments,
    feature_moments,
    scanning,
)
from atn_norms.normalizers.batch import synchronized


class _Gates(nn.ModuleList):
    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, synchronized(self._modules.get(name), module))


class PerGate(Normalizer):
    """One normalizer for each gate of a site: the features are cut into equal blocks that never meet.

    | symbol | meaning | shape |
    |---|---|---|
    | `gates` | G normalizers over D / G features each | |
    | statistic | the gates' own statistics, stacked | leaves `[..., G, d]` |
    """

    def __init__(self, gates: Sequence[Normalizer]) -> None:
        super().__init__()
        self.gates = _Gates(gates)
        self.stateless = all(gate.stateless for gate in gates)
        self.uses_batch_statistics = gates[0].uses_batch_statistics
        self.train_eval_differ = any(gate.train_eval_differ for gate in gates)
        self.scale_invariant = all(gate.scale_invariant for gate in gates)
        self.shift_invariant = all(gate.shift_invariant for gate in gates)
        self.permutation_equivariant = (
            len(gates) == 1 and gates[0].permutation_equivariant
        )  # a feature may not leave its gate
        features = [getattr(gate, "features", None) for gate in gates]
        self.features = sum(f for f in features if isinstance(f, int)) if None not in features else None

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
        every = [feature_moments(gate) for gate in self._gates()]
        known = [moments for moments in every if moments is not None]
        first = known[0] if known else None
        if first is None or len(known) < len(every):
            return None
        if len({(m.groups, m.centred, m.eps, m.gain is None, m.shift is None) for m in known}) > 1:
            return None
        return FeatureMoments(
            first.groups * len(known),
            first.centred,
            first.eps,
            _joined([m.gain for m in known]),
            _joined([m.shift for m in known]),
            (len(known), *first.leaf),
        )

    def batch_moments(self) -> BatchMoments | None:
        every = [batch_moments(gate) for gate in self._gates()]
        known = [moments for moments in every if moments is not None]
        if not known or len(known) < len(every):
            return None
        if (
            len({(m.eps, m.gain is None, m.shift is None, m.measured, m.per_step, m.shape) for m in known}) > 1
            or known[0].shape
        ):
            return None
        features = self.features or 0
        gain, shift = _joined([m.gain for m in known]), _joined([m.shift for m in known])
        first, shape = known[0], (len(known), features // len(known))
        return BatchMoments(first.eps, gain, shift, first.measured, first.per_step, shape)

    def _gates(self) -> list[Normalizer]:
        return [gate for gate in self.gates if isinstance(gate, Normalizer)]

    def _parts(self, x: Tensor) -> Iterator[tuple[Normalizer, Tensor]]:
        return zip(self._gates(), x.chunk(len(self.gates), -1), strict=True)

    @staticmethod
    def _stack(statistics: Sequence[Any]) -> Any:
        return type(statistics[0])(*(torch.stack(leaves, -2) for leaves in zip(*statistics, strict=True)))

    @staticmethod
    def _of(pooled: Any, gate: int) -> Any:
        return type(pooled)(*(leaf[..., gate, :] for leaf in pooled))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None
