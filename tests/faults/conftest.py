"""Fixtures for fault injection: the fork server, and the files of an uninterrupted study."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.faults import children


@pytest.fixture(scope="session", autouse=True)
def _children():
    with children.ready():
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Files of a study that ran without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    outcome = children.ended(children.whole, folder)
    assert outcome.result == {"done": 1, "failed": 0, "running": 0, "pending": 0}, outcome
    return children.truth(folder)


@pytest.fixture
def place(tmp_path):
    """Temporary folder, in memory where possible: waiting for a disk would slow the tests."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
