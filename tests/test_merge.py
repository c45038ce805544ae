"""Merging the records of one study that was trained in several folders."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atn_norms.ablation import merge, report
from atn_norms.ablation.report.csv_export import points_csv, results_csv
from atn_norms.ablation.report.findings import findings
from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.records import StudyRecord
from atn_norms.errors import SpecError
from tests.recorded import score, study

PENDING = {"status": "pending", "result": None, "curve": [], "run": None}


def in_order(record: StudyRecord) -> StudyRecord:
    """Return a record with its trials in the order of a study's folder."""
    return replace(record, trials=tuple(sorted(record.trials, key=lambda trial: trial.seed)))


def only(record: StudyRecord, seeds: set[int]) -> StudyRecord:
    """Return the study of these seeds alone."""
    trials = tuple(trial for trial in record.trials if trial.seed in seeds)
    return replace(record, trials=trials, study={**record.study, "seeds": sorted(seeds)})


def undone(record: StudyRecord, seeds: set[int]) -> StudyRecord:
    """Return the study with the trials of these seeds not yet trained."""
    trials = tuple(replace(trial, **PENDING) if trial.seed in seeds else trial for trial in record.trials)
    return replace(record, trials=trials)


whole = in_order(study(score, seeds=6))


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1), st.randoms())
def test_seeds_in_any_division_give_the_report_of_the_whole_study(groups: list[set[int]], shuffled: random.Random):
    missing = set(range(6)) - set().union(*groups)
    groups = [*groups, missing] if missing else groups
    shuffled.shuffle(groups)
    merged = merge({str(place): only(whole, seeds) for place, seeds in enumerate(groups)})
    if len(groups) > 1:
        assert merged == whole
    for table in (results_csv, points_csv):
        assert table(findings(merged)) == table(findings(whole))


def test_a_finished_trial_replaces_a_pending_one_in_either_order():
    started, rest = undone(whole, {3, 4, 5}), undone(whole, {0, 1, 2})
    assert merge({"a": started, "b": rest}) == merge({"b": rest, "a": started}) == whole


def test_seeds_that_do_not_begin_at_0_stay_a_list():
    assert merge({"a": only(whole, {1}), "b": only(whole, {4})}).study["seeds"] == [1, 4]


def test_one_record_is_returned_as_it_is():
    record = study(score)  # not in the order of seeds
    assert merge({"a": record}) is record


def test_two_results_of_one_trial_are_refused():
    other = study(lambda norm, window, seed: score(norm, window, seed) * (1 + 1e-9 * (seed == 2)))
    with pytest.raises(
        StoreError, match=r"two results of trial adding-none-1-25-2, seed 2: a has .*, b has .*0\.1782178219"
    ):
        merge({"a": whole, "b": other})


@pytest.mark.parametrize(
    ("change", "path", "got", "expected"),
    [
        ({"model": {"cell": "gru"}}, ("model", "cell"), "'gru'", "'lstm', as in a"),
        ({"model": {"cell": "lstm", "hidden_size": 8}}, ("model", "hidden_size"), "8", "nothing, as in a"),
        ({"margin": 1.5}, ("margin",), "1.5", "nothing, as in a"),
        (
            {"axes": {"norm": ["none"], "window": ["1", "25"]}},
            ("axes", "norm"),
            "['none']",
            "['none', 'layer', 'rms'], as in a",
        ),
    ],
)
def test_studies_that_differ_in_more_than_seeds_are_refused(change, path, got, expected):
    other = replace(whole, study={**whole.study, **change})
    with pytest.raises(SpecError) as caught:
        merge({"a": whole, "b": other})
    assert (caught.value.position, caught.value.got, caught.value.expected) == ("b", got, expected)
    assert caught.value.path == path


def test_name_seeds_and_level_may_differ():
    other = replace(whole, name="other", study={**whole.study, "name": "other", "reach": 0.1, "seeds": 6})
    assert merge({"a": whole, "b": other}) == whole


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        ({"data": {"text": "sha256:b"}}, r"window=1\.data\.text: got 'sha256:b'; expected nothing, as in a"),
        (
            {"plugins": {"p": {"version": "2", "source": "b"}}},
            r"window=1\.plugins\.p: got {'version': '2'.*expected nothing",
        ),
    ],
)
def test_other_data_and_plugins_are_refused(hashes, message):
    """Trials of other seeds have other identifiers, so these do not show the difference."""
    trials = tuple(replace(trial, trial={**trial.trial, **hashes}) for trial in only(whole, {1}).trials)
    with pytest.raises(SpecError, match=message):
        merge({"a": only(whole, {0}), "b": replace(only(whole, {1}), trials=trials)})


def trained(seeds: set[int], options: dict, published: Path | None = None) -> StudyRecord:
    """Return the study of some seeds whose trials have these options; as a published report reads it if published."""
    content = {"version": 2, "model": {"cell": "lstm"}, "task": {"kind": "text", "file": f"/home/{seeds}"}}
    content |= {"train": {"steps": 20, "keep": "last", "checkpoint_every": min(seeds) + 1}, "data": {"file": "ab"}}
    record = only(whole, seeds)
    trials = tuple(replace(each, trial={**content, "seed": each.seed, **options}) for each in record.trials)
    record = replace(record, trials=trials)
    if published is None:
        return record
    report.write(report.findings(record), published, formats=[])
    return report.read(published)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version: got 3; expected 2, as in a"),
        ({"model": {"cell": "gru"}}, "model.cell: got 'gru'; expected 'lstm', as in a"),
        ({"task": {"kind": "text", "length": 3}}, "task.length: got 3; expected nothing, as in a"),
        ({"train": {"steps": 30, "keep": "last"}}, "train.steps: got 30; expected 20, as in a"),
    ],
)
def test_other_settings_of_a_point_are_refused(options, message, tmp_path):
    """The study files are equal: a program of another version has other defaults."""
    place = "b: trials.task=adding, norm=none, window=1."
    with pytest.raises(SpecError, match=re.escape(place + message)):
        merge({"a": trained({0}, {}), "b": trained({1}, options)})
    with pytest.raises(SpecError, match=re.escape(f"{place}settings: got '") + r"\w{16}'; expected '\w{16}', as in a"):
        merge({"a": trained({0}, {}, tmp_path / "a"), "b": trained({1}, options)})


def test_equal_settings_are_merged_from_folders_and_published_reports(tmp_path):
    """The path of the data and the interval of checkpoints may differ."""
    parts = {"a": trained({0, 2}, {}), "b": trained({1}, {}, tmp_path / "b"), "c": trained({3}, {}, tmp_path / "c")}
    merged = merge(parts)
    assert len(merged.trials) == 4 * len(only(whole, {0}).trials)
    report.write(report.findings(merged), tmp_path / "merged", formats=[])
    again = merge({"d": trained({4}, {}), "merged": report.read(tmp_path / "merged")})
    with pytest.raises(SpecError, match="version: got 3; expected 2, as in again"):
        merge({"again": again, "e": trained({5}, {"version": 3})})


def test_a_report_that_was_published_without_settings_is_merged(tmp_path):
    old = only(whole, {0})
    hashed = (replace(trial, trial={**trial.trial, "data": {"file": "ab"}}) for trial in old.trials)
    old = replace(old, trials=tuple(hashed))  # without a model, as an old report is read
    report.write(report.findings(old), tmp_path / "old", formats=[])
    assert "settings" not in (tmp_path / "old" / "study.json").read_text()
    parts = {"old": report.read(tmp_path / "old"), "new": trained({1}, {}, tmp_path / "new"), "b": trained({2}, {})}
    assert merge(parts).study["seeds"] == 3
    with pytest.raises(SpecError, match="settings: got .*, as in new"):
        merge({**parts, "b": trained({2}, {"version": 3})})


@pytest.mark.parametrize("other", [0.2, {"adding": 0.2}])
def test_other_levels_are_refused_where_they_decide(other):
    """The order of the folders would select the level that the study declares."""
    declared = {"endpoint": {"adding": "steps"}, "reach": 0.1}
    first, second = (replace(each, study={**each.study, **declared}) for each in (only(whole, {0}), only(whole, {1})))
    assert merge({"a": first, "b": second}).study["reach"] == 0.1
    second = replace(second, study={**second.study, "reach": other})
    with pytest.raises(SpecError, match=re.escape("b: reach.adding: got 0.2; expected 0.1, as in a")):
        merge({"a": first, "b": second})


def test_two_trials_of_one_point_and_seed_are_refused():
    trials = tuple(replace(trial, id=f"other-{trial.id}") for trial in whole.trials)
    with pytest.raises(StoreError, match=r"two trials, adding-none-1-25-0 and other-adding-none-1-25-0, for .* seed 0"):
        merge({"a": whole, "b": replace(whole, trials=trials)})


def test_a_published_report_keeps_the_hashes_of_plugins_and_data(tmp_path):
    hashes = {"data": {"text": "sha256:b"}, "plugins": {"p": {"version": "2", "source": "b"}}}
    part = only(whole, {0})
    part = replace(part, trials=tuple(replace(trial, trial={**trial.trial, **hashes}) for trial in part.trials))
    report.write(report.findings(part), tmp_path / "published", formats=[])
    published = report.read(tmp_path / "published")
    assert all({key: trial.trial[key] for key in hashes} == hashes for trial in published.trials)
