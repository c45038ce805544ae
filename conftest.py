"""Shared set-up of every test and executed example: one torch thread, hypothesis profiles, and sybil."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads: two workers on two cores must not fight

import doctest
import gc
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

torch.set_num_threads(1)
# A shell's background process ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

slow_to_draw = [HealthCheck.too_slow]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=slow_to_draw)
settings.register_profile("deep", deadline=None, max_examples=500, suppress_health_check=slow_to_draw)
settings.load_profile("ci")


BEGIN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--budget", type=float, default=None, metavar="SECONDS", help="skip what starts later")


def pytest_collection_finish():
    """Exclude the imported modules from garbage collection, which takes a fifth of a second with them."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Skip what starts after the time budget: long searches run while they fit, and the count of skips is reported."""
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - BEGIN > budget:
        pytest.skip(f"not started within {budget:g} s")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global generator, whichever worker runs it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    """Give the examples of a document one folder for their files."""
    here, folder = Path.cwd(), tmp_path_factory.mktemp("example")
    os.chdir(folder)
    yield folder
    os.chdir(here)


def seed_examples(namespace):
    """A document's examples share one namespace and begin from a fixed seed."""
    torch.manual_seed(0)
    namespace["__name__"] = "__main__"  # what a class defined in an example belongs to


def run_in_shell(example: Example) -> str | None:
    """Run each `$ command` of a console block and compare its output with what is shown; `...` stands for anything."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    surroundings = {**os.environ, "PATH": programs, "COLUMNS": "120", "NO_COLOR": "1"}
    for shown in ("\n" + example.parsed).split("\n$ ")[1:]:
        command, _, expected = shown.partition("\n")
        done = subprocess.run(
            ["bash", "-c", command],
            env=surroundings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return f"$ {command}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
        expected = expected.rstrip("\n") + "\n" if expected.strip() else ""
        if not doctest.OutputChecker().check_output(expected, done.stdout, flags):
            return f"$ {command}\nexpected:\n{expected}\nprinted:\n{done.stdout}"
    return None


pages = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser(language="console", evaluator=run_in_shell)],
    patterns=["*.md"],
    fixtures=["example_folder"],
    setup=seed_examples,
)
docstrings = Sybil(
    parsers=[DocTestParser(doctest.ELLIPSIS)],
    path="atn_norms",
    patterns=["*.py"],
    fixtures=["example_folder"],
    setup=seed_examples,
)
pytest_collect_file = (pages + docstrings).pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Share tests out one by one, but keep a document on one worker: each of its examples builds on those before it."""
    from xdist.scheduler import LoadScopeScheduling

    class DocumentsWhole(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(("tests/", "plugins/")) else nodeid.partition("::")[0]

    return DocumentsWhole(config, log)
