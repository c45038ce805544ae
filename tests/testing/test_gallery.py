"""Every wrong subject is caught by the law meant for it, and every law catches one subject."""

import pytest

from atn_norms.backends.native.library import unavailable
from atn_norms.testing import LAWS
from atn_norms.testing.checks import law_runs
from tests.testing.gallery import GALLERY, Wrong


def results_of(wrong: Wrong, only: str | None = None):
    if wrong.name == "DeclaresOtherMoments" and unavailable():
        pytest.skip("the kernels that would compute its moments are not compiled")
    with wrong.around():
        runs = law_runs(wrong.family, wrong.make())
        return {each.law.name: each.result({}) for each in runs if only in (None, each.law.name)}


@pytest.mark.parametrize("wrong", GALLERY.values(), ids=lambda wrong: f"{wrong.family}-{wrong.name}")
def test_a_wrong_subject_is_caught_by_the_law_meant_for_it(wrong: Wrong):
    result = results_of(wrong, wrong.law)[wrong.law]
    assert result.status == "failed", f"{wrong.mistake} {wrong.law}: {result.status}: {result.message}"
    assert result.message
    assert result.example


def test_every_law_catches_a_wrong_subject():
    assert {wrong.law for wrong in GALLERY.values()} == set(LAWS)


def test_every_mistake_has_a_description():
    mistakes = [wrong.mistake for wrong in GALLERY.values()]
    assert all(len(mistake.split()) > 3 and mistake.endswith(".") for mistake in mistakes)
    assert len(set(mistakes)) == len(mistakes)


@pytest.mark.deep
@pytest.mark.parametrize("wrong", list(GALLERY.values())[::3], ids=lambda wrong: f"{wrong.family}-{wrong.name}")
def test_a_wrong_subject_breaks_the_laws_and_not_the_suite(wrong: Wrong):
    """Every other law returns a result for it too."""
    results = results_of(wrong)
    assert results[wrong.law].status == "failed"
    assert {result.status for result in results.values()} <= {"passed", "failed", "skipped"}
