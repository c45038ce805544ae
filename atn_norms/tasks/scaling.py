"""Standardize columns with missing values: exclude them from moments, replace them by zeros and mask columns."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation of each column of `values` [N, C] without its missing values (NaN).

    A column that is constant has the deviation 1.

    >>> moments(torch.tensor([[1.0, 5.0], [3.0, 5.0], [float("nan"), 5.0]]))
    (tensor([2., 5.]), tensor([1., 1.]))
    """
    mean = values.nanmean(0)
    deviation = (values - mean).square().nanmean(0).sqrt()
    constant = values.nan_to_num(-torch.inf).amax(0) == values.nan_to_num(torch.inf).amin(0)
    return mean, deviation.where(~constant, 1.0)


def masked(scaled: Tensor, columns: Tensor) -> Tensor:
    """Return `scaled` [N, C] with 0 for a missing value (NaN), and a mask column for each of the flagged `columns` [C].

    A mask is 1 where the value is missing. The result has torch's default type.

    >>> masked(torch.tensor([[0.5, float("nan")], [1.5, 2.0]]), torch.tensor([False, True]))
    tensor([[0.5000, 0.0000, 1.0000],
            [1.5000, 2.0000, 0.0000]])
    """
    return torch.cat((scaled.nan_to_num(0.0), scaled.isnan()[:, columns]), 1).to(torch.get_default_dtype())
