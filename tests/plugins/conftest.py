"""What the tests of plugins share: a folder to install into that is on the path while a test runs."""

import sys

import pytest

from atn_norms import plugins
from tests.plugins.site import Site


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
