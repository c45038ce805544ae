"""Compare docs/contract.md with the signatures and the version of the code."""

import inspect

import pytest

import atn_norms
from atn_norms.plugins import Hooks
from atn_norms.registry import FAMILIES
from tests.plugins.contract import BLOCK, PAGE, SUBJECTS, refreshed, signatures

TEXT = PAGE.read_text(encoding="utf-8")
SHOWN = {name: block for block, name in BLOCK.findall(TEXT)}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_signature_matches_the_code(subject):
    assert SHOWN[subject.__name__] == signatures(subject), "run `python -m tests.plugins.contract` to update the page"


def test_nothing_else_is_shown():
    assert sorted(SHOWN) == sorted(subject.__name__ for subject in SUBJECTS)
    assert refreshed(TEXT) == TEXT


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_member_is_explained_in_the_text(subject):
    """Each member name occurs in code marks in the text below the signatures."""
    words = BLOCK.sub("", TEXT)
    for line in signatures(subject).splitlines()[1:]:
        name = line.strip("* ").partition("(")[0].partition(":")[0]
        shown = (f"`{name}`", f"`{name}(", f"registry.{name}(")
        assert any(each in words for each in shown), f"{subject.__name__}.{name}"


def test_the_version_is_that_of_the_package():
    version = ".".join(atn_norms.__version__.split(".")[:2])
    assert f"This is the contract of atn-norms {version}" in TEXT


def test_every_family_has_its_registration_and_base_class():
    for family in FAMILIES:
        assert f"registry.{family}(" in TEXT


def test_a_changed_signature_is_detected():
    changed = signatures(Hooks).replace("registry: Registry", "registrar: Registry")
    assert changed != signatures(Hooks)
    assert refreshed(TEXT.replace(signatures(Hooks), changed)) == TEXT
    assert list(inspect.signature(Hooks.atn_norms_register).parameters) == ["self", "registry"]
