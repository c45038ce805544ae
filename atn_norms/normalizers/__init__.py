"""Normalizers: statistics of a step, and normalization with pooled statistics."""

from atn_norms.normalizers.base import (
    BatchMoments,
    FeatureMoments,
    Normalizer,
    NormSpec,
    batch_moments,
    feature_moments,
    scanning,
)
from atn_norms.normalizers.batch import BatchNorm, BatchNormSpec
from atn_norms.normalizers.features import LayerNorm, LayerNormSpec, RMSNorm, RMSNormSpec
from atn_norms.normalizers.per_gate import PerGate

__all__ = [
    "BatchMoments",
    "BatchNorm",
    "BatchNormSpec",
    "FeatureMoments",
    "LayerNorm",
    "LayerNormSpec",
    "NormSpec",
    "Normalizer",
    "PerGate",
    "RMSNorm",
    "RMSNormSpec",
    "batch_moments",
    "feature_moments",
    "scanning",
]
