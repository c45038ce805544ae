"""Copying and denoising: layout of sequences, the baseline without memory, and scores."""

import math

import pytest
import torch
from torch import nn

from atn_norms import LSTM
from atn_norms.errors import SpecError
from atn_norms.tasks import CopyingSpec, DenoiseSpec, Model, recall
from tests.compare import compare

SPECS = [CopyingSpec(), DenoiseSpec(), CopyingSpec(recall=1, length=1, alphabet=2), DenoiseSpec(recall=4, length=1)]


class Fixed(Model):
    """Model with fixed predictions."""

    def __init__(self, predictions):
        super().__init__(nn.Identity(), None, nn.Identity())
        self.predictions = predictions

    def forward(self, inputs, state=None):
        return self.predictions.unsqueeze(1).expand(-1, inputs.shape[1], -1), None


def forgetful(task):
    """Return a model without memory: it predicts blanks with certainty, then all symbols equally."""
    spec = task.spec
    predictions = torch.full((task.layout.length, spec.alphabet + 1), -1e4)
    predictions[: -spec.recall, 0] = 0
    predictions[-spec.recall :, 1:] = 0
    return Fixed(predictions)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_symbols_are_shown_once_and_recalled_in_order(spec):
    task = spec.build(seed=2)
    inputs, targets, fresh, _ = task.batch(5, 300)
    length, marker = task.layout.length, spec.alphabet + 1
    assert inputs.shape == targets.shape == (length, 300) and fresh
    shown = (inputs > 0) & (inputs < marker)
    assert (shown.sum(0) == spec.recall).all(), "`recall` symbols in every sequence"
    assert (inputs[task.layout.reading] == marker).all() and ((inputs == marker).sum(0) == 1).all()
    assert not shown[task.layout.reading :].any() and (targets[: -spec.recall] == 0).all()
    for row in range(300):
        assert inputs[:, row][shown[:, row]].tolist() == targets[-spec.recall :, row].tolist()
    symbols = targets[-spec.recall :]
    assert set(symbols.unique().tolist()) <= set(range(1, marker))
    if spec.alphabet < 20 and spec.recall > 1:
        assert len(symbols.unique()) == spec.alphabet, "every symbol occurs"


def test_the_sequences_have_the_sizes_of_the_paper():
    copying, denoise = CopyingSpec().build(0), DenoiseSpec().build(0)
    assert copying.layout == (110, 120) and denoise.layout == (109, 120)
    assert copying.input_size == 10 and denoise.input_size == 11
    assert (copying.batch(0, 3).inputs[:10] > 0).all(), "copying shows its symbols at once"
    assert CopyingSpec.recommended["optimizer"] == {"kind": "rmsprop", "lr": 2e-4, "momentum": 0.9}
    assert CopyingSpec.recommended["steps"] == 4000 and copying.batch_size == denoise.batch_size == 128


def test_scattered_symbols_are_at_different_random_steps():
    task = DenoiseSpec(recall=3, length=4).build(seed=0)
    places = task.places(20_000, torch.Generator().manual_seed(0))
    assert (places.diff(dim=1) > 0).all(), "in rising order, so at different steps"
    counts = torch.bincount(places.flatten(), minlength=6).double() / 20_000
    assert (counts - 3 / 6).abs().max() < 4 * math.sqrt(0.25 / 20_000), "all steps are equally likely"


@pytest.mark.parametrize(
    ("spec", "cost"),
    [
        (CopyingSpec(test=1000), 10 * math.log(8) / 120),
        (DenoiseSpec(test=1000), 10 * math.log(9) / 120),
        (DenoiseSpec(recall=2, length=3, alphabet=4, test=1000), 2 * math.log(4) / 7),
    ],
    ids=["copying", "denoise", "small"],
)
def test_a_model_without_memory_has_the_score_of_the_baseline(spec, cost):
    task = spec.build(seed=0)
    scores = task.evaluate(forgetful(task), "test")
    assert task.baselines == {"no memory": pytest.approx(cost, rel=1e-12)}
    assert scores["cross-entropy"] == pytest.approx(cost, rel=1e-5)
    guessed = 1 - 1 / spec.alphabet
    assert scores["symbols wrong"] == pytest.approx(guessed, abs=4 * math.sqrt(guessed / (1000 * spec.recall)))


def test_a_model_with_perfect_memory_has_loss_zero():
    task = CopyingSpec(recall=2, length=3, test=50).build(seed=0)

    class Perfect(Fixed):
        def forward(self, inputs, state=None):
            predictions = torch.zeros(7, inputs.shape[1], 9)
            predictions[:5, :, 0] = 99.0
            predictions[5:].scatter_(2, inputs[:2].unsqueeze(-1), 99.0)
            return predictions, None

    assert task.evaluate(Perfect(torch.zeros(7, 9)), "test") == {"cross-entropy": 0.0, "symbols wrong": 0.0}


def test_the_loss_is_the_metric():
    task = CopyingSpec(recall=3, length=5, validation=40).build(seed=0)
    model = Model(task.encoder(), LSTM(task.input_size, 6, norm="layer", window=3), task.readout(6)).eval()
    loss, carried = task.loss(model, task._draw(40, "validation", 0), None)
    assert carried is None
    assert task.evaluate(model, "validation")["cross-entropy"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_split_is_scored_completely_in_chunks_of_any_size(monkeypatch):
    task = CopyingSpec(recall=3, length=5, validation=7).build(seed=0)
    drawn = []
    draw = task._draw
    monkeypatch.setattr(task, "_draw", lambda count, *purpose: drawn.append((count, purpose)) or draw(count, *purpose))
    monkeypatch.setattr(recall, "EVALUATION_ROWS", 3)
    task.evaluate(forgetful(task), "validation")
    assert [count for count, _ in drawn] == [3, 3, 1]
    assert len({purpose for _, purpose in drawn}) == 3, "other sequences each time"


@pytest.mark.parametrize("spec", [CopyingSpec(length=5), DenoiseSpec(length=5)], ids=["copying", "denoise"])
def test_data_depend_only_on_seed_split_and_step(spec):
    task = spec.build(1)
    torch.rand(3)
    compare(task.batch(4, 9), spec.build(1).batch(4, 9), tolerance=0)
    others = [task.batch(5, 9), spec.build(2).batch(4, 9), task._draw(9, "test", 4)]
    assert not any(torch.equal(task.batch(4, 9).inputs, other.inputs) for other in others)


def test_inputs_are_unit_vectors_in_the_dtype_of_the_model():
    encoder = recall.OneHot(4).double()
    compare(encoder(torch.tensor([[2, 0]])), torch.eye(4, dtype=torch.float64)[[2, 0]].unsqueeze(0), tolerance=0)
    assert encoder.state_dict() == {}


def test_a_batch_that_is_too_large_is_rejected_before_it_is_drawn():
    with pytest.raises(SpecError, match="got 100000000 sequences of 120 steps; expected at most 2236962"):
        CopyingSpec().build(0).batch(0, 10**8)
