"""Test the bundled plugins together: loading, README examples, and studies.

CI installs each plugin and runs its tests and the conformance tests.
"""

import json
import re

import pytest
import torch

from atn_norms import plugins
from atn_norms.registry import Registry
from tests.plugins.bundled import NAMES, PLUGINS, lay_out
from tests.plugins.site import Site

FAMILY = {"digits": "task", "dilated": "window", "group": "normalizer", "online": "window", "pmean": "normalizer"}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("bundled"))
    for name in NAMES:
        lay_out(PLUGINS / name, site.folder)
    return site


def test_each_registers_one_kind_without_problems(bundled, monkeypatch):
    assert sorted(FAMILY) == NAMES
    monkeypatch.syspath_prepend(bundled.folder)
    registry = Registry()
    records = {record.name: record for record in plugins.load(registry)}
    for name, family in FAMILY.items():
        record = records[name]
        assert (record.status, record.reason, record.kinds) == ("loaded", "", (f"{family}:{name}",))
        assert record.distribution == f"atn-norms-{name}"


@pytest.fixture(scope="module")
def listed(bundled):
    listing = json.loads(bundled.run("-m", "atn_norms", "list", "--json").stdout)
    return {kind["kind"]: kind for kinds in listing.values() for kind in kinds}


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_equation_source_and_options(listed, name):
    text = (PLUGINS / name / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# atn-norms-{name}\n")
    assert "$$" in text
    assert re.search(r"^Source: .*", text, flags=re.M)
    for option, described in listed[name]["options"].items():
        (default,) = re.findall(rf"^\| `{option}` \| .* \| (\S+) \|$", text, flags=re.M)
        assert float(default) == described["default"]


KERNELS = """
import torch, atn_norms as an
from atn_norms.backends.native.library import unavailable
x = torch.randn(9, 3, 2, dtype=torch.float64)
for kind, options in (("group", {"groups": 3}), ("pmean", {"p": 2.0})):
    for placement in ("joint", "per_gate"):
        options_of_layer = {"norm": {"kind": kind, **options}, "window": 4, "placement": {"gates": placement}}
        layer = an.LSTM(2, 6, **options_of_layer, dtype=torch.float64)
        truth = an.LSTM(2, 6, **options_of_layer, dtype=torch.float64, backend="reference")
        truth.load_state_dict(layer.state_dict())
        assert unavailable() or "backend 'native'" in an.explain(layer), an.explain(layer)
        torch.testing.assert_close(layer(x)[0], truth(x)[0], rtol=1e-10, atol=1e-10)
"""
DRAWN = """
import torch
torch.manual_seed(0)
from atn_norms import plugins
plugins.report(strict=True)
print(torch.rand(1).item())
"""


def test_examples_run_and_loading_draws_no_random_number(bundled):
    """In a new interpreter: run the READMEs and the kernels; random numbers do not depend on installed plugins."""
    examples = [
        "\n".join(re.findall(r"^```python\n(.*?)^```$", (PLUGINS / name / "README.md").read_text(), re.M | re.S))
        for name in NAMES
    ]
    assert all(examples)
    code = f"for code in {[DRAWN, *examples, KERNELS]!r}:\n    exec(compile(code, code, 'exec'), {{}})\n"
    done = bundled.run("-c", code)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    assert float(done.stdout) == torch.rand(1).item()


def test_a_study_uses_them_and_maximizes_their_score(bundled, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(
        """
        model: {cell: gru, hidden_size: 8}
        task: {kind: digits, steps: 8}
        train: {steps: 2, eval_every: 2}
        axes:
          norm: [none, group, {kind: pmean, p: inf}]
          window: [1, {kind: dilated, steps: 2, dilation: 3}]
        seeds: 1
        """
    )
    done = bundled.run("-m", "atn_norms", "ablate", str(study), "--workers", "0", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr + done.stdout
    resolved = json.loads((tmp_path / "out" / "study.resolved.json").read_text())
    assert [facts["goal"] for facts in resolved["tasks"].values()] == ["max"]
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "trials").glob("*/result.json")]
    assert len(results) == 5  # without a norm, the window is ignored
    assert all(0 <= result["metrics"]["test"]["accuracy"] <= 1 for result in results)
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["versions"]["atn-norms-digits"] == "0.1.0"


def test_a_misspelt_option_of_a_plugins_task_is_located_in_the_study_file(bundled, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("model: {cell: gru, hidden_size: 8}\ntask:\n  kind: digits\n  stpes: 8\n")
    done = bundled.run("-m", "atn_norms", "ablate", str(study), "--workers", "0", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert f"{study}:4:3: task.stpes: got an unknown key; expected one of kind, " in done.stderr
    assert "did you mean 'steps'?" in done.stderr
