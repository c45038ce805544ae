"""Data parallel training in two processes gives the gradients and populations of one process on the whole batch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import atn_norms as an
from tests.compare import compare
from tests.torch_api.features import feature
from tests.torch_api.processes import CASES, WORLD, Unrolled, batch, layer_of, loss_of, outcome

GROUP = "Training on several devices"

pytestmark = pytest.mark.deep  # two processes import torch


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.torch_api.processes"]
    here = Path(__file__).parents[2]
    children = [subprocess.Popen([*command, str(rank), str(folder)], cwd=here) for rank in range(WORLD)]
    assert [child.wait(timeout=120) for child in children] == [0] * WORLD
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@feature(GROUP, 'DDP with `norm={"kind": "batch", "sync": True}`', "reference", "Every process runs as many steps.")
@pytest.mark.parametrize("name", CASES)
def test_synchronized_batch_norm_is_one_process_on_the_whole_batch(name, results):
    model = Unrolled(layer_of(name))
    x, lengths = batch()
    for _ in range(2):
        model.zero_grad()
        loss_of(model, x, lengths).backward()
    expected = outcome(model)
    for rank in range(WORLD):
        compare(results[rank]["ddp"][name], expected, tolerance=1e-12)


@feature(GROUP, "FSDP2 (`fully_shard`) by layer", "native")
def test_a_sharded_layer_has_the_gradients_of_one_process(results):
    compare_with_one_process(results, "by layer")


@feature(GROUP, "FSDP2 (`fully_shard`) of each `norm_*` too", "reference", "Sharding a norm registers hooks on it.")
def test_sharded_norms_have_the_gradients_of_one_process(results):
    compare_with_one_process(results, "norms too")


def compare_with_one_process(results: list[dict[str, Any]], name: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(an.LSTM(3, 4, norm="layer", window=2, dtype=torch.float64))
    model(batch()[0])[0].square().sum(0).mean().backward()
    for rank in range(WORLD):
        found = results[rank]["fsdp"][name]
        compare(found, {n: p.grad for n, p in model.named_parameters()}, tolerance=1e-12)
