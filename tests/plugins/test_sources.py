"""A study resumes only with the recorded plugins: the same version and the same source."""

import importlib
import sys

import pytest

from atn_norms.ablation import create, load, resume, run
from atn_norms.ablation.execution.trial import Trainer
from atn_norms.ablation.grid import sources
from atn_norms.errors import SpecError
from atn_norms.registry import Source, registry
from tests.plugins.site import NORMALIZER

STUDY = {
    "model": {"cell": "rnn", "hidden_size": 3},
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 3, "batch_size": 5},
    "axes": {"norm": ["none", {"kind": "pmean", "p": 3.0}]},
    "seeds": 1,
}
PLUGIN = NORMALIZER.replace("KIND", "pmean")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Register the plugin like a new process that has this version and source installed."""
    monkeypatch.syspath_prepend(tmp_path)
    without = {family: dict(kinds) for family, kinds in registry._claims.items()}

    def installed(version, code=PLUGIN):
        (tmp_path / "plugin_p.py").write_text(code)
        sys.modules.pop("plugin_p", None)
        importlib.invalidate_caches()
        registry._claims = {family: dict(kinds) for family, kinds in without.items()}
        if version is not None:
            with registry.transaction(Source("p", "dist-p", version)):
                importlib.import_module("plugin_p").atn_norms_register(registry)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two sources within one second would share a bytecode file
    yield installed
    sys.modules.pop("plugin_p", None)


CHANGES = [
    ("0.1.0", PLUGIN.replace("1e-5", "1e-4"), "dist-p: got version 0.1.0 with changed source ("),
    ("0.1.1", PLUGIN, "dist-p: got version 0.1.1; expected version 0.1.0"),
    (None, PLUGIN, "dist-p: not installed; expected version 0.1.0"),
]


@pytest.mark.parametrize("action", [create, run, resume])
@pytest.mark.parametrize(("version", "code", "message"), CHANGES)
def test_a_finished_study_rejects_a_changed_plugin(install, tmp_path, version, code, message, action):
    install("0.1.0")
    folder = create(STUDY, tmp_path / "study")
    done = run(folder, workers=0)
    assert [trial.trial.get("plugins", {}).keys() for trial in done.trials] == [set(), {"dist-p"}]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    install(version, code)
    if action is create and version is None:
        message = "unknown normalizer 'pmean'"
    with pytest.raises(SpecError) as caught:
        create(STUDY, folder) if action is create else action(folder, workers=0)
    assert message in str(caught.value)
    assert load(folder) == done, "what is stored can still be read"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_unchanged_plugin_continues(install, tmp_path):
    install("0.1.0")
    folder = create(STUDY, tmp_path / "study")
    install("0.1.0")
    assert run(folder, workers=0).count("done") == 2
    create({**STUDY, "seeds": 2}, folder)
    assert resume(folder, workers=0).count("done") == 4


def test_a_trial_that_records_no_plugin_is_rejected(install, tmp_path):
    """A folder from before plugins were recorded has such trials."""
    install("0.1.0")
    (*_, last) = load(create(STUDY, tmp_path / "study")).trials
    Trainer(last.trial)
    with pytest.raises(SpecError, match="dist-p: used, but the trial records no version of it"):
        Trainer({name: value for name, value in last.trial.items() if name != "plugins"})


def test_plugins_are_part_of_the_identity_and_built_in_kinds_are_not(install, tmp_path):
    ids = []
    for version, code in [("0.1.0", PLUGIN), ("0.1.1", PLUGIN), ("0.1.1", PLUGIN + "# more")]:
        install(version, code)
        ids.append([trial.id for trial in load(create(STUDY, tmp_path / f"{len(ids)}")).trials])
    assert len({first for first, _ in ids}) == 1 and len({second for _, second in ids}) == 3


def test_a_hash_covers_every_source_of_a_package(tmp_path):
    package = tmp_path / "package"
    (package / "deep").mkdir(parents=True)
    (package / "deep" / "table.csv").write_text("1,2")
    (package / "__init__.py").write_text("x = 1")
    before = sources.hash_files(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"1")
    (package / "kernel.so").write_bytes(b"1")
    (package / ".hidden").write_bytes(b"1")
    assert sources.hash_files(package) == before
    for path, text in [("deep/table.csv", "1,3"), ("__init__.py", "x = 2"), ("new.py", "")]:
        (package / path).write_text(text)
        assert sources.hash_files(package) != before
        before = sources.hash_files(package)


def test_a_function_is_hashed_with_its_file(tmp_path):
    module = tmp_path / "mine.py"
    module.write_text("def train(): return helper()\ndef helper(): return 1\n")
    space: dict = {"__name__": "mine"}
    exec(compile(module.read_text(), module, "exec"), space)
    before = sources.hash_source(space["train"])
    assert before == sources.hash_files(module)
    module.write_text("def train(): return helper()\ndef helper(): return 2\n")
    assert sources.hash_source(space["train"]) != before
    exec("def nowhere(): pass", space)
    with pytest.raises(
        SpecError, match="nowhere: got a function without source; expected a function or class defined in a file"
    ):
        sources.hash_source(space["nowhere"])


def test_every_changed_plugin_is_named_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "installed_sources", lambda names: {})
    p, q = {"version": "1", "source": "a"}, {"version": "2", "source": "b"}
    with pytest.raises(SpecError) as caught:
        sources.refuse_changed_plugins(tmp_path, [{"plugins": {"p": p, "q": q}}, {"plugins": {"p": p}}, {}])
    text = "plugins: p: not installed; expected version 1; q: not installed; expected version 2. "
    assert str(caught.value).startswith(f"{tmp_path}: {text}")
