"""Fixtures for plugins: a folder on the import path, and a registry that each test restores."""

import sys

import pytest

from atn_norms import plugins
from atn_norms.registry import registry
from tests.plugins.site import Site


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    """Restore the process-wide registry after each test."""
    registry.load()
    before = {
        family: {kind: list(entries) for kind, entries in kinds.items()} for family, kinds in registry._claims.items()
    }
    yield
    registry._claims = before


@pytest.fixture
def site(tmp_path, monkeypatch):
    for variable in (plugins.DISABLE, plugins.LOAD):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield Site(folder)
    for module in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[module]
