"""Wrong normalizers."""

from typing import Any

import torch
from torch import Tensor, nn

import atn_norms as an
from atn_norms.normalizers import FeatureMoments
from tests.testing.gallery.entry import wrong


class Layer(an.Normalizer):
    """Correct: layer normalization without declarations."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def measure(self, x: Tensor) -> Any:
        return an.Moments.of(x)

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return (x - pooled.mean) * torch.rsqrt(pooled.var + 1e-5) * self.weight


@wrong("the_pooled_statistic_is_used")
class IgnoresTheWindow(Layer):
    """Measures x again instead of using the pooled statistic, so every window is a window of 1."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, self.measure(x))


@wrong("calls_are_pure")
class RemembersOnItself(Layer):
    """Stores past statistics in a list on the module, which leaks into the next sequence."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.past: list[Tensor] = []

    def measure(self, x: Tensor) -> Any:
        moments = an.Moments.of(x)
        self.past.append(moments.mean.detach().mean())
        return an.Moments(moments.mean + 0.1 * torch.stack(self.past).mean(), moments.var)


@wrong("calls_are_pure")
class DrawsNoise(Layer):
    """Adds noise to the output, for regularization."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, pooled) + 0.01 * torch.randn(x.shape, dtype=x.dtype)


@wrong("calls_are_pure")
class RecordsInEvaluation(Layer):
    """Counts its calls in a buffer, in evaluation too, so a checkpoint depends on the number of evaluations."""

    calls: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("calls", torch.zeros(()))

    def measure(self, x: Tensor) -> Any:
        self.calls += 1
        return super().measure(x)


@wrong("inputs_are_not_modified")
class CentresInPlace(Layer):
    """Subtracts the mean in place, to save memory."""

    def measure(self, x: Tensor) -> Any:
        moments = an.Moments.of(x)
        with torch.no_grad():
            x -= x.mean(-1, keepdim=True)
        return moments


@wrong("gradients_are_derivatives")
class DetachesTheStatistic(Layer):
    """Treats the statistic as a constant."""

    def measure(self, x: Tensor) -> Any:
        return an.Moments.of(x.detach())


@wrong("gradients_are_derivatives")
class DetachesTheVariance(Layer):
    """Passes the gradient through the mean alone."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, an.Moments(pooled.mean, pooled.var.detach()))


@wrong("shapes_are_kept")
class SqueezesABatchOfOne(Layer):
    """Squeezes every axis of length 1, including a batch of one row."""

    def measure(self, x: Tensor) -> Any:
        mean, var = an.Moments.of(x)
        return an.Moments(mean.squeeze().unsqueeze(-1), var.squeeze().unsqueeze(-1))


@wrong("shapes_are_kept")
class KnowsNoTime(Layer):
    """Flattens all axes after the first: right for one step, wrong for a whole sequence."""

    def measure(self, x: Tensor) -> Any:
        moments = an.Moments.of(x)
        return an.Moments(moments.mean, moments.var.flatten(1))


@wrong("the_dtype_is_kept")
class ReturnsFloat32(Layer):
    """Returns float32 for input of any type."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, pooled).float()


@wrong("the_dtype_is_kept")
class ComputesInFloat32(Layer):
    """Computes in float32 and casts back: the type is right, and half of the digits are lost."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x.float(), an.Moments(*(leaf.float() for leaf in pooled))).to(x.dtype)


@wrong("the_dtype_is_kept")
class SaturatesInFloat32(Layer):
    """Limits the result of a centred row in float32, after differences in float64."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        normal = ((x - pooled.mean) * torch.rsqrt(pooled.var + 1e-5)).float()
        return normal.clamp(-1, 1).to(x.dtype)


@wrong("float32_keeps_its_digits")
class MeasuresInFloat32(Layer):
    """Measures in the type of the input: in float32, at a mean of 1e4, centring loses most digits."""

    def measure(self, x: Tensor) -> Any:
        return an.Moments(x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0))


@wrong("float32_keeps_its_digits")
class RoundsBeforeItMerges(Layer):
    """Computes in float32 and widens the result, which restores no digit."""

    def measure(self, x: Tensor) -> Any:
        x = x.float() if x.dtype == torch.float32 else x
        mean, var = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
        return an.Moments(mean.double(), (var - mean.square()).clamp(min=0).double())


@wrong("float32_keeps_its_digits")
class SquaresInFloat32(Layer):
    """Squares in float32 and averages in float64: squares that overflowed stay infinite."""

    def measure(self, x: Tensor) -> Any:
        return an.Average.of(x.square())

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return x * torch.rsqrt(pooled.mean + 1e-5) * self.weight


@wrong("rows_are_independent_unless_declared")
class MixesRows(Layer):
    """Centres by the mean of the batch without a declaration."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, pooled) - x.mean(-2, keepdim=True)


@wrong("rows_are_independent_unless_declared")
class PeeksAhead(Layer):
    """Normalizes by the mean of the whole sequence, the future included."""

    def measure(self, x: Tensor) -> Any:
        mean, var = an.Moments.of(x)
        level = mean.mean(0, keepdim=True).expand_as(mean) if x.ndim > 2 else mean
        return an.Moments(level, var)


@wrong("rows_are_independent_unless_declared")
class DeclaresACoupling(Layer):
    """Declares batch statistics and normalizes every row separately."""

    uses_batch_statistics = True

    def measure(self, x: Tensor) -> Any:
        return an.Moments(x.double(), torch.zeros_like(x, dtype=torch.float64))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, an.Moments.of(x))


@wrong("rows_are_independent_unless_declared")
class CouplesInEvaluation(an.Normalizer):
    """Batch normalization with a population variance in evaluation, but the mean of the current batch."""

    uses_batch_statistics = True
    train_eval_differ = True

    def __init__(self, features: int) -> None:
        super().__init__()

    def measure(self, x: Tensor) -> Any:
        return an.Moments(x.double(), torch.zeros_like(x, dtype=torch.float64))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        var = pooled.var if self.training else torch.ones_like(pooled.var)
        return (x - pooled.mean) * torch.rsqrt(var + 1e-5)


@wrong("evaluation_equals_training_unless_declared")
class DiffersWithoutDeclaration(Layer):
    """Computes another result in evaluation without a declaration."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, pooled) * (1.0 if self.training else 0.9)


@wrong("evaluation_equals_training_unless_declared")
class DeclaresADifference(Layer):
    """Declares that evaluation differs, although it does not."""

    train_eval_differ = True


@wrong("scale_invariance_holds")
class ForgetsTheRoot(Layer):
    """Divides by the variance and declares scale invariance."""

    scale_invariant = True

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return (x - pooled.mean) / (pooled.var + 1e-5) * self.weight


@wrong("shift_invariance_holds")
class SubtractsSquares(Layer):
    """Computes the variance as the mean square minus the squared mean: right in theory."""

    shift_invariant = True

    def measure(self, x: Tensor) -> Any:
        x = x.double()
        mean = x.mean(-1, keepdim=True)
        return an.Moments(mean, (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0))


@wrong("shift_invariance_holds")
class DeclaresAShift(Layer):
    """Divides by the root mean square and declares shift invariance."""

    shift_invariant = True

    def measure(self, x: Tensor) -> Any:
        return an.Average.of(x.double().square())

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return x * torch.rsqrt(pooled.mean + 1e-5) * self.weight


@wrong("feature_order_does_not_matter")
class DeclaresNoOrder(Layer):
    """Weights the features by position, and declares that their order does not matter."""

    permutation_equivariant = True

    def measure(self, x: Tensor) -> Any:
        weights = torch.linspace(1, 2, x.shape[-1], dtype=torch.float64)
        return an.Moments.of(x * weights)


@wrong("flat_rows_stay_finite")
class PutsEpsOutside(Layer):
    """Adds eps outside the root: the output is finite, and the gradient of a constant row is not."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return (x - pooled.mean) / (pooled.var.sqrt() + 1e-5) * self.weight


@wrong("flat_rows_stay_finite")
class HasNoEps(Layer):
    """Divides by the standard deviation without eps."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return (x - pooled.mean) * torch.rsqrt(pooled.var) * self.weight


@wrong("a_state_dict_restores_it")
class RecordsOutsideTheStateDict(Layer):
    """Stores a running mean in a plain attribute, which no checkpoint contains."""

    train_eval_differ = True

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.level = torch.zeros((), dtype=torch.float64)

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        y = super().normalize(x, pooled)
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().double().mean()
            return y
        return y + 0.5 + self.level


@wrong("declared_feature_moments_hold")
class DeclaresABiasedVariance(Layer):
    """Measures the unbiased variance and declares the moments of the kernels."""

    def measure(self, x: Tensor) -> Any:
        moments = an.Moments.of(x)
        return an.Moments(moments.mean, moments.var * x.shape[-1] / max(1, x.shape[-1] - 1))

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(1, True, 1e-5, self.weight, None)


@wrong("declared_feature_moments_hold")
class DeclaresAnotherEps(Layer):
    """Declares a different eps from the one it uses."""

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(1, True, 1e-3, self.weight, None)
