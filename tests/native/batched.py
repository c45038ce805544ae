"""Pairs of one layer with batch statistics, in training and in evaluation."""

import itertools
from typing import Any

import torch

from tests.compare import compare
from tests.native.strategies import CELLS, EXACT, RMS_SHIFTED, Pair, agree, outcome
from tests.traced.gallery import GallerySpec

BATCH = {"kind": "batch", "momentum": 0.3}
PER_STEP = {"kind": "batch", "max_steps": 4, "momentum": None}
NORMS: dict[str, Any] = {
    "batch": BATCH,
    "per step": PER_STEP,
    "ih": {"sites": {"ih": BATCH}},
    "hh": {"sites": {"hh": PER_STEP}},
    "c": {"sites": {"c": BATCH}},
    "eps": {"sites": {"ih": PER_STEP, "hh": {"kind": "batch", "eps": 1e-2}}},
    "batch, layer": {"sites": {"ih": BATCH, "hh": "layer"}},
    "rms, per step": {"sites": {"ih": RMS_SHIFTED, "hh": PER_STEP}},
    "traced, batch": {"sites": {"ih": GallerySpec(name="TwoSided"), "hh": BATCH}},
    "batch, layer, batch": {"sites": {"ih": BATCH, "hh": "layer", "c": PER_STEP}},
    "none, batch, layer": {"sites": {"hh": BATCH, "c": "layer"}},
}
MIXED = [name for name in NORMS if ", " in name]  # batch statistics at some sites, and statistics of rows at others


def fits(cell: str, norm: str) -> bool:
    """Return whether a cell has the sites of a norm."""
    return cell == "lstm" or "c" not in NORMS[norm].get("sites", {})


STRUCTURES = [
    case
    for case in itertools.product(CELLS, NORMS, ["1", "4", "cumulative", "exponential"], [True, False])
    if fits(*case[:2])
]
SIZES = [(1, 2), (3, 5), (17, 33), (32, 3), (33, 2), (60, 5), (65, 7), (97, 4)]  # hidden, batch: blocks are of 32 units


def a_pair(cell="lstm", norm="batch", window="4", hidden=3, batch=5, steps=5, inputs=2, seed=0, **fields) -> Pair:
    options = {"norm": NORMS[norm]} | fields.pop("options", {})
    return Pair(cell, "layer", window, hidden, batch, steps, inputs, seed, options=options, **fields)


def made(pair, backend, training=True, dtype=None):
    """Return the layer; in evaluation, its populations differ from those of any batch."""
    layer = pair.layer(backend, dtype)
    if training:
        return layer
    source = torch.Generator().manual_seed(pair.seed)
    for name, buffer in layer.named_buffers():
        if name.endswith("tracked"):
            buffer.fill_(3)
        else:
            numbers = torch.rand(buffer.shape, generator=source, dtype=torch.float64)
            buffer.copy_(numbers + (0.5 if name.endswith("var") else -0.5))
    return layer.eval()


def both(pair, training=True):
    """Return the results of a backend and its updated populations."""
    results = []
    for backend in ("native", "reference"):
        layer = made(pair, backend, training)
        found = outcome(layer, pair.xs(), pair.state(), pair.lengths())
        results.append((found, list(layer.buffers())))
    return results


def check(pair, training=True, tolerance=EXACT):
    (found, populations), (expected, others) = both(pair, training)
    agree(found, expected, tolerance)
    compare(populations, others, tolerance=1e-11, what="population")
