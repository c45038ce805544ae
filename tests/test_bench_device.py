"""The device check: a complete run on the CPU at tiny sizes, detected failures, and complete files."""

import csv
from dataclasses import fields

import pytest
import torch

from atn_norms.backends.fused.fused_backend import FusedProgram
from atn_norms.backends.native.library import unavailable
from atn_norms.bench import device
from atn_norms.bench.device import TINY, Finding, Plan, run
from atn_norms.cli import main
from atn_norms.errors import SpecError

TRY = Plan("cpu", **{**TINY, "cells": ("lstm", "gru"), "norms": ("layer",), "windows": (2, "cumulative")})
needs_kernels = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def lines(folder):
    with open(folder / "device.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@needs_kernels
def test_every_stage_is_run_and_written(tmp_path):
    results = run(TRY, tmp_path)
    assert [finding.status for finding in results.failed] == []
    stages = [finding.stage for finding in results.findings]
    assert stages == sorted(stages, key=["check", "repeat", "time"].index)
    rows = lines(tmp_path)
    assert len(rows) == len(results.findings) == 2 * 2 * 2 + 2 * 2 + 2 * 2 + 1
    assert list(rows[0]) == [field.name for field in fields(Finding)]
    timed = [row for row in rows if row["stage"] == "time"]
    assert {row["runner"] for row in timed} == {"torch.nn", "native", "reference"}
    assert all(float(row["value"]) > 0 for row in timed)
    assert "12 of 12 checks passed" in (tmp_path / "device.md").read_text()


@needs_kernels
def test_a_wrong_backend_fails_its_checks_and_is_not_timed(tmp_path, monkeypatch):
    right = FusedProgram.run

    def wrong(self, *arguments, **options):
        ys, state = right(self, *arguments, **options)
        return (ys * 1.001, state) if type(self.cell).__name__ == "GRUEquations" else (ys, state)

    monkeypatch.setattr(FusedProgram, "run", wrong)
    results = run(TRY, tmp_path)
    assert {(finding.cell, finding.stage) for finding in results.failed} == {("gru", "check")}
    assert all("times the allowed difference" in finding.note for finding in results.failed)
    assert {f.cell for f in results.findings if f.stage == "time" and f.runner == "native"} == {"lstm"}
    assert "**check native: gru, layer, window 2" in (tmp_path / "device.md").read_text()


@needs_kernels
def test_a_race_is_found(tmp_path, monkeypatch):
    right, calls = FusedProgram.run, []

    def racing(self, inputs, *arguments, **options):
        ys, state = right(self, inputs, *arguments, **options)
        calls.append(1)
        return ys + len(calls) * 1e-9 * (inputs.xs.dtype == torch.float32), state

    monkeypatch.setattr(FusedProgram, "run", racing)
    found = device.repeat("cpu", "native", "rnn", "rms", 2, TRY.checked[0], 3)
    assert (found.status, found.value) == ("failed", 2.0)
    assert found.note == "2 of 2 runs differ from the first"


def test_findings_are_written_at_once(tmp_path, monkeypatch):
    def interrupt(finding):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(TRY, tmp_path, interrupt)
    assert len(lines(tmp_path)) == 1


def test_no_case_starts_after_the_limit(tmp_path):
    assert run(TRY._replace(limit=0.0), tmp_path).findings == []


def test_a_device_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SpecError, match="--device: got 'tpu'; expected a device of this machine: cpu"):
        run(Plan("tpu"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys):
    assert main(["bench", "--device", "cpu"]) == 2
    assert "--check: got nothing; expected --device cuda --check" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_reference_is_right_on_a_gpu(tmp_path):
    plan = Plan("cuda", **{**TINY, "timed": ()})
    found = [finding for finding in run(plan, tmp_path).findings if finding.runner == "reference"]
    assert found
    assert {finding.status for finding in found} == {"passed"}
