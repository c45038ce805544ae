"""A window longer than the sequence has the cost of the sequence, and the state of the reference."""

import pytest
import torch

import atn_norms as an
from atn_norms.backends import choose
from atn_norms.backends.fused.fused_backend import FusedProgram, shortened
from tests.native.strategies import Pair, check, needs_kernels
from tests.traced.gallery import GallerySpec

pytestmark = needs_kernels

NORMS = {"layer": "layer", "two-sided": GallerySpec(name="TwoSided")}


@pytest.mark.parametrize("window", [5, 6, 7, 8, 40])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ragged", [False, True])
def test_values_states_and_gradients_equal_the_reference(norm, window, ragged):
    check(Pair("lstm", steps=6, batch=3, ragged=ragged, options={"norm": NORMS[norm], "window": window}))


def test_a_plan_is_no_longer_than_its_sequence():
    layer = an.LSTM(2, 3, norm="layer", window=1_000_000)
    program = choose("native", layer.cell, layer.cell_weights("_l0"))
    assert isinstance(program, FusedProgram)
    plan = program.plan
    assert [site.steps for site in shortened(plan, 2).sites] == [3, 3, 3]
    assert shortened(plan, 2_000_000) is plan


def test_a_stream_continues_from_a_shortened_window():
    layer = an.GRU(2, 3, norm="rms", window=9, dtype=torch.float64)
    xs = torch.randn(12, 2, 2, dtype=torch.float64)
    whole, _ = layer.unroll(xs)
    first, state = layer.unroll(xs[:4])
    second, _ = layer.unroll(xs[4:], state)
    assert torch.allclose(torch.cat([first, second]), whole, atol=1e-12)


def test_forward_builds_no_state_of_windows(monkeypatch):
    """A window of a million steps in eight rows would need 64 MB for each tensor of a state."""
    layer = an.LSTM(2, 3, norm="layer", window=1_000_000)
    largest = [0]
    original = torch.Tensor.new_zeros

    def counted(self, *size, **options):
        made = original(self, *size, **options)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_zeros", counted)
    y, _ = layer(torch.randn(2, 8, 2))
    y.sum().backward()
    assert y.isfinite().all()
    assert max(largest) < 1000
