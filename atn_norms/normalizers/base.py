"""The base class of normalizers, and the declarations that let kernels compute them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from atn_norms.deprecation import RenamedAttribute, adopt_renamed
from atn_norms.registry import Options, to_int
from atn_norms.statistics import NoStatistic, Statistic

if TYPE_CHECKING:
    from atn_norms.windows import Window

LARGEST = 3e38  # what float32 holds, rounded down


class KeyWithCure(str):
    """A key of a checkpoint that torch's error prints with the call that loads the checkpoint."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)} (a norm: atn_norms.load_weights loads checkpoints with and without norms)"


class Normalizer(nn.Module, ABC):
    """Compute per-row statistics; normalize with pooled ones.

    | symbol | meaning | shape |
    |---|---|---|
    | `x` | pre-activations; every leading axis is a row | `[..., D]` |
    | statistic | the statistic of one row | leaves `[..., d]` |
    | `pooled` | the same statistic over the window | leaves `[..., d]`, or 1 where rows share it |
    | `step` | index of each step since the initial state, -1 where `counted_steps` is False | `[...]`, int64 |

    Class attributes declare properties. Declared properties are tested (`atn_norms.testing`); undeclared ones are not.

    | declaration | meaning |
    |---|---|
    | `stateless` | there is no statistic: `measure` is not called, and `normalize` gets an empty one |
    | `uses_batch_statistics` | a step's statistic is computed over all rows: the batch is merged before the window |
    | `train_eval_differ` | training and evaluation compute different results |
    | `scale_invariant` | a whole sequence times d > 0 comes out the same, as eps goes to 0 |
    | `shift_invariant` | a whole sequence plus one number comes out the same |
    | `permutation_equivariant` | permuting the features permutes the output (gain and shift apart) |
    """

    stateless: bool = False
    uses_batch_statistics: bool = False
    train_eval_differ: bool = False
    scale_invariant: bool = False
    shift_invariant: bool = False
    permutation_equivariant: bool = False

    couples_batch = RenamedAttribute("uses_batch_statistics")
    differs_in_evaluation = RenamedAttribute("train_eval_differ")
    order_free = RenamedAttribute("permutation_equivariant")
    refuses = RenamedAttribute("unsupported_reason")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adopt_renamed(cls)

    def __init__(self) -> None:
        super().__init__()
        if type(self).measure is Normalizer.measure and not self.stateless:
            raise TypeError(f"{type(self).__name__}: got no measure; expected one, or `stateless = True`")

    def measure(self, x: Tensor) -> Statistic:
        """Compute the statistic of every row of `x` `[..., D]`; leaves in float64 where the device has it.

        A stateless normalizer measures nothing; every other one defines this method.
        """
        return NoStatistic()

    @abstractmethod
    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        """Normalize `x` `[..., D]` with the pooled statistic; the result may keep a wider type than `x`."""

    def population(self, pooled: Any, step: Tensor) -> Any:
        """Return the statistic to normalize with: `pooled`, or running statistics in evaluation."""
        return pooled

    def counted_steps(self, rows: Tensor) -> Tensor:
        """Return True for each step whose index `population` receives, by its number of unmasked rows."""
        return rows > 0

    def merge_processes(self, statistic: Any, weight: Tensor, dim: int) -> tuple[Any, Tensor]:
        """Merge a batch's statistic and its weight, both of length 1 along `dim`, with those of other processes."""
        return statistic, weight

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start, arguments = len(missing_keys), (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *arguments)
        missing_keys[start : start + 1] = map(KeyWithCure, missing_keys[start : start + 1])

    def forward(self, x: Tensor, pooled: Any) -> Tensor:
        """Normalize, as `normalize` does; this is the call that hooks of torch.nn see."""
        return self.normalize(x, pooled)

    @contextmanager
    def scanning(self) -> Iterator[None]:
        """Commit the records of `population` as one update at the end of a scan; a no-op without records."""
        yield

    def unsupported_reason(self, window: Window[Any]) -> str | None:
        """Return one sentence on why its statistics cannot be pooled over a window, or None."""
        return None

    def feature_moments(self) -> FeatureMoments | None:
        """Declare that `measure` and `normalize` are exactly `FeatureMoments`, and a fast backend may compute them."""
        return None

    def batch_moments(self) -> BatchMoments | None:
        """Declare that all it computes is exactly `BatchMoments`, and a fast backend may compute it."""
        return None


@dataclass(frozen=True)
class FeatureMoments:
    r"""The declaration of a normalizer that scales by moments over its features, group by group.

    $$y_i = g_i \frac{x_i - \mu_{G(i)}}{\sqrt{v_{G(i)} + \epsilon}} + b_i$$

    | symbol | meaning | shape |
    |---|---|---|
    | `groups` | equal blocks of neighbouring features, each with its own statistic | |
    | `centred` | the statistic is `Moments`; otherwise $\mu = 0$, and it is the `Average` of squares | |
    | `eps` | added inside the root | |
    | `gain`, `shift` | g and b; None where there is none | `[D]` |
    | `shape` | trailing axes of a leaf of one row's statistic; `(groups,)` by default | |
    """

    groups: int
    centred: bool
    eps: float
    gain: Tensor | None
    shift: Tensor | None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"FeatureMoments.groups: got {self.groups!r}; expected an integer of at least 1")
        _check_declared("FeatureMoments", self.eps, self.shape, self.groups)

    @property
    def leaf(self) -> tuple[int, ...]:
        """Trailing axes of a leaf of the statistic."""
        return self.shape or (self.groups,)

    def check(self, features: int) -> None:
        """Raise `ValueError` where the declaration does not fit a number of features."""
        if features % self.groups:
            raise ValueError(f"FeatureMoments.groups: got {self.groups}; expected a divisor of {features} features")
        _check_affine(self, features)


@dataclass(frozen=True)
class BatchMoments:
    r"""The declaration of a normalizer that scales each feature by its moments over the rows of a batch.

    $$y_i = g_i \frac{x_i - \mu_i}{\sqrt{v_i + \epsilon}} + b_i$$

    The statistic is `CountedMoments`, with one mean and one variance for each feature, and $\mu, v$ are the pooled
    ones (`measured`), or those that `population` gives in their place. A backend calls `population` once for all steps
    of a scan, as `AssortedTime.scan` does; where it is not `measured`, with zeros for the pooled statistic, and for one
    step only if not `per_step`.

    | symbol | meaning | shape |
    |---|---|---|
    | `eps` | added inside the root | |
    | `gain`, `shift` | g and b; None where there is none | `[D]` |
    | `measured` | True if the pooled statistic normalizes | |
    | `per_step` | True if the result of `population` depends on the step index | |
    | `shape` | shape of the means of a step in their leaf; `(D,)` by default | |
    """

    eps: float
    gain: Tensor | None
    shift: Tensor | None
    measured: bool
    per_step: bool
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_declared("BatchMoments", self.eps, self.shape, None)

    def check(self, features: int) -> None:
        """Raise `ValueError` where the declaration does not fit a number of features."""
        _check_declared("BatchMoments", self.eps, self.shape, features)
        _check_affine(self, features)


def _check_declared(name: str, eps: float, shape: tuple[int, ...], elements: int | None) -> None:
    if not (isinstance(eps, int | float) and 0 <= eps < float("inf")):
        raise ValueError(f"{name}.eps: got {eps!r}; expected a finite number of at least 0")
    if shape and elements is not None and math.prod(shape) != elements:
        raise ValueError(f"{name}.shape: got {list(shape)}; expected {elements} elements")


def _check_affine(moments: FeatureMoments | BatchMoments, features: int) -> None:
    for name, tensor in (("gain", moments.gain), ("shift", moments.shift)):
        if tensor is not None and tensor.shape != (features,):
            label = f"{type(moments).__name__}.{name}"
            raise ValueError(f"{label}: got shape {list(tensor.shape)}; expected [{features}]")


def feature_moments(normalizer: Normalizer) -> FeatureMoments | None:
    """Return the declaration of a normalizer, or None where a subclass overrides what it declares."""
    return normalizer.feature_moments() if _declares(normalizer, "feature_moments") else None


def batch_moments(normalizer: Normalizer) -> BatchMoments | None:
    """Return the declaration of a normalizer, or None where a subclass overrides what it declares."""
    return normalizer.batch_moments() if _declares(normalizer, "batch_moments") else None


def _declares(normalizer: Normalizer, declaration: str) -> bool:
    for base in type(normalizer).__mro__:  # the first class with a declaration or a method decides
        attributes = base.__dict__
        if declaration in attributes:
            return True
        if "measure" in attributes or "normalize" in attributes or "population" in attributes:
            return False
    return False


class NormSpec(Options, ABC):
    """Options of a normalizer: a frozen model with a `kind`, which builds the normalizer for a number of features."""

    family: ClassVar[str | None] = "normalizer"
    kind: str

    @abstractmethod
    def build(self, features: int) -> Normalizer:
        """Build a normalizer over `features` features; `ValueError` where the options do not support the number."""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(normalizer: nn.Module) -> bool:
    """Return whether hooks wait for calls of a normalizer or of a module inside it."""
    return any(getattr(module, hooks) for module in normalizer.modules() for hooks in _HOOKS)


def apply_norm(normalizer: Normalizer, x: Tensor, pooled: Any) -> Tensor:
    """Normalize; as a call of the module where hooks wait for one."""
    return normalizer(x, pooled) if has_hooks(normalizer) else normalizer.normalize(x, pooled)


def checked_features(features: int) -> int:
    """Return `features` as an `int`; `TypeError` or `ValueError` if it is no positive integer."""
    features = to_int(features)
    if isinstance(features, bool) or not isinstance(features, int):
        raise TypeError(f"features: {features!r} is {type(features).__name__}; allowed: an integer of at least 1")
    if features < 1:
        raise ValueError(f"features: {features}; allowed: an integer of at least 1")
    return features


def checked_eps(eps: float) -> float:
    """Return `eps`; `ValueError` if it is negative or not finite."""
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: {eps}; allowed: a finite number of at least 0")
    return eps


@contextmanager
def scanning(normalizers: Sequence[Normalizer]) -> Iterator[None]:
    """One scan of several normalizers: their records are committed together when it ends, or not at all."""
    if not normalizers:
        yield
        return
    with normalizers[0].scanning(), scanning(normalizers[1:]):
        yield
