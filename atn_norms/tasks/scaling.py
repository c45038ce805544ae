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


def extreme(values: Tensor, mean: Tensor, deviation: Tensor) -> tuple[float, int, int] | None:
    """Return the size, row and column of the largest of `values` [N, C] that torch's default type cannot standardize.

    Return None if each standardized value is finite in this type, or missing (NaN).

    >>> values = torch.tensor([[0.0], [1e60], [1e50]], dtype=torch.float64)
    >>> extreme(values, torch.tensor([0.0]), torch.tensor([0.5]))
    (1e+60, 1, 0)
    """
    scaled = (values - mean) / deviation.where(deviation.isfinite(), 0.0)
    wrong = ~scaled.to(torch.get_default_dtype()).isfinite() & ~values.isnan()
    if not wrong.any():
        return None
    row, column = divmod(int(values.abs().where(wrong, -1.0).argmax()), values.shape[1])
    return values[row, column].abs().item(), row, column


def limits(mean: Tensor, deviation: Tensor) -> str:
    """Return what is expected of a value that `extreme` found, from the mean and the deviation of its column."""
    name = str(torch.get_default_dtype()).removeprefix("torch.")
    return f"a value that {name} holds after standardization (mean {mean.item():g}, deviation {deviation.item():g})"


def masked(scaled: Tensor, columns: Tensor) -> Tensor:
    """Return `scaled` [N, C] with 0 for a missing value (NaN), and a mask column for each of the flagged `columns` [C].

    A mask is 1 where the value is missing. The result has torch's default type.

    >>> masked(torch.tensor([[0.5, float("nan")], [1.5, 2.0]]), torch.tensor([False, True]))
    tensor([[0.5000, 0.0000, 1.0000],
            [1.5000, 2.0000, 0.0000]])
    """
    return torch.cat((scaled.nan_to_num(0.0), scaled.isnan()[:, columns]), 1).to(torch.get_default_dtype())
