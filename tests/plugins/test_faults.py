"""Broken plugins do not affect other plugins, and each fault is reported with its distribution."""

import json
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from atn_norms import plugins
from atn_norms.commands.list import options
from atn_norms.registry import FAMILIES, Registry, Source
from atn_norms.registry import registry as process_registry
from tests.plugins.faults import CLOCK, FAULTS, UNREADABLE, WINDOW, installed
from tests.plugins.site import HOOK, NORMALIZER, Site

GOOD = {
    "good": NORMALIZER.replace("KIND", "good"),
    "kind": WINDOW.replace("KIND", "kind") + HOOK + "registry.window(EverSpec)\n",
}


def install_good(site: Site) -> None:
    for name, code in GOOD.items():
        site.install(name, code)


def abilities(registry: Registry) -> dict[str, object]:
    """Return the kinds, options and outputs of the intact plugins and the built-in kinds."""
    ours = {
        (family, kind): entry
        for family in FAMILIES
        for kind, entry in registry.kinds(family).items()
        if entry.distribution in ("atn-norms", "dist-good", "dist-kind")
    }
    torch.manual_seed(0)
    window: Any = registry.lookup("window", "kind")()
    norm: Any = registry.lookup("normalizer", "good").model_validate({"p": 3.0})
    layer = an.LSTM(3, 4, norm=norm, window=window, backend="reference")
    y, _ = layer(torch.linspace(-1, 1, 30).reshape(5, 2, 3))
    return {
        "kinds": {key: (entry.plugin, entry.version) for key, entry in ours.items()},
        "options": {key: options(entry.spec) for key, entry in ours.items()},
        "numbers": y.tolist(),
    }


def forget_modules() -> None:
    for module in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[module]


class Undo(Exception):
    """End a transaction without its changes."""


def loaded(names: list[str]) -> tuple[Registry, dict[str, plugins.PluginRecord], dict[str, tuple[str, str]]]:
    """Load intact and broken plugins; return the registry, the records and the expected reports."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(plugins, "time", CLOCK)
        site = Site(Path(folder))
        expected = installed(site, names)
        install_good(site)
        forget_modules()
        registry = Registry()
        # A module may register kinds in the global registry while it is imported.
        with suppress(Undo), process_registry.transaction(Source("broken", "dist-broken", "1.0")):
            records = plugins.examined(plugins.load(registry), registry)
            raise Undo
    return registry, {record.name: record for record in records}, expected


def check(names: list[str], alone: dict[str, object]) -> None:
    registry, records, expected = loaded(names)
    assert abilities(registry) == alone
    faulty = {name for name, record in records.items() if record.faulty}
    records_by_name = {name: records[name] for name in expected if name in records}
    for name, (status, reason) in expected.items():
        # a distribution without a name is reported by its folder
        record = records_by_name[name]
        assert record.status == status
        assert re.search(reason, record.reason), record.reason
        assert "dist-" in record.distribution or "dist_" in record.distribution
        assert status == "loaded" or not record.kinds
    assert faulty == set(expected)
    left = {f"{family}:{kind}" for family in FAMILIES for kind in registry.kinds(family)}
    left |= {f"{family}:{kind}" for family in FAMILIES for kind in registry.conflicts(family)}
    assert left == {kind for record in records.values() if record.status == "loaded" for kind in record.kinds}


@pytest.fixture(scope="module")
def alone():
    """Kinds, options and outputs without broken plugins."""
    registry, records, _ = loaded([])
    assert not any(record.faulty for record in records.values())
    yield abilities(registry)
    forget_modules()


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault(name, alone, caplog):
    check([name], alone)
    log = " ".join(caplog.messages)
    failed = [plugin for plugin, (status, _) in FAULTS[name].expected.items() if status == "failed"]
    assert all(f"plugin '{plugin}' of " in log for plugin in failed)


@given(names=st.lists(st.sampled_from(sorted(FAULTS)), unique=True))
def test_broken_plugins_do_not_change_the_others(names, alone):
    check(names, alone)


def test_kinds_registered_during_a_failed_import_are_removed(site):
    """Through the global registry, which a module can import."""
    installed(site, ["registers while imported and then raises"])
    install_good(site)
    code = "from atn_norms.registry import registry; print(list(registry.kinds('window')))"
    done = site.run("-c", code)
    assert done.stdout.strip() == "['cumulative', 'detached', 'exponential', 'kind', 'sliding']", done.stderr


@pytest.fixture(scope="module")
def broken_site(tmp_path_factory):
    """Site with all broken plugins and the intact ones.

    Entry points that do not parse are excluded: pydantic also reads them in every process, and raises.
    """
    site = Site(tmp_path_factory.mktemp("broken"))
    expected = installed(site, [name for name in FAULTS if name not in ("takes long", UNREADABLE)])
    install_good(site)
    return site, expected


@pytest.mark.parametrize("command", ["plugins", "doctor"])
@pytest.mark.parametrize("strict", [[], ["--strict"]])
def test_the_command_line_reports_every_fault_with_its_distribution(broken_site, command, strict):
    site, expected = broken_site
    done = site.run("-m", "atn_norms", command, "--json", *strict)
    report = json.loads(done.stdout)
    if command == "plugins":
        assert done.returncode == (1 if strict else 0)
        records_by_name = {record["name"]: f"{record['distribution']} {record['reason']}" for record in report}
    else:
        assert done.returncode == 1  # a plugin is broken
        records_by_name = {each["subject"].removeprefix("plugin "): each["finding"] for each in report["checks"]}
    for name, (_, reason) in expected.items():
        assert re.search(rf"dist[-_].*{reason}", records_by_name[name]), records_by_name[name]
    assert "Traceback" not in done.stderr


def test_commands_name_a_plugin_that_failed_where_a_kind_may_be_missing(site):
    site.install("broken", "class Oops\n")
    for arguments, code in ((["list", "normalizers"], 0), (["check", "mine"], 2)):
        done = site.run("-m", "atn_norms", *arguments)
        assert done.returncode == code, done.stderr
        assert "atn-norms: plugin 'broken' of dist-broken 1.0 failed and is left out: SyntaxError" in done.stderr
    assert "Plugins that failed to load: broken; `atn-norms plugins` has the reasons." in done.stderr
    assert "Install" not in done.stderr


def test_a_slow_plugin_is_reported_while_loading_and_fails_in_strict_mode(site):
    site.install("slow", "import time\ntime.sleep(3.5)\n" + GOOD["good"])
    code = (
        "import json\nfrom atn_norms import plugins\n"
        "(record,) = [each for each in plugins.report() if each.name == 'slow']\n"
        "try:\n    plugins.report(strict=True)\nexcept plugins.PluginError as error:\n    message = str(error)\n"
        "from atn_norms.cli import main\n"
        "codes = [main(['plugins']), main(['plugins', '--strict'])]\n"
        "from atn_norms.commands.doctor import _plugins\n"
        "checks = [next(c for c in _plugins(strict) if c.subject == 'plugin slow') for strict in (False, True)]\n"
        "print(json.dumps([record.status, record.seconds, record.reason, message, codes, [c.status for c in checks]]))"
    )
    done = site.run("-c", code)
    assert done.returncode == 0, done.stderr
    status, seconds, reason, message, codes, checks = json.loads(done.stdout.splitlines()[-1])
    assert (status, codes, checks) == ("loaded", [0, 1], ["ok", "failed"])
    assert 3.5 <= seconds < 30
    assert re.fullmatch(r"took \d+\.\d s to load, and every program that uses plugins waits for it", reason)
    assert message == f"plugin 'slow' of dist-slow 1.0: {reason}"
    assert "plugin 'slow' of dist-slow 1.0 is still loading after 2 s; ATN_NORMS_DISABLE_PLUGINS=slow" in done.stderr


def test_strict_mode_succeeds_without_faults(site):
    install_good(site)
    done = site.run("-m", "atn_norms", "plugins", "--strict", ATN_NORMS_DISABLE_PLUGINS="kind")
    assert done.returncode == 0, done.stdout
    assert "blocked" in done.stdout


def test_ctrl_c_ends_a_plugin_that_hangs(site):
    site.install("hangs", "raise KeyboardInterrupt")
    done = site.run("-m", "atn_norms", "plugins")
    assert (done.returncode, done.stderr) == (130, "atn-norms: stopped\n")
