"""The page of the laws is what the laws and the gallery say of themselves.

`python -m tests.testing.test_pages` writes the page.
"""

import re
from pathlib import Path

import pytest

from atn_norms.testing import GROUPS, LAWS, Law
from tests.testing.gallery import GALLERY

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"
START, END = "<!-- from the code: begin -->\n", "<!-- from the code: end -->\n"

ASKED = {
    "every": "Asked of every normalizer, window, cell and task, or of those that compute; a law says which.",
    "statistic": "Asked of a normalizer, of the statements that it makes.",
    "normalizer": "Asked of a normalizer.",
    "window": "Asked of a window.",
    "cell": "Asked of a cell.",
    "layer": "Asked of a normalizer, a window or a cell, in a layer whose other parts are built in.",
    "backend": "Asked of a backend, on every built-in case that it does not refuse.",
    "task": "Asked of a task.",
}


def rendered() -> str:
    """Everything on the page that follows from the code."""
    caught = len(GALLERY)  # `test_gallery` fails where one is not
    lines = [
        f"**{len(LAWS)} laws, {len(GALLERY)} wrong plugins; {caught} of them are caught by the law meant for them.**",
        "",
    ]
    for group, title in GROUPS.items():
        lines += [f"## {title}", "", ASKED[group], ""]
        for law in LAWS.values():
            if law.group == group:
                lines += described(law)
    return "\n".join(lines) + "\n"


def described(law: Law) -> list[str]:
    of = f" Asked of a {', a '.join(law.applies_to)}." if law.group == "every" else ""
    lines = [f"### `{law.name}`", "", f"{law.demand}{of}", "", law.why, "", "It catches, among others:", ""]
    wrong = [f"- {each.mistake}" for each in GALLERY.values() if each.law == law.name]
    return [*lines, *wrong, ""]


def parts() -> tuple[str, str, str]:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    inside, _, after = rest.partition(END)
    return before, inside, after


def test_the_page_is_what_the_code_says():
    assert parts()[1] == rendered(), "run `python -m tests.testing.test_pages` from the repository's root"


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_a_law_says_what_it_demands_and_why(law: Law):
    assert law.demand.endswith(".")
    assert len(law.why.split()) > 5
    assert law.why.endswith(".")


def test_every_law_has_an_entry_that_says_where_to_look():
    page = (PAGE.parent / "when-a-law-fails.md").read_text(encoding="utf-8")
    told = {}
    for section in page.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        told[title] = re.findall(r"^- (\*\*`.*?)(?=^- |\Z)", text, flags=re.M | re.S)
    assert list(told) == list(GROUPS.values())
    for group, title in GROUPS.items():
        entries = [re.findall(r"\*\*`(\w+)`\*\*", entry.partition(":")[0]) for entry in told[title]]
        assert [law for laws in entries for law in laws] == [law.name for law in LAWS.values() if law.group == group]
    advice = [entry.partition(":")[2] for entries in told.values() for entry in entries]
    assert all(len(words.split()) > 6 and words.strip().endswith(".") for words in advice)


def main() -> None:
    before, _, after = parts()
    PAGE.write_text(before + START + rendered() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
