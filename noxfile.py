"""The stages of the continuous check: `nox -l` lists them, `nox -s tests` runs one in its own environment.

`.ci/run` runs the same sessions with `--no-venv`, in the environment that the README's commands made.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import nox
from nox.virtualenv import PassthroughEnv

ROOT = Path(__file__).parent
LONG_TESTS = 1300  # seconds after which no long test starts; earlier if TIME_LEFT is smaller
STUCK = 800  # further seconds after which the stage fails
TESTED = ("ablation", "data", "export", "testing", "test")  # extras that the default tests need
NO_TESTS = 5  # pytest's exit code where no test is selected
EXPORTS = [
    "onnx_steps_of_every_window_equal_unroll",
    "a_long_sequence_is_not_optimized_by_the_exporter",
    "compiled_files_equal_unroll_without_this_package",
    "files_of_the_command_equal_unroll_without_this_package",
    "torch_export_runs_without_this_package",
]
# Long tests that fit into the check; `pytest -m deep` has more.
LONG_FILES = [
    *(f"tests/faults/test_{name}.py" for name in ("hostile", "kills", "programs", "zombies")),
    "tests/plugins",
    *(f"tests/test_{name}.py" for name in ("cli", "engine", "function", "interface")),
    *(f"tests/test_export.py::test_{name}" for name in EXPORTS),
    "tests/torch_api/test_distributed.py",
    "tests/torch_api/test_compile.py::test_a_saved_program_loads_after_an_import_of_the_package",
    "tests/torch_api/test_compile.py::test_a_norm_first_seen_by_a_compiler_runs_on_the_reference_there_alone",
    "tests/torch_api/test_compile.py::test_a_compiled_package_has_the_same_numbers[lstm-layer]",
    "tests/laws",
    "tests/native",
    "tests/traced/test_campaign.py",  # the parts that fit
    "tests/torch_api/test_compile.py::test_traced_norms_compile_and_export",
]

nox.options.sessions = ["lint", "types", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *extras: str) -> None:
    """Install this package with extras at the pinned versions, unless the session runs in the caller's environment."""
    if not isinstance(session.virtualenv, PassthroughEnv):
        session.install("-c", "constraints.txt", "-e", f".[{','.join(extras)}]")


def python(session: nox.Session) -> str:
    """Return the interpreter that a session runs."""
    return session.run("python", "-c", "import sys; print(sys.executable)", silent=True, log=False).strip()


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the language of the prose."""
    install(session, "test", "dev")
    session.run("python", "-m", "ruff", "check", ".")
    session.run("python", "-m", "ruff", "format", "--check", ".")
    session.run("python", "-m", "tests.language")


@nox.session
def types(session: nox.Session) -> None:
    """Check types."""
    install(session, "test", "dev")
    session.run("python", "-m", "pyright", "--pythonpath", python(session))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the default tests; arguments after `--` go to pytest."""
    install(session, "test")
    session.run("python", "-m", "pytest", *(session.posargs or ["-n", "2"]))


@nox.session
def kernels(session: nox.Session) -> None:
    """Compile the kernels every way: warnings, processors, sanitizers, wheel, sdist, no compiler."""
    install(session, "test", "dev")
    session.run("bash", ".ci/kernels", python(session), external=True)


@nox.session
def plugins(session: nox.Session) -> None:
    """Install and test the bundled plugins, and those that `new-plugin` writes."""
    install(session, "test", "dev")
    session.run("bash", ".ci/plugins", python(session), external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example of the documentation, the GPU kernels in Triton's interpreter, and build the pages."""
    install(session, "test", "docs", "dev")
    session.run("python", "-c", "import triton")  # without Triton its tests would be skipped
    session.run("python", "-m", "pytest", "-q", "-n", "2", "README.md", "docs", "tests/triton")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "--quiet", "-b", "html", "docs", "docs/_build/html")


@nox.session
def long(session: nox.Session) -> None:
    """Run the long tests that fit into the check; other paths after `--` go to pytest."""
    install(session, "test")
    budget = max(0, min(LONG_TESTS, int(os.environ.get("TIME_LEFT", LONG_TESTS))))
    options = ["-q", "-n", "2", "-m", "deep", "--budget", str(budget)]
    command = ["timeout", str(budget + STUCK), "python", "-m", "pytest", *options, *(session.posargs or LONG_FILES)]
    session.run(*command, external=True, success_codes=[0, NO_TESTS])


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the default tests with the lowest versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ranges = [*project["dependencies"], *(each for extra in TESTED for each in extras[extra])]
    floors = [re.sub(r">=([\w.]+).*", r"==\1", each) for each in ranges if not each.startswith(project["name"])]
    session.install("setuptools>=77", *floors)
    session.install("--no-deps", "--no-build-isolation", "-e", ".")
    session.run("python", "-m", "pytest", *(session.posargs or ["-n", "2"]))
