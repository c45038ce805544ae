"""Merging the records of one study that was trained in several folders."""

import random
from dataclasses import replace

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
