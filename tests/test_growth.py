"""Extend a study by seeds, axes or another baseline; finished trials are reused."""

import json

import pytest

from atn_norms.ablation import StudySpec, create, load, make_plan, run
from atn_norms.ablation.store.files import Folder
from atn_norms.errors import SpecError

STUDY = {
    "name": "growing",
    "model": {"cell": "rnn", "hidden_size": 3},
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 3, "batch_size": 5},
    "axes": {"norm": ["none", "layer"]},
    "seeds": 1,
}
GROWN = {
    "more seeds": {"seeds": 3},
    "another value on an axis": {"axes": {"norm": ["none", "rms", "layer"]}},
    "another axis": {"axes": {"norm": ["none", "layer"], "window": [1, 2]}},
    "an axis that was fixed": {"axes": {"norm": ["none", "layer"], "cell": ["gru", "rnn"]}},
    "another task": {"task": None, "tasks": [STUDY["task"], {**STUDY["task"], "length": 5}]},
    "another baseline": {"baseline": {"norm": "layer"}},
}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("result.json")}


@pytest.mark.parametrize("how", GROWN)
def test_finished_trials_are_reused(tmp_path, how):
    folder = create(STUDY, tmp_path / "study")
    run(folder, workers=0)
    done, created = files(folder), (folder / "environment.json").read_bytes()
    assert create({**STUDY, **GROWN[how]}, folder) == folder
    record = load(folder)
    wanted = make_plan(StudySpec.model_validate({**STUDY, **GROWN[how]}))
    assert [trial.id for trial in record.trials] == [trial.id for trial in wanted.trials]
    assert record.count("done") == 2 and record.count("pending") == len(wanted.trials) - 2
    assert record.baseline == wanted.baseline and (folder / "environment.json").read_bytes() == created
    attempts = {trial.id: trial.run["attempts"] for trial in run(folder, workers=0).trials if trial.run}
    assert set(attempts.values()) == {1} and len(attempts) == len(wanted.trials)
    assert files(folder).items() >= done.items()


def test_a_study_that_lacks_a_trial_does_not_replace_another(tmp_path):
    folder = create({**STUDY, "seeds": 2}, tmp_path / "study")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for smaller, lacking in [({}, 2), ({"seeds": [1, 2, 3]}, 2), ({"train": {"steps": 4, "batch_size": 5}}, 4)]:
        message = f"got study .* with {lacking} trials that this study lacks; .*Choose another folder"
        if smaller == {}:
            message = f"got a study with all 2 trials of this study and 2 more; .*: atn-norms resume {folder}"
        with pytest.raises(SpecError, match=message):
            create({**STUDY, **smaller}, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_killed_extension_leaves_the_previous_study(tmp_path, monkeypatch):
    folder = create(STUDY, tmp_path / "study")
    run(folder, workers=0)
    writes = []
    write_json = Folder.write_json

    def killed(folder, name, value):
        writes.append(name)
        if name == "study.resolved.json":
            raise KeyboardInterrupt
        write_json(folder, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            create({**STUDY, "seeds": 2}, folder)
    assert writes, "it had begun"
    assert len(load(folder).trials) == 2 and load(folder).count("done") == 2
    create({**STUDY, "seeds": 2}, folder)
    assert load(folder).count("done") == 2 and load(folder).count("pending") == 2


def test_an_extended_study_keeps_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, other = create(STUDY), create({**STUDY, "train": {"steps": 5, "batch_size": 5}})
    assert small != other and small.name.startswith("growing-")
    assert create({**STUDY, "seeds": 2}) == small
    assert create({**STUDY, "seeds": 2}) == small, "and finds itself there"
    assert create({**STUDY, "seeds": 3, "name": "elsewhere"}).name.startswith("elsewhere-")
    (tmp_path / "studies" / "growing-00000000").mkdir()
    (tmp_path / "studies" / "growing-11111111").mkdir()
    (tmp_path / "studies" / "growing-11111111" / "study.resolved.json").write_text(json.dumps({"key": 3}))
    assert create({**STUDY, "seeds": 3}) == small, "what is damaged is passed by"
