"""Edits of a study file between values that Python calls equal, such as 1 and true."""

from pathlib import Path

import pytest

from atn_norms import ablation
from atn_norms.ablation.grid.changes import changed_options
from atn_norms.ablation.store.merge import differences, first_difference
from atn_norms.errors import SpecError
from atn_norms.specs import read

STUDY = """\
task: {kind: python, file: mine.py, arguments: {flag: true, n: 1}}
axes: {x: [0, 1]}
seeds: 1
margin: 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def train(x, flag, n): return x + n + (flag is True)\n")
    Path("study.yaml").write_text(STUDY)
    return ablation.create(read("study.yaml")[0], "study")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (("flag: true", "flag: 1"), "task.arguments.flag: got 1; expected True"),
        (("flag: true", "flag: 1.0"), "task.arguments.flag: got 1.0; expected True"),
        ((", n: 1", ", n: 1.0"), "task.arguments.n: got 1.0; expected 1"),
        ((", n: 1", ", n: true"), "task.arguments.n: got True; expected 1"),
        (("[0, 1]", "[0, true]"), r"axes.x: got \[0, True\]; expected 1 among them"),
        (("[0, 1]", "[0.0, 1]"), r"axes.x: got \[0.0, 1\]; expected 0 among them"),
    ],
)
def test_resume_reports_an_edit_between_equal_values_of_other_types(edit, problem, folder):
    file = folder / "study.yaml"
    file.write_text(file.read_text().replace(*edit))
    assert edit[1] in file.read_text()
    with pytest.raises(SpecError, match=problem):
        ablation.resume(folder, workers=0)


def test_an_edit_of_the_notation_of_a_number_that_changes_no_trial_is_no_edit(folder):
    file = folder / "study.yaml"
    file.write_text(file.read_text().replace("margin: 1.0", "margin: 1"))
    assert ablation.resume(folder, workers=0).count("done") == 2


@pytest.mark.parametrize(("mine", "theirs"), [(1, True), (1, 1.0), (0.0, False), ([1], [1.0]), ({"a": 1}, {"a": True})])
def test_values_of_other_types_differ(mine, theirs):
    assert differences({"x": mine}, {"x": theirs}) and first_difference({"x": mine}, {"x": theirs})
    assert not differences({"x": mine}, {"x": mine})


def test_an_axis_that_lacks_a_value_of_another_type_is_named():
    (problem,) = changed_options({"axes": {"x": [0, True]}}, {"axes": {"x": [0, 1]}})
    assert problem.path == ("axes", "x") and problem.expected == "1 among them"
