"""The compatibility page has a row for each marked test."""

from tests.torch_api.features import GROUPS
from tests.torch_api.page import PAGE, rows, text


def test_the_page_is_generated_from_the_tests():
    assert PAGE.read_text(encoding="utf-8") == text(), "run python -m tests.torch_api.page"


def test_every_section_has_rows():
    assert [group for group, features in rows().items() if features] == list(GROUPS)
