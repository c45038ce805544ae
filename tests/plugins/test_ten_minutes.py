"""Run every command and file of docs/write-a-normalizer.md in a new environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.site import ROOT

PAGE = ROOT / "docs" / "write-a-normalizer.md"
STEP = re.compile(r"^<!-- (run|file: \S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
IGNORED = shutil.ignore_patterns(
    ".*cache*",
    ".git",
    ".hypothesis",
    ".venv",
    "__pycache__",
    "_build",
    "*.egg-info",
    "build",
    "dist",
    "html",
)


def script(page: str) -> str:
    """Return the commands and files of the page as one shell script."""
    lines = ["set -euo pipefail"]
    for what, text in STEP.findall(page):
        if what == "run":
            lines.append(text)
        else:
            lines.append(f"cat >{what.removeprefix('file: ')} <<'END OF THE FILE'\n{text}END OF THE FILE")
    return "\n".join(lines)


def test_every_code_block_of_the_page_is_a_step():
    text, marker, _ = PAGE.read_text(encoding="utf-8").partition("\n(two-averages)=\n")
    assert marker  # the tutorial ends there
    assert len(STEP.findall(text)) == text.count("```") // 2 >= 7


def test_its_normalizer_is_its_equation(tmp_path, monkeypatch):
    """In this process, without the conformance tests, which the long test runs."""
    files = {what.removeprefix("file: "): text for what, text in STEP.findall(PAGE.read_text(encoding="utf-8"))}
    (tmp_path / "atn_norms_geometric.py").write_text(files["src/atn_norms_geometric.py"], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "atn_norms_geometric", raising=False)
    scope: dict = {}
    exec(compile(files["tests/test_geometric.py"], "test_geometric.py", "exec"), scope)
    scope["test_it_is_its_equation"]()
    del sys.modules["atn_norms_geometric"]


@pytest.mark.deep
@pytest.mark.timeout(1200)
def test_every_command_of_the_page_runs(tmp_path: Path):
    folder = tmp_path / "atn-norms"
    shutil.copytree(ROOT, folder, ignore=IGNORED)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        ["bash", "-c", script(PAGE.read_text(encoding="utf-8"))],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "All checks passed!" in done.stdout
    assert "geometric  atn-norms-geometric" in done.stdout
    assert "reference" in done.stdout
