"""Random normalizers in random layers: the kernels and the reference agree on values, states and every gradient."""

from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import atn_norms as an
from tests.laws.strategies import level
from tests.native.strategies import CELLS, EXACT, Pair, agree, needs_kernels, outcome
from tests.traced.random_norms import RandomSpec

pytestmark = needs_kernels

WINDOWS = st.sampled_from([1, 2, 3, 7, "cumulative", {"kind": "exponential", "half_life": 1.5}])
PARTS, NORMS_EACH, CASES_EACH = (
    20,
    125,
    8,
)  # parts of the campaign, random normalizers of a part, layers of a normalizer


@st.composite
def pairs(draw: Any, norm: int, cell: str) -> Pair:
    """Draw a small layer of any structure with a random normalizer."""
    both, layers = draw(st.sampled_from([(False, 1)] * 6 + [(True, 1), (False, 2)]))
    options = {
        "norm": RandomSpec(seed=norm),
        "window": draw(WINDOWS),
        "num_layers": layers,
        "bidirectional": both,
    }
    return Pair(
        cell,
        hidden=HIDDEN,
        batch=draw(st.integers(1, 4)),
        steps=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**16)),
        per_gate=draw(st.booleans()),
        ragged=draw(st.booleans()),
        before=None if both else draw(st.sampled_from([None, 2])),
        options=options,
    )


HIDDEN = 4
counted: dict[str, int] = {"cases": 0, "native": 0}


def compare_backends(pair: Pair) -> None:
    """Compare and count one case."""
    native = pair.layer("auto")
    counted["cases"] += 1
    counted["native"] += "backend 'native'" in an.explain(native)
    inputs = pair.xs(), pair.state(), pair.lengths()
    expected = outcome(pair.layer("reference"), *inputs)
    # roundings grow with the gradients from step to step
    agree(outcome(native, *inputs), expected, EXACT * level(*expected.gradients))


cells = st.sampled_from(["lstm", "gru", "tanh"])


@given(st.integers(0, 2**20), cells, st.data())
@settings(max_examples=40)
def test_a_few_random_normalizers(norm, cell, data):
    compare_backends(data.draw(pairs(norm, cell)))


@pytest.mark.deep
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("part", range(PARTS))
def test_many_random_normalizers(part, record_property):
    """20,000 cases in 20 parts, all of them native; each part reports its count."""
    counted.update(cases=0, native=0)

    @seed(part)
    @given(st.integers(0, 2**30), cells, st.data())
    @settings(max_examples=NORMS_EACH, database=None, deadline=None, derandomize=False)
    def search(norm: int, cell: str, data: Any) -> None:
        for _ in range(CASES_EACH):
            compare_backends(data.draw(pairs(norm, cell)))

    search()
    record_property("cases", counted["cases"])
    print(f"{counted['cases']} cases, {counted['native']} of them native")
    assert counted["cases"] >= NORMS_EACH * CASES_EACH
    assert counted["native"] == counted["cases"]


def test_random_normalizers_are_native():
    """The campaign compares the kernels, not the reference with itself."""
    assert CELLS
    norms = [an.RNN(2, HIDDEN, norm=RandomSpec(seed=seed), dtype=torch.float64) for seed in range(60)]
    assert [reason for reason in map(an.explain, norms) if "backend 'native'" not in reason] == []


def test_a_second_mean_that_reads_a_parameter():
    """The kernels once mistook the first mean, whose output may lie over the parameters, for the parameter."""
    options = {"norm": RandomSpec(seed=90214), "window": 2}
    compare_backends(Pair("gru", hidden=HIDDEN, batch=3, steps=4, seed=2742, options=options))
