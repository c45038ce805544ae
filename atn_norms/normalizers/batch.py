"""Batch normalization: statistics over the rows of a batch, and running statistics for evaluation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_serializer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from atn_norms.errors import mismatch
from atn_norms.modes import observed
from atn_norms.normalizers.base import (
    LARGEST,
    BatchMoments,
    Normalizer,
    NormSpec,
    affine,
    checked_eps,
    checked_features,
    reset_affine,
)
from atn_norms.options import checked_count
from atn_norms.pytree import expand_mask
from atn_norms.statistics import CountedMoments, Moments, promoted


class _OfTorch(_BatchNorm):
    """torch's base class of batch norms, by which torch's tools find them, without its constructor."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class BatchNorm(Normalizer, _OfTorch):
    r"""Centre and scale each feature by its mean and variance over batch and window.

    $$y = g \odot \frac{a - \mu}{\sqrt{v + \epsilon}} + b, \qquad
    \hat\mu \leftarrow (1 - m)\,\hat\mu + m\,\mu, \qquad \hat v \leftarrow (1 - m)\,\hat v + m\,\tfrac{n}{n-1} v$$

    Source: Ioffe, Szegedy, arXiv 1502.03167. In recurrent networks: Cooijmans et al., arXiv 1603.09025, who keep one
    population per time step and start the gain at 0.1. Pooled over time (derived): all unmasked rows of all steps in
    the window have equal weight.

    In training, the statistic of the window normalizes and is recorded. Each scan updates the population once, by the
    mean over its unmasked steps. With `max_steps`, each step index below `max_steps` has its own population and update.
    In evaluation, the population normalizes, so rows do not affect each other. Steps after the last recorded step use
    its population.

    | symbol | meaning | shape |
    |---|---|---|
    | `weight`, `bias` | gain g, starts at `initial_gain`; shift b, starts at 0 | `[D]` |
    | `running_mean`, `running_var` | population, starts at 0 and 1 | `[D]`, or `[max_steps, D]` |
    | `num_batches_tracked` | updates so far | `[]`, or `[max_steps]` |
    | `momentum` | m in (0, 1]; None gives all updates equal weight | |
    | `sync` | True pools the rows of all processes of `process_group`, as `nn.SyncBatchNorm` does | |
    | n | unmasked rows in the window | |

    The class is a subclass of torch's `_BatchNorm`, so `torch.optim.swa_utils.update_bn` updates the population and
    `nn.SyncBatchNorm.convert_sync_batchnorm` sets `sync`. With `sync` every process must run the same number of steps.

    With `max_steps`, all rows of a batch share one step index: the number of steps since the initial state at which
    any row was unmasked. If a row begins later than the others, evaluation normalizes its first steps with the
    populations of the shared index. Use a separate batch and state for such rows.

    Errors: `ValueError` for fewer than two rows in training (torch rejects one row), for axes between batch and
    features, and for options out of range; `TypeError` for `features` or `max_steps` of another type.

    >>> import torch
    >>> from atn_norms import AssortedTime, BatchNorm
    >>> norm = AssortedTime(BatchNorm(8), window=1)
    >>> y, _ = norm.scan(torch.randn(5, 16, 8))
    >>> y.mean(1).abs().max() < 1e-6
    tensor(True)
    """

    uses_batch_statistics = True
    train_eval_differ = True
    scale_invariant = True
    shift_invariant = True
    permutation_equivariant = True
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    affine = True  # of torch's batch norms

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        max_steps: int | None = None,
        initial_gain: float = 1.0,
        sync: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.eps = checked_features(features), checked_eps(eps)
        if momentum is not None and not (_is_number(momentum) and 0 < momentum <= 1):
            expected = "a number in (0, 1], or None for the mean of all updates"
            raise ValueError(mismatch("momentum", repr(momentum), expected))
        max_steps = None if max_steps is None else checked_count("max_steps", max_steps)
        if not (_is_number(initial_gain) and abs(initial_gain) <= LARGEST):
            raise ValueError(mismatch("initial_gain", repr(initial_gain), f"a number from {-LARGEST} to {LARGEST}"))
        self.momentum, self.max_steps, self.initial_gain = momentum, max_steps, initial_gain
        self.sync, self.process_group = sync, None
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        steps = () if max_steps is None else (max_steps,)
        self.register_buffer("running_mean", torch.empty(*steps, features))
        self.register_buffer("running_var", torch.empty(*steps, features))
        self.register_buffer("num_batches_tracked", torch.empty(steps, dtype=torch.int64))
        self._records: dict[int, list[tuple[CountedMoments, Tensor]]] = {}  # by thread, while it scans
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to `initial_gain`, the shift to 0, and the population to mean 0 and variance 1."""
        reset_affine(self.weight, self.bias, self.initial_gain)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    @property
    def track_running_stats(self) -> bool:
        """True, under torch's name: evaluation uses the populations."""
        return True

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        if value is not True:
            raise ValueError(
                mismatch("track_running_stats", repr(value), "True, since evaluation uses the populations")
            )

    @property
    def num_features(self) -> int:
        """Number of features, under torch's name."""
        return self.features

    @property
    def synchronizes(self) -> bool:
        """True if rows of several processes are pooled: in training, with `sync`, in an initialized group."""
        dist = torch.distributed
        if not (self.sync and self.training and dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.process_group) > 1

    def merge_processes(self, statistic: CountedMoments, weight: Tensor, dim: int) -> tuple[CountedMoments, Tensor]:
        if not self.synchronizes:
            return statistic, weight
        rows = expand_mask(weight, statistic.count).expand_as(statistic.count)
        sizes = [leaf.shape[-1] for leaf in (*statistic, rows)]
        gathered = _Gather.apply(torch.cat([*statistic, rows], -1), self.process_group)
        *leaves, weights = gathered.squeeze(dim + 1).movedim(0, dim).split(sizes, -1)
        weights = weights.flatten(weight.ndim)[..., 0]
        pooled = CountedMoments(*leaves).pool(weights, dim)
        return CountedMoments(*(leaf.unsqueeze(dim) for leaf in pooled)), weights.sum(dim, keepdim=True)

    def measure(self, x: Tensor) -> CountedMoments:
        if self.training and x.ndim > 1 and x.shape[-2] < 2 and not self.synchronizes:
            # torch's error of the same fault begins with these words.
            torch_words = f"Expected more than 1 value per channel when training, got input size {list(x.shape)}"
            expected = f"a batch of at least 2 rows [batch, {self.features}], or evaluation mode"
            raise ValueError(mismatch(torch_words, f"{x.shape[-2]} row(s)", expected))
        rows = promoted(x)
        return CountedMoments(rows, torch.zeros_like(rows), torch.ones_like(rows[..., :1]))

    def normalize(self, x: Tensor, pooled: Moments | CountedMoments) -> Tensor:
        return affine((x - pooled.mean) * torch.rsqrt(pooled.var + self.eps), self.weight, self.bias)

    def population(self, pooled: CountedMoments, step: Tensor) -> Moments | CountedMoments:
        if pooled.mean.ndim != step.ndim + 1:
            got = f"{pooled.mean.ndim - step.ndim - 1} axes between batch and features"
            expected = f"[batch, {self.features}] for BatchNorm, or [time, batch, {self.features}] in scan"
            raise ValueError(mismatch("x", got, expected))
        if self.training:
            with torch.no_grad():
                record = CountedMoments(*(leaf.detach() for leaf in pooled)), step
                records = self._records.get(_thread())
                if records is None:
                    self._update([record])
                else:
                    records.append(record)
            return pooled
        mean, var = promoted(self.running_mean), promoted(self.running_var)
        if self.max_steps is not None:
            place = self._recorded()[step.clamp(0, self.max_steps - 1)]
            mean, var = mean[place], var[place]
        return Moments(mean.expand(pooled.mean.shape), var.expand(pooled.var.shape))

    def _recorded(self) -> Tensor:
        """Return, for each step, the last recorded step up to it, or else the first recorded step `[max_steps]`."""
        recorded = self.num_batches_tracked > 0
        steps = torch.arange(len(recorded), device=recorded.device)
        place = recorded.to(steps.dtype).cumsum(0) - 1  # in the list of recorded steps; ONNX has no cumulative maximum
        listed = steps.new_zeros(len(steps) + 1).scatter(0, torch.where(recorded, place, len(steps)), steps)
        return listed[place.clamp(min=0)]

    def counted_steps(self, rows: Tensor) -> Tensor:
        return rows >= 2 if self.training else rows > 0  # one row has no variance to record

    def batch_moments(self) -> BatchMoments | None:
        if self.synchronizes:
            return None
        return BatchMoments(self.eps, self.weight, self.bias, self.training, self.max_steps is not None)

    @contextmanager
    def scanning(self) -> Iterator[None]:
        thread = _thread()
        if thread in self._records:  # an outer scan commits
            yield
            return
        self._records[thread] = []
        try:
            yield
            if self._records[thread]:  # an exported program cannot be loaded with an empty block of no_grad
                with torch.no_grad():
                    self._update(self._records[thread])
        finally:
            del self._records[thread]

    def _update(self, records: list[tuple[CountedMoments, Tensor]]) -> None:
        """Move each population towards the average of its recorded steps, weighted by their number of samples."""
        with _exclusive():
            self._move(records)

    def _move(self, records: list[tuple[CountedMoments, Tensor]]) -> None:
        step = _joined([step.flatten() for _, step in records])
        mean, var, count = (
            _joined([leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves])
            for leaves in zip(*(pooled for pooled, _ in records), strict=True)
        )
        count = count.squeeze(1)
        valid = (step >= 0) & (count >= 2)  # one sample has no variance
        if self.max_steps is None:
            member = valid.unsqueeze(0)
        else:
            member = valid & (step == torch.arange(self.max_steps, device=step.device).unsqueeze(1))
        counts = torch.where(member, count, 0.0)  # [populations, recorded steps]
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        updated = member.any(1)
        updates = self.num_batches_tracked.add_(updated.reshape(self.num_batches_tracked.shape))
        rate: float | Tensor | None = self.momentum
        if rate is None:
            rate = 1.0 / updates.clamp(min=1).to(mean.dtype).reshape(-1, 1)
        updated, unbiased = updated.unsqueeze(1), share * (count / (count - 1).clamp(min=1))
        if not _all_known(valid):  # a weight of 0 does not remove an infinite statistic
            mean, var = (torch.where(valid.unsqueeze(1), leaf, 0.0) for leaf in (mean, var))
        for running, leaf, weights in ((self.running_mean, mean, share), (self.running_var, var, unbiased)):
            old = promoted(running).reshape(len(member), -1)
            running.copy_(torch.where(updated, old.lerp(weights @ leaf, rate), old).reshape(running.shape))

    def extra_repr(self) -> str:
        sync = ", sync=True" if self.sync else ""
        return f"{self.features}, eps={self.eps}, momentum={self.momentum}, max_steps={self.max_steps}{sync}"


class BatchNormSpec(NormSpec):
    """Options of `BatchNorm`."""

    kind: Literal["batch"] = "batch"
    eps: float = Field(default=1e-5, ge=0, description="added to the variance, inside the root")
    momentum: float | None = Field(
        default=0.1, gt=0, le=1, description="weight of one update; null: mean of all updates"
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=10**9, description="one population per step up to here; null: one for all"
    )
    sync: bool = Field(default=False, description="pool the rows of all processes of a distributed job")
    initial_gain: float = Field(
        default=1.0, ge=-LARGEST, le=LARGEST, description="initial value of the gain (0.1 in arXiv 1603.09025)"
    )

    @model_serializer(mode="wrap")
    def _keep_ids(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Omit `sync` if it is off, so that trials from before this option keep their ids."""
        return {name: value for name, value in handler(self).items() if name != "sync" or value}

    def build(self, features: int) -> BatchNorm:
        return BatchNorm(
            features,
            eps=self.eps,
            momentum=self.momentum,
            max_steps=self.max_steps,
            initial_gain=self.initial_gain,
            sync=self.sync,
        )


class _Gather(torch.autograd.Function):
    """Stack a tensor of every process along a new axis 0; the gradient is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient[torch.distributed.get_rank(ctx.group)], None


def synchronized(old: nn.Module | None, new: nn.Module | None) -> nn.Module | None:
    """Return `old` with `sync` set where torch would replace a `BatchNorm` by `nn.SyncBatchNorm`, else `new`."""
    if not (isinstance(old, BatchNorm) and isinstance(new, nn.SyncBatchNorm)):
        return new
    old.sync, old.process_group = True, new.process_group
    return old


_UPDATES = threading.Lock()  # an update reads a population and writes it back


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


@contextmanager
def _exclusive() -> Iterator[None]:
    if torch.compiler.is_compiling():
        yield
        return
    with _UPDATES:
        yield


def _all_known(flags: Tensor) -> bool:
    """Return True if all flags are known to be True: plain ones on the CPU, with no observer of the call."""
    return type(flags) is Tensor and flags.device.type == "cpu" and not observed() and bool(flags.all())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
