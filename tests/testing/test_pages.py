"""The page of the laws follows from the docstrings of the laws and of the gallery.

`python -m tests.testing.test_pages` writes the page.
"""

import re
from pathlib import Path

import pytest

from atn_norms.testing import GROUPS, LAWS, Law
from tests.testing.gallery import GALLERY

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"
START, END = "<!-- from the code: begin -->\n", "<!-- from the code: end -->\n"

APPLIES = {
    "every": "These laws apply to several families; each law lists them.",
    "statistic": "These laws apply to the statistic of a normalizer.",
    "normalizer": "These laws apply to a normalizer.",
    "window": "These laws apply to a window.",
    "cell": "These laws apply to a cell.",
    "layer": "These laws apply to a normalizer, window or cell in a layer whose other parts are built in.",
    "backend": "These laws apply to a backend, on every built-in case that it supports.",
    "task": "These laws apply to a task.",
}


def rendered() -> str:
    """Return the part of the page that follows from the code."""
    caught = len(GALLERY)  # `test_gallery` fails if one is not caught
    lines = [
        f"**{len(LAWS)} laws, {len(GALLERY)} wrong plugins: {caught} of them fail the law meant for them.**",
        "",
    ]
    for group, title in GROUPS.items():
        lines += [f"## {title}", "", APPLIES[group], ""]
        for law in LAWS.values():
            if law.group == group:
                lines += described(law)
    return "\n".join(lines) + "\n"


def described(law: Law) -> list[str]:
    of = f" Applies to a {', a '.join(law.applies_to)}." if law.group == "every" else ""
    lines = [f"### `{law.name}`", "", f"{law.demand}{of}", "", law.why, "", "Mistakes that it detects:", ""]
    wrong = [f"- {each.mistake}" for each in GALLERY.values() if each.law == law.name]
    return [*lines, *wrong, ""]


def parts() -> tuple[str, str, str]:
    before, _, remainder = PAGE.read_text(encoding="utf-8").partition(START)
    inside, _, after = remainder.partition(END)
    return before, inside, after


def test_the_page_follows_from_the_code():
    assert parts()[1] == rendered(), "run `python -m tests.testing.test_pages` from the repository's root"


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_a_law_documents_its_requirement_and_reason(law: Law):
    assert law.demand.endswith(".")
    assert len(law.why.split()) > 5
    assert law.why.endswith(".")


def test_every_law_has_troubleshooting_advice():
    page = (PAGE.parent / "when-a-law-fails.md").read_text(encoding="utf-8")
    advice_by_group = {}
    for section in page.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        advice_by_group[title] = re.findall(r"^- (\*\*`.*?)(?=^- |\Z)", text, flags=re.M | re.S)
    assert list(advice_by_group) == list(GROUPS.values())
    for group, title in GROUPS.items():
        entries = [re.findall(r"\*\*`(\w+)`\*\*", entry.partition(":")[0]) for entry in advice_by_group[title]]
        assert [law for laws in entries for law in laws] == [law.name for law in LAWS.values() if law.group == group]
    advice = [entry.partition(":")[2] for entries in advice_by_group.values() for entry in entries]
    assert all(len(words.split()) > 6 and words.strip().endswith(".") for words in advice)


def main() -> None:
    before, _, after = parts()
    PAGE.write_text(before + START + rendered() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
