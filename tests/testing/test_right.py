"""Correct plugins pass every law: the built-in kinds with several options, and the correct halves of the gallery."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import atn_norms as an
from atn_norms.backends.base import known
from atn_norms.normalizers import PerGate
from atn_norms.statistics import promoted
from atn_norms.testing import CheckResult
from atn_norms.testing.checks import law_runs
from tests.laws.test_third_party import CentreSpec, MaxNormSpec, PairSpec, PMeanSpec
from tests.testing.gallery.cells import Simple
from tests.testing.gallery.entry import cell_spec, norm_spec, task_spec, window_spec
from tests.testing.gallery.normalizers import Layer
from tests.testing.gallery.options import PowerSpec
from tests.testing.gallery.statistics import Uses
from tests.testing.gallery.tasks import Sums
from tests.testing.gallery.windows import Decaying, Three


class Measured(Uses):
    """The normalizer of the gallery with a correct statistic."""

    Custom = an.Moments


class Guarded(Layer):
    """Reads a number out of a tensor in training only, so a native program exists in evaluation only."""

    def measure(self, x: Any) -> Any:
        if self.training and bool(x.detach().isnan().any()):
            raise ValueError("x: got NaN; expected finite numbers")
        return super().measure(x)


class Deviation(Layer):
    """Division by the mean deviation from the mean of the step, which is 0 for one feature."""

    def measure(self, x: Any) -> Any:
        wide = promoted(x)
        return an.Average.of((wide - wide.mean(-1, keepdim=True)).abs())

    def normalize(self, x: Any, pooled: Any) -> Any:
        return x / (pooled.mean + 1e-3) * self.weight


class Saturating(Layer):
    """Layer normalization with a limit, which every element reaches for one feature and a statistic of another row."""

    def normalize(self, x: Any, pooled: Any) -> Any:
        return ((x - pooled.mean) * torch.rsqrt(pooled.var + 1e-5)).clamp(-1, 1) * self.weight


class GatesSpec(an.NormSpec):
    """A normalizer for each gate, as the placement `per_gate` builds it; `second`: another one for the second gate."""

    kind: Literal["gates"] = "gates"
    of: Any = "layer"
    second: Any = None

    def build(self, features: int) -> PerGate:
        if features % 2:
            raise ValueError(f"features: got {features}; expected an even number")
        gates = []
        for kind in (self.of, self.second or self.of):
            spec = an.LayerSpec(cell="rnn", input_size=1, hidden_size=1, norm=kind).norm  # type: ignore[arg-type]
            assert isinstance(spec, an.NormSpec)
            gates.append(spec.build(features // 2))
        return PerGate(gates)


DATA = Path(__file__).parents[1] / "data"
LOAD = {"kind": "series", "file": str(DATA / "load.csv"), "targets": ["load"], "context": 8}
STROKES = {"kind": "sequences", "path": str(DATA / "strokes")}
NUMBERED = {"kind": "sequences", "path": str(DATA / "strokes.csv"), "mode": "regress"}
SMALL_TEXT = {"embedding": 6, "segment": 20}
RIGHT: list[tuple[str, Any]] = [
    ("normalizer", "layer"),
    ("normalizer", {"kind": "rms", "bias": True}),
    ("normalizer", "batch"),
    ("normalizer", GatesSpec(second={"kind": "layer", "eps": 0.1})),
    ("window", {"kind": "sliding", "steps": 3}),
    ("window", "cumulative"),
    ("window", {"kind": "exponential", "half_life": 2.0}),
    ("window", {"kind": "detached", "window": 3}),
    ("cell", {"kind": "lstm", "proj_size": 2}),
    ("cell", "gru"),
    ("cell", "rnn"),
    ("task", {"kind": "adding", "length": 12, "train": 64, "test": 100}),
    ("task", {"kind": "charlm", **SMALL_TEXT}),
    ("task", {**LOAD, "horizon": 3, "season": 7, "time": "day"}),
    ("task", STROKES),
    ("task", task_spec(Sums)),
    *[("backend", backend) for name, backend in known().items() if name != "triton"],  # needs a GPU
]
MORE: list[tuple[str, Any]] = [
    ("normalizer", PMeanSpec(p=3.0)),
    ("normalizer", norm_spec(Layer)),
    ("normalizer", norm_spec(Deviation)),
    ("normalizer", norm_spec(Saturating)),
    ("normalizer", {"kind": "layer", "eps": 1e-2}),
    ("normalizer", "rms"),
    ("normalizer", {"kind": "batch", "max_steps": 3, "initial_gain": 0.1}),
    ("normalizer", {"kind": "batch", "momentum": None}),
    ("normalizer", GatesSpec()),
    ("normalizer", GatesSpec(of={"kind": "rms"})),
    ("normalizer", GatesSpec(of={"kind": "batch"})),
    ("normalizer", PMeanSpec(p=1.0)),
    ("normalizer", MaxNormSpec()),
    ("normalizer", CentreSpec()),
    ("normalizer", PowerSpec(p=1.5)),
    ("normalizer", norm_spec(Measured)),
    ("window", {"kind": "sliding", "steps": 1}),
    ("window", {"kind": "sliding", "steps": 25}),
    ("window", {"kind": "exponential", "half_life": 0.5}),
    ("window", PairSpec()),
    ("window", window_spec(Three)),
    ("window", window_spec(Decaying)),
    ("cell", "lstm"),
    ("cell", {"kind": "rnn", "nonlinearity": "relu"}),
    ("cell", cell_spec(Simple)),
    ("task", "adding"),
    ("task", {"kind": "copying", "length": 10, "test": 50, "validation": 40}),
    ("task", {"kind": "denoise", "length": 10, "test": 50, "validation": 40}),
    ("task", {"kind": "charlm", "carry": "hidden", **SMALL_TEXT}),
    ("task", {"kind": "charlm", "carry": "none", **SMALL_TEXT}),
    ("task", {**LOAD, "mode": "regress", "covariates": ["heat"], "metric": "MASE"}),
    ("task", {**LOAD, "targets": ["load", "heat"], "metric": "MSE", "stride": 2}),
    ("task", {**STROKES, "pool": "mean", "metric": "macro F1"}),
    ("task", NUMBERED),
    ("task", {**NUMBERED, "metric": "MSE", "columns": ["y"]}),
    ("task", {"kind": "wordlm", "vocabulary": 50, **SMALL_TEXT}),
]


def called(case: Any) -> str:
    if isinstance(case, str | dict):
        options = (
            [] if isinstance(case, str) else [f"{k}={v}" for k, v in case.items() if k not in ("kind", "file", "path")]
        )
        return "-".join([case if isinstance(case, str) else case["kind"], *options])
    return type(case).__qualname__


def broken(family: str, plugin: Any) -> list[CheckResult]:
    results = [run.result({}) for run in law_runs(family, plugin)]
    assert sum(result.status == "passed" for result in results) >= 6
    return [result for result in results if result.status not in ("passed", "skipped")]


@pytest.mark.parametrize(("family", "plugin"), RIGHT, ids=called)
def test_a_correct_plugin_passes_every_law(family, plugin):
    assert broken(family, plugin) == []


def test_a_normalizer_without_a_program_in_training_is_compared_in_evaluation():
    runs = [run for run in law_runs("normalizer", norm_spec(Guarded)) if run.law.name == "backends_agree_on_it"]
    assert [run.result({}).status for run in runs] == ["passed"]


def test_a_normalizer_that_saturates_keeps_its_type():
    runs = [run for run in law_runs("normalizer", norm_spec(Saturating)) if run.law.name == "the_dtype_is_kept"]
    assert [run.result({}).status for run in runs] == ["passed"]


@pytest.mark.deep
@pytest.mark.parametrize(("family", "plugin"), MORE, ids=called)
def test_correct_plugins_with_other_options_pass(family, plugin):
    assert broken(family, plugin) == []


def test_every_built_in_kind_is_tested():
    from atn_norms.registry import FAMILIES, registry

    named = {(f, p if isinstance(p, str) else p["kind"]) for f, p in RIGHT + MORE if isinstance(p, str | dict)}
    own = {(f, k) for f in FAMILIES for k, entry in registry.kinds(f).items() if entry.distribution == "atn-norms"}
    assert own <= named


def test_built_in_kinds_skip_only_laws_that_do_not_apply():
    """A skipped law tests nothing, so a built-in kind may skip a law only if it does not apply."""
    skipped = {
        kind: {q.law.name for q in law_runs("normalizer", kind) if q.law.unless is not None and q.law.unless(q.subject)}
        for kind in ("layer", "rms", "batch")
    }
    assert skipped == {
        "layer": set(),
        "rms": {"shift_invariance_holds"},
        "batch": {"a_union_equals_its_pooled_parts", "declared_feature_moments_hold"},
    }
