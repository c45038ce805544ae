"""What the campaigns share: the process that children are forked from, and a study that nothing happened to."""

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
    """The files of a study that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    told = children.ended(children.whole, folder)
    assert told.said == {"done": 1, "failed": 0, "running": 0, "pending": 0}, told
    return children.truth(folder)


@pytest.fixture
def place(tmp_path):
    """A folder on a file system in memory where there is one: a kill is a kill, and waiting for a disk takes long."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
