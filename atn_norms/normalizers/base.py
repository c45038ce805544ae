"""The base class of normalizers, and the declarations from which kernels compute them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from atn_norms.deprecation import RenamedAttribute, adopt_renamed
from atn_norms.errors import mismatch
from atn_norms.options import Options, checked_count
from atn_norms.statistics import NoStatistic, Statistic

if TYPE_CHECKING:
    from atn_norms.windows import Window

_DECLARED = "measure", "normalize", "population"
LARGEST = 3e38  # the largest float32, rounded down


class KeyWithCure(str):
    """A checkpoint's missing key; formatted in torch's error, it names the function that loads the checkpoint."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)} (a norm: atn_norms.load_weights loads checkpoints with and without norms)"


class Normalizer(nn.Module, ABC):
    """Compute per-row statistics; normalize with pooled ones.

    | symbol | meaning | shape |
    |---|---|---|
    | `x` | pre-activations; all axes but the last are rows | `[..., D]` |
    | statistic | the statistic of each row | leaves `[..., d]` |
    | `pooled` | the statistic over the window | leaves `[..., d]`; length 1 on axes that share a statistic |
    | `step` | index of each step since the initial state, -1 where `counted_steps` is False | `[...]`, int64 |

    Class attributes declare properties. The conformance suite (`atn_norms.testing`) tests declared properties only.

    | declaration | meaning |
    |---|---|
    | `stateless` | the normalizer has no statistic; `normalize` receives an empty statistic |
    | `uses_batch_statistics` | the statistic of a step covers all rows: rows are merged before the window |
    | `train_eval_differ` | training and evaluation compute different results |
    | `scale_invariant` | multiplying a whole sequence by d > 0 leaves the output unchanged, as eps goes to 0 |
    | `shift_invariant` | adding one number to a whole sequence leaves the output unchanged |
    | `permutation_equivariant` | permuting the features permutes the output (gain and shift apart) |
    """

    stateless: bool = False
    uses_batch_statistics: bool = False
    train_eval_differ: bool = False
    scale_invariant: bool = False
    shift_invariant: bool = False
    permutation_equivariant: bool = False

    _calls_modules: ClassVar[bool] = True  # False: the modules inside are normalizers, which `apply_norm` calls
    _defined: Mapping[str, Any] = {}  # the methods that a declaration covers, as the class was made

    couples_batch = RenamedAttribute("uses_batch_statistics")
    differs_in_evaluation = RenamedAttribute("train_eval_differ")
    order_free = RenamedAttribute("permutation_equivariant")
    refuses = RenamedAttribute("unsupported_reason")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adopt_renamed(cls)
        cls._defined = {name: vars(cls).get(name) for name in _DECLARED}

    def __init__(self) -> None:
        super().__init__()
        if type(self).measure is Normalizer.measure and not self.stateless:
            raise TypeError(mismatch(type(self).__name__, "no `measure`", "a `measure`, or `stateless = True`"))
        if type(self).forward is not Normalizer.forward:
            expected = "a `normalize`, which fast backends compute"
            raise TypeError(mismatch(type(self).__name__, "a `forward`", expected))

    def measure(self, x: Tensor) -> Statistic:
        """Compute the statistic of every row of `x` `[..., D]`; leaves in float64 where the device has it.

        Every normalizer that is not `stateless` defines this method.
        """
        return NoStatistic()

    @abstractmethod
    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        """Normalize `x` `[..., D]` with the pooled statistic; the type of the result may be wider than that of `x`."""

    def population(self, pooled: Any, step: Tensor) -> Any:
        """Return the statistic that `normalize` receives: `pooled`, or running statistics in evaluation."""
        return pooled

    def counted_steps(self, rows: Tensor) -> Tensor:
        """Return True for each step whose index `population` receives, by its number of unmasked rows."""
        return rows > 0

    def merge_processes(self, statistic: Any, weight: Tensor, dim: int) -> tuple[Any, Tensor]:
        """Merge the statistic and the weight of a batch, both of length 1 along `dim`, over all processes."""
        return statistic, weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        missing_keys: list[str] = arguments[2]
        start = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        missing_keys[start : start + 1] = map(KeyWithCure, missing_keys[start : start + 1])

    def forward(self, x: Tensor, pooled: Any) -> Tensor:
        """Call `normalize`, with the hooks of torch.nn; a subclass overrides `normalize`, never this method."""
        return self.normalize(x, pooled)

    @contextmanager
    def scanning(self) -> Iterator[None]:
        """Apply the records of `population` as one update at the end of a scan; do nothing without records."""
        yield

    def unsupported_reason(self, window: Window[Any]) -> str | None:
        """Return the reason, a sentence, why the statistics cannot be pooled over a window; None if they can."""
        return None

    def feature_moments(self) -> FeatureMoments | None:
        """Declare that `measure` and `normalize` equal `FeatureMoments`, so that a fast backend may compute them."""
        return None

    def batch_moments(self) -> BatchMoments | None:
        """Declare that all methods equal `BatchMoments`, so that a fast backend may compute them."""
        return None


@dataclass(eq=False)
class FeatureMoments:
    r"""Declaration of a normalizer that scales each group of features by the moments over the group.

    $$y_i = g_i \frac{x_i - \mu_{G(i)}}{\sqrt{v_{G(i)} + \epsilon}} + b_i$$

    | symbol | meaning | shape |
    |---|---|---|
    | `groups` | number of equal blocks of neighbouring features, each with its own statistic | |
    | `centred` | True: the statistic is `Moments`; False: it is the `Average` of squares, and $\mu = 0$ | |
    | `eps` | added inside the root: one number, or one for each of equal blocks of groups | |
    | `gain`, `shift` | g and b; None without gain or shift | `[D]` |
    | `shape` | trailing axes of a leaf of the statistic of one row; `(groups,)` by default | |
    """

    groups: int
    centred: bool
    eps: float | tuple[float, ...]
    gain: Tensor | None
    shift: Tensor | None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(mismatch("FeatureMoments.groups", repr(self.groups), "an integer of at least 1"))
        _check_declared("FeatureMoments", self.eps, self.shape, self.groups)

    @property
    def leaf(self) -> tuple[int, ...]:
        """Trailing axes of a leaf of the statistic."""
        return self.shape or (self.groups,)

    def check(self, features: int) -> None:
        """Raise `ValueError` if the declaration does not fit the number of features."""
        if features % self.groups:
            raise ValueError(mismatch("FeatureMoments.groups", str(self.groups), f"a divisor of {features} features"))
        _check_affine(self, features)


@dataclass(eq=False)
class BatchMoments:
    r"""Declaration of a normalizer that scales each feature by its moments over the rows of a batch.

    $$y_i = g_i \frac{x_i - \mu_i}{\sqrt{v_i + \epsilon}} + b_i$$

    The statistic is `CountedMoments`, with one mean and one variance for each feature. With `measured`, $\mu, v$ are
    the pooled moments; otherwise they are the result of `population`. As `AssortedTime.scan` does, a backend calls
    `population` once for all steps of a scan. Without `measured`, the backend passes zeros as the pooled statistic.
    Without `per_step`, it passes one step.

    | symbol | meaning | shape |
    |---|---|---|
    | `eps` | added inside the root: one number, or one for each of equal blocks of features | |
    | `gain`, `shift` | g and b; None without gain or shift | `[D]` |
    | `measured` | True if the pooled statistic normalizes | |
    | `per_step` | True if the result of `population` depends on the step index | |
    | `shape` | trailing axes of the means of one step; `(D,)` by default | |
    """

    eps: float | tuple[float, ...]
    gain: Tensor | None
    shift: Tensor | None
    measured: bool
    per_step: bool
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_declared("BatchMoments", self.eps, self.shape, None)

    def check(self, features: int) -> None:
        """Raise `ValueError` if the declaration does not fit the number of features."""
        _check_declared("BatchMoments", self.eps, self.shape, features)
        _check_affine(self, features)


def _check_declared(name: str, eps: object, shape: tuple[int, ...], elements: int | None) -> None:
    each = eps if isinstance(eps, tuple) and eps else (eps,)  # an empty tuple is no number
    if False in [isinstance(number, (int, float)) and 0 <= number < math.inf for number in each]:
        expected = "a finite number of at least 0, or a tuple of such numbers"
        raise ValueError(mismatch(f"{name}.eps", repr(eps), expected))
    if elements is not None and elements % len(each):
        raise ValueError(mismatch(f"{name}.eps", f"{len(each)} numbers", f"a tuple whose length divides {elements}"))
    if shape and elements is not None and math.prod(shape) != elements:
        raise ValueError(mismatch(f"{name}.shape", str(list(shape)), f"{elements} elements"))


def each_eps(moments: FeatureMoments | BatchMoments) -> tuple[float, ...]:
    """Return `eps` as a tuple."""
    return moments.eps if isinstance(moments.eps, tuple) else (moments.eps,)


def _check_affine(moments: FeatureMoments | BatchMoments, features: int) -> None:
    for name, tensor in (("gain", moments.gain), ("shift", moments.shift)):
        if tensor is not None and tensor.shape != (features,):
            path = f"{type(moments).__name__}.{name}"
            raise ValueError(mismatch(path, f"shape {list(tensor.shape)}", f"[{features}]"))


def feature_moments(normalizer: Normalizer) -> FeatureMoments | None:
    """Return the declaration of a normalizer, or None if a subclass overrides a declared method."""
    return normalizer.feature_moments() if _declares(normalizer, "feature_moments") else None


def batch_moments(normalizer: Normalizer) -> BatchMoments | None:
    """Return the declaration of a normalizer, or None if a subclass overrides a declared method."""
    return normalizer.batch_moments() if _declares(normalizer, "batch_moments") else None


def _declares(normalizer: Normalizer, declaration: str) -> bool:
    own = normalizer.__dict__
    if "normalize" in own or "measure" in own or "population" in own:  # replaced on this object
        return False
    for base in type(normalizer).__mro__:  # the first class that defines the declaration or a method decides
        attributes = base.__dict__
        if declaration in attributes:
            methods = attributes.get("_defined", {})
            return False not in [attributes.get(name) is method for name, method in methods.items()]
        if "measure" in attributes or "normalize" in attributes or "population" in attributes:
            return False
    return False


class NormSpec(Options, ABC):
    """Options of a normalizer: a frozen model with a `kind` and a method that builds the normalizer."""

    family: ClassVar[str | None] = "normalizer"
    kind: str

    @abstractmethod
    def build(self, features: int) -> Normalizer:
        """Build a normalizer over `features` features; `ValueError` if the options do not support the number."""


def has_hooks(normalizer: nn.Module) -> bool:
    """Return True if the normalizer, or a module inside it, has hooks, or a `forward` that replaces its method.

    The global hooks of torch.nn run for the modules that a normalizer calls.
    """
    modules: Iterable[nn.Module] = (normalizer,)
    if normalizer._modules:  # `modules` takes its time
        modules = tuple(normalizer.modules())
        if _has_global_hooks() and True in map(_calls_modules, modules):
            return True
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        if "forward" in module.__dict__:
            return True
    return False


def _has_global_hooks() -> bool:
    """Return True if torch.nn runs hooks for every call of a module."""
    forward = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(forward or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)


def _calls_modules(module: nn.Module) -> bool:
    return isinstance(module, Normalizer) and bool(module._modules) and module._calls_modules


def has_population(normalizer: Normalizer) -> bool:
    """Return True if the normalizer overrides `population`."""
    return type(normalizer).population is not Normalizer.population


def parameter_of(module: nn.Module, name: str) -> Any:
    """Return `module.name`, faster if it is a plain parameter: it may be parametrized or pruned instead."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def apply_norm(normalizer: Normalizer, x: Tensor, pooled: Any) -> Tensor:
    """Normalize; with hooks, call the module, which runs them."""
    return normalizer(x, pooled) if has_hooks(normalizer) else normalizer.normalize(x, pooled)


def affine(normal: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """Multiply by the gain and add the shift; None is no gain or no shift."""
    scaled = normal if gain is None else normal * gain
    return scaled if shift is None else scaled + shift


def reset_affine(gain: Tensor | None, shift: Tensor | None, start: float = 1.0) -> None:
    """Set the gain to `start` and the shift to 0."""
    if gain is not None:
        nn.init.constant_(gain, start)
    if shift is not None:
        nn.init.zeros_(shift)


def checked_features(features: int) -> int:
    """Return `features` as an `int`; `TypeError` or `ValueError` if it is no positive integer."""
    return checked_count("features", features)


def checked_eps(eps: float) -> float:
    """Return `eps`; `ValueError` if it is negative or not finite."""
    if not 0 <= eps < float("inf"):
        raise ValueError(mismatch("eps", str(eps), "a finite number of at least 0"))
    return eps


@contextmanager
def scanning(normalizers: Sequence[Normalizer]) -> Iterator[None]:
    """Scan several normalizers: apply their records together at the end, or none of them after an error."""
    if not normalizers:
        yield
        return
    with normalizers[0].scanning(), scanning(normalizers[1:]):
        yield
