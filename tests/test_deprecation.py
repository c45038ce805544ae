"""Old public names work for one minor version, and each use warns with the replacement."""

import importlib
import inspect
import sys

import pytest
import torch

import atn_norms as an
from atn_norms import pytree
from atn_norms.testing import check_normalizer
from atn_norms.testing.law import LAWS, RENAMED


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("trees", "hold", "pytree.where_mask"),
        ("trees", "rows", "pytree.expand_mask"),
        ("trees", "Tree", "pytree.Tree"),
        ("problems", "shown", "errors.short_repr"),
        ("problems", "SpecError", "errors.SpecError"),
    ],
)
def test_a_renamed_module_forwards_its_names(module, old, new):
    sys.modules.pop(f"atn_norms.{module}", None)
    with pytest.warns(DeprecationWarning, match=rf"atn_norms\.{module}\.{old} is deprecated; use atn_norms\.{new}"):
        value = getattr(importlib.import_module(f"atn_norms.{module}"), old)
    target, _, name = new.rpartition(".")
    assert value is getattr(importlib.import_module(f"atn_norms.{target}"), name)


def test_a_renamed_module_rejects_unknown_names():
    with pytest.raises(AttributeError, match=r"module 'atn_norms\.trees' has no attribute 'hould'"):
        importlib.import_module("atn_norms.trees").hould  # noqa: B018


def test_a_normalizer_may_declare_old_names():
    with pytest.warns(DeprecationWarning, match=r"Old\.(order_free|refuses) is deprecated; use \w+") as caught:

        class Old(an.LayerNorm):
            order_free = False

            def refuses(self, window):
                return "none fits"

    assert len(caught) == 2 and all(warning.filename == __file__ for warning in caught)
    norm = Old(4)
    assert norm.permutation_equivariant is False
    assert norm.unsupported_reason(an.Sliding(1)) == "none fits"
    with pytest.warns(DeprecationWarning, match=r"Old\.order_free is deprecated; use permutation_equivariant"):
        assert norm.order_free is False
    with pytest.raises(ValueError, match="none fits"):
        an.AssortedTime(norm, window=2)


def test_a_window_may_declare_old_names():
    with pytest.warns(DeprecationWarning, match=r"Uneven\.counts_alike is deprecated; use uniform_weights"):

        class Uneven(an.Sliding):
            counts_alike = False

    assert Uneven(2).uniform_weights is False
    with pytest.warns(DeprecationWarning, match="counts_alike"):
        assert an.Sliding(2).counts_alike is True


def test_current_names_do_not_warn(recwarn):
    pytree.where_mask(torch.tensor([True]), (torch.ones(1),), (torch.zeros(1),))
    assert an.LayerNorm(3).permutation_equivariant and an.Sliding(2).uniform_weights
    assert not [warning for warning in recwarn if warning.category is DeprecationWarning]


def test_reading_every_attribute_does_not_warn(recwarn):
    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = an.LayerNorm(3)

        def forward(self, x):
            return self.norm.normalize(x, self.norm.measure(x))

    inspect.getmembers(an.LayerNorm(3))
    inspect.getmembers(an.Sliding(2))
    torch.jit.trace(Traced(), torch.zeros(2, 3))
    assert not [str(warning.message) for warning in recwarn if "is deprecated; use " in str(warning.message)]


def test_the_conformance_suite_uses_no_old_name(recwarn):
    check_normalizer("rms")
    assert not [str(warning.message) for warning in recwarn if "is deprecated; use " in str(warning.message)]


def test_an_expected_failure_may_have_the_old_name_of_a_law():
    old, new = "the_pooled_statement_is_used", "the_pooled_statistic_is_used"
    with pytest.warns(DeprecationWarning, match=f"law {old} is deprecated; use {new}") as caught:
        results = check_normalizer("rms", expected_failures={old: "an example"})
    assert [warning.filename for warning in caught] == [__file__]
    (message,) = [result.message for result in results if result.law == new]
    assert message == "expected to fail (an example), but it passes: remove it from the expected failures"


def test_old_names_of_laws_have_a_present_law():
    import atn_norms.testing.laws  # noqa: F401

    assert set(RENAMED.values()) <= set(LAWS) and not set(RENAMED) & set(LAWS)
