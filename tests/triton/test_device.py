"""The device check with the Triton backend, in the interpreter without a GPU."""

from atn_norms.bench.device import TINY, Plan, run
from tests.triton.strategies import DEVICE, needs_triton


@needs_triton
def test_the_device_check_runs_end_to_end(tmp_path):
    plan = Plan(DEVICE, **{**TINY, "cells": ("lstm",), "windows": (2,)})
    results = run(plan, tmp_path)
    assert [finding.note for finding in results.failed] == []
    assert {finding.runner for finding in results.findings} >= {"torch.nn", "triton", "reference"}
    assert {finding.status for finding in results.findings} == {"passed", "measured"}
