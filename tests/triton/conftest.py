"""Run the kernels on a GPU, or in the interpreter during the tests of this folder."""

import pytest

from atn_norms.backends.triton.available import unavailable
from tests.triton.strategies import DEVICE


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Import and return the module that calls the kernels; None without Triton."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if unavailable() is not None:
        return None
    from atn_norms.backends.triton import call  # kernels that cannot be imported must fail, not skip

    return call


@pytest.fixture(params=["whole", "step by step"])
def mode(request, monkeypatch, kernels):
    """Select one program for all steps, or one launch for each step, as for large hidden sizes."""
    if request.param != "whole":
        monkeypatch.setattr(kernels, "WHOLE", 0)
    return request.param
