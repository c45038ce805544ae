"""Conformance tests of the digits task, and tests of its data, splits and training."""

import atn_norms as an
import pytest
import torch
from atn_norms.registry import registry
from atn_norms.tasks import Model
from atn_norms.testing import parametrize_checks

from atn_norms_digits import DigitsSpec


@parametrize_checks([DigitsSpec(), DigitsSpec(steps=64)])
def test_laws(check):
    check()


def test_it_is_installed_under_its_kind():
    assert registry.lookup("task", "digits") is DigitsSpec


def test_every_image_is_in_one_split_and_the_splits_do_not_depend_on_the_seed():
    one, two = (DigitsSpec().build(seed=seed).parts for seed in (0, 1))
    assert {name: len(labels) for name, (_, labels) in one.items()} == {"train": 1257, "validation": 180, "test": 360}
    for name in one:
        assert torch.equal(one[name][0], two[name][0])
    images = torch.cat([images for images, _ in one.values()])
    assert len(images.unique(dim=0)) == len(images) == 1797
    assert (images.min(), images.max()) == (0, 1)


def test_rows_and_pixels_are_the_same_images_in_reading_order():
    rows, pixels = (DigitsSpec(steps=steps).build(seed=0).batch(3, 4) for steps in (8, 64))
    assert rows.inputs.shape == (8, 4, 8)
    assert torch.equal(rows.targets, pixels.targets)
    assert torch.equal(rows.inputs.transpose(0, 1).flatten(1), pixels.inputs.transpose(0, 1).flatten(1))


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    task = DigitsSpec().build(seed=5)
    per_epoch = 1257 // 100
    first, second = (
        torch.cat([task.batch(epoch * per_epoch + i, 100).inputs for i in range(per_epoch)], 1) for epoch in (0, 1)
    )
    assert len(first.transpose(0, 1).flatten(1).unique(dim=0)) == 1200
    assert not torch.equal(first, second)


def test_the_most_frequent_digit_has_the_score_of_the_baseline():
    task = DigitsSpec().build(seed=0)
    readout = task.readout(4)
    assert isinstance(readout, torch.nn.Linear)
    model = Model(task.encoder(), an.GRU(8, 4), readout)
    with torch.no_grad():
        readout.weight.zero_()
        readout.bias.zero_()
        readout.bias[task.parts["train"][1].bincount().argmax()] = 1
        scores = task.evaluate(model, "test")
    assert scores["accuracy"] == task.baselines["most frequent digit"]


def test_a_layer_learns_it():
    """A hundred training steps raise the accuracy from 0.1 to over 0.8."""
    torch.manual_seed(0)
    task = DigitsSpec().build(seed=0)
    model = Model(task.encoder(), an.GRU(8, 32, norm="layer", window=4), task.readout(32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(100):
        loss, _ = task.loss(model, task.batch(step, 32), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model.eval(), "test")["accuracy"] > 0.8


def test_a_batch_larger_than_the_training_split_is_rejected():
    with pytest.raises(ValueError, match=r"train.batch_size: got 1258; expected 1 to 1257, the training sequences"):
        DigitsSpec().build(seed=0).batch(0, 1258)
