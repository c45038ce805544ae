"""The two commands of the README are the commands that CI runs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKED = dict(re.findall(r"^<!-- command: (\w+) -->\n```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL))


def test_there_are_two_commands():
    assert list(MARKED) == ["ablate", "test"]


@pytest.mark.parametrize("name", ["ablate", "test"])
def test_a_command_is_one_line_that_stops_at_the_first_failure(name):
    (line,) = MARKED[name].splitlines()
    steps = line.split(" && ")
    assert steps[0] == "python3 -m venv .venv", "each command starts without an environment"
    assert steps[1].startswith('.venv/bin/python -m pip install -c constraints.txt -e ".[')
    assert ";" not in line
    assert "|" not in line


def test_the_first_command_ablates_and_the_second_tests():
    assert MARKED["ablate"].strip().endswith(".venv/bin/atn-norms ablate")
    assert MARKED["test"].strip().endswith(".venv/bin/python -m pytest -n 2")


@pytest.mark.parametrize("name", ["ablate", "test"])
def test_the_continuous_check_extracts_the_same_command(name):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^readme_command\(\) \{\n.*?^\}$", script, flags=re.MULTILINE | re.DOTALL)
    assert function, ".ci/run defines readme_command"
    done = subprocess.run(
        ["bash", "-c", f"{function[0]}\nreadme_command {name}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == MARKED[name]
    assert f"literally {name}" in script


def test_the_continuous_check_fails_where_a_command_is_missing(tmp_path):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    functions = re.search(r"^readme_command\(\) \{\n.*?^literally\(\) \{\n.*?^\}$", script, flags=re.M | re.S)
    assert functions
    (tmp_path / "README.md").write_text(README.replace("<!-- command: test -->", ""), encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{functions[0]}\nliterally test"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no command marked 'test'" in done.stderr


def test_the_pinned_versions_cover_the_declared_dependencies():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    declared = {
        re.split(r"[\[><=;]", requirement)[0].lower().replace("_", "-")
        for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert declared - {"atn-norms"} <= {name.lower().replace("_", "-") for name in pins}
    assert pins["torch"] == "2.13.0"
    assert not any("+" in version for version in pins.values()), "a local version pins one index, not one release"
