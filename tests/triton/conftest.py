"""Where the kernels run: on a GPU, or in the interpreter while a test of this folder runs."""

import pytest

from atn_norms.backends.triton.available import unavailable
from tests.triton.strategies import DEVICE


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The module that calls the kernels, imported where they can run; None without Triton."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if unavailable() is not None:
        return None
    from atn_norms.backends.triton import call  # kernels that do not import must fail, not skip

    return call


@pytest.fixture(params=["whole", "step by step"])
def mode(request, monkeypatch, kernels):
    """One program through all steps, or a launch a step as for large hidden sizes."""
    if request.param != "whole":
        monkeypatch.setattr(kernels, "WHOLE", 0)
    return request.param
