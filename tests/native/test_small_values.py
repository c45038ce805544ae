"""Small values keep their digits in float32: norms divide by the scale of tanh, so an absolute error grows."""

from typing import Any

import pytest
import torch

import atn_norms as an


@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_small_inputs_keep_their_digits(cell, norm, size):
    torch.manual_seed(0)
    layer: Any = getattr(an, cell)(3, 16, norm=norm, bias=False, backend="native")
    reference = an.with_backend(layer, "reference")
    exact = an.with_backend(layer, "reference").double()
    x = size * torch.randn(8, 4, 3)
    expected = exact(x.double())[0]
    errors = [(each(x)[0] - expected).abs().max().item() for each in (layer, reference)]
    assert errors[0] <= max(8 * errors[1], 1e-6), errors
