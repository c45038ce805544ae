"""The prose of the tree follows the language rules, and the linter finds what breaks them."""

import pytest

from tests import language


def test_no_prose_breaks_the_rules():
    found = [str(offence) for path in language.sources() for offence in language.offences(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("a.py", '"""What it does."""\n', "a docstring begins with a verb or a noun phrase"),
        ("a.py", "x = 1  # mend it\n", "use: fix"),
        ("a.py", "told = 1\n", "a variable names its contents"),
        ("a.py", "def f(said):\n    return said\n", "a parameter names its contents"),
        ("a.py", "def test_it_goes_on():\n    pass\n", "use: continue"),
        ("a.py", "def a_law_says_it():\n    pass\n", "use: report, state, return, print"),
        ("a.py", "def test_what_it_does():\n    pass\n", "a test is named by a statement"),
        ("a.md", "The layer says no.\n", "use: report, state, return, print"),
        ("a.md", " ".join(["word"] * 41) + ".\n", "a sentence of 41 words; at most 30"),
        ("a.md", "- A list.\n- " + " ".join(["word"] * 41) + ".\n", "a sentence of 41 words; at most 30"),
        ("a.c", "int x; /* dearer */\n", "use: slower, costlier"),
    ],
)
def test_an_offence_is_found(tmp_path, name, text, rule):
    path = tmp_path / name
    path.write_text(text)
    assert [offence.rule for offence in language.offences(path)] == [rule]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.md", "Names such as `said` are code.\n\n```text\nit says so\n```\n"), ("a.py", '"""Return the sum."""\n')],
)
def test_code_is_no_prose(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert not list(language.offences(path))
