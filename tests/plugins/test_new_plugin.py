"""Test `atn-norms new-plugin`: the generated plugin works, and invalid arguments give one message."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atn_norms import __version__
from atn_norms.cli import main
from atn_norms.commands.new_plugin import LONGEST, NAME, STARTS, contents
from tests.plugins.bundled import lay_out
from tests.plugins.site import ROOT, Site

LONG = "abcdefghij-abcdefghij-ab"  # the longest allowed name


@pytest.mark.parametrize("family", STARTS)
@given(name=st.from_regex(NAME, fullmatch=True).filter(lambda name: len(name) <= LONGEST))
def test_every_name_gives_valid_python_and_toml_and_short_lines(family, name):
    files = contents(name, family)
    (module,) = (path for path in files if path.startswith("src/"))
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["entry-points"]["atn_norms"] == {name: module.removeprefix("src/").removesuffix(".py")}
    assert project["name"] == f"atn-norms-{name.replace('_', '-')}"
    assert f"atn-norms>={'.'.join(__version__.split('.')[:2])}" in project["dependencies"]
    assert {path.rpartition("/")[0] for path in files} == {"", "src", "tests"}
    for path, text in files.items():
        assert text.endswith("\n")
        assert "$" not in text, path
        assert all(len(line) <= 120 for line in text.splitlines()), path
        if path.endswith(".py"):
            ast.parse(text)


def write(tmp_path, *arguments: str) -> int:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        return main(["new-plugin", *arguments])
    finally:
        os.chdir(here)


@pytest.mark.deep
def test_a_generated_plugin_passes_its_tests(tmp_path, capsys):
    """All kinds together, as installed; CI installs them, runs the conformance tests and lints them."""
    site = Site(tmp_path / "site")
    site.folder.mkdir()
    for family in STARTS:
        assert write(tmp_path, f"my-{family}", "--kind", family) == 0
        output = capsys.readouterr().out
        assert f"wrote atn-norms-my-{family}: pyproject.toml, README.md" in output
        assert f'cd atn-norms-my-{family}, pip install -e ".[test]", pytest, atn-norms check my-{family}' in output
        lay_out(tmp_path / f"atn-norms-my-{family}", site.folder)
    tests = [str(tmp_path / f"atn-norms-my-{family}" / "tests") for family in STARTS]
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-k", "my_normalizer or not test_laws"]
    done = site.run("-m", "pytest", *options, *tests)
    assert done.returncode == 0, done.stdout[-4000:]
    examples = [
        (tmp_path / f"atn-norms-my-{family}" / "README.md").read_text().split("```python\n")[1].split("```")[0]
        for family in STARTS
    ]
    done = site.run("-c", "\n".join([*examples, "from atn_norms.plugins import report", "report(strict=True)"]))
    assert done.returncode == 0, done.stderr


def test_ci_installs_a_generated_plugin_of_every_family():
    assert f"for family in {' '.join(STARTS)}; do" in (ROOT / ".ci" / "plugins").read_text()


@pytest.mark.deep
@pytest.mark.parametrize("name", ["x", "my-own", LONG])
@pytest.mark.parametrize("family", STARTS)
def test_a_generated_plugin_passes_the_linter(tmp_path, family, name):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    assert write(tmp_path, name, "--kind", family, "--out", "plugin") == 0
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."],
            cwd=tmp_path / "plugin",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["Mine"],
            r"NAME: got 'Mine'; expected up to 24 lower-case letters and digits, a letter first, joined by '-' or",
        ),
        (["3d"], "NAME: got '3d'; expected up to 24"),
        (["a--b"], "NAME: got 'a--b'; expected up to 24"),
        (["a_"], "NAME: got 'a_'; expected up to 24"),
        (["../a"], "NAME: got '../a'; expected up to 24"),
        (["größe"], "NAME: got 'größe'; expected up to 24"),
        ([""], "NAME: got ''; expected up to 24"),
        (["none"], "NAME: got 'none'; expected "),
        ([LONG + "i"], "NAME: got 'abcdefghij-abcdefghij-abi'; expected up to 24"),
        (["atn-norms-mine"], "NAME: got 'atn-norms-mine'; expected the name of the kind, 'mine', without the prefix"),
        (["layer"], "NAME: got normalizer 'layer', which atn-norms has; expected a new name"),
        (["sliding", "--kind", "window"], "NAME: got window 'sliding', which atn-norms has; expected a new name"),
        (
            ["mine", "--kind", "windw"],
            "--kind: got unknown kind 'windw'; expected one of normalizer, window, cell, task; did you mean 'window'?",
        ),
    ],
)
def test_invalid_names_are_rejected(tmp_path, capsys, arguments, message):
    assert write(tmp_path, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"atn-norms: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_kind_of_another_family_may_have_the_name(tmp_path, capsys):
    assert write(tmp_path, "layer", "--kind", "window") == 0
    assert "atn-norms check layer --family window\n" in capsys.readouterr().out


def test_a_module_that_is_installed_is_not_shadowed(tmp_path, site, capsys):
    (site.folder / "atn_norms_mine.py").write_text("")
    assert write(tmp_path, "mine") == 2
    assert "module atn_norms_mine is installed already; expected a new name" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["a file", "a folder with a file", "a link to nowhere"])
def test_nothing_is_overwritten(tmp_path, capsys, there):
    target = tmp_path / "atn-norms-mine"
    if there == "a file":
        target.write_text("kept")
    elif there == "a link to nowhere":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("kept")
    assert write(tmp_path, "mine") == 2
    cure = "Choose another folder with --out, or move this one away"
    message = f"atn-norms: atn-norms-mine: got an existing folder; expected a new folder. {cure}\n"
    assert capsys.readouterr().err == message
    assert [path.name for path in tmp_path.iterdir()] == ["atn-norms-mine"]
    assert there == "a link to nowhere" or "kept" in (target if target.is_file() else target / "notes.txt").read_text()


def test_an_empty_folder_is_used_and_parent_folders_are_created(tmp_path):
    (tmp_path / "empty").mkdir()
    assert write(tmp_path, "mine", "--out", "empty") == 0
    assert write(tmp_path, "mine", "--out", "some/where/else") == 0
    assert (tmp_path / "empty" / "pyproject.toml").read_text() == (
        tmp_path / "some" / "where" / "else" / "pyproject.toml"
    ).read_text()


def test_a_failed_write_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert write(tmp_path, "mine", "--out", "file/mine") == 2
    assert capsys.readouterr().err == "atn-norms: file/mine: got Not a directory; expected a writable folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(shutil.which("git") is None, reason="requires git")
def test_git_lists_the_written_files_and_ignores_build_products(tmp_path, capsys):
    """In a clone of this repository, git lists the written files and ignores build products."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    assert write(tmp_path, "mine") == 0
    left = (
        "src/__pycache__/x.pyc",
        "src/atn_norms_mine.egg-info/PKG-INFO",
        ".hypothesis/x",
        ".pytest_cache/x",
        "build/x",
    )
    for path in left:
        debris = tmp_path / "atn-norms-mine" / path
        debris.parent.mkdir(parents=True, exist_ok=True)
        debris.touch()
    written = {f"atn-norms-mine/{path}" for path in contents("mine", "normalizer")}
    for folder, prefix in ((tmp_path, ""), (tmp_path / "atn-norms-mine", "atn-norms-mine/")):
        subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
        command = ["git", "-C", str(folder), "ls-files", "--others", "--exclude-standard"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert {prefix + path for path in shown} - {".gitignore"} == written
