"""Find prose that breaks the language rules of CONTRIBUTING.md: `python -m tests.language [PATH ...]`.

Prose is: docstrings, comments and string literals of Python files, text outside code blocks of Markdown files, and
comments of C files. Code, names in backticks and results of studies are not prose.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("atn_norms", "plugins", "tests", "docs")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "conftest.py", "setup.py", "noxfile.py")
SUFFIXES = {".py", ".md", ".c", ".h", ".txt"}
LONGEST = 30  # words of a sentence in a page; CONTRIBUTING.md asks for 25, this is where the test fails

# pattern: replacement to consider
WORDS = {
    r"anew": "again",
    r"mend(?:s|ed|ing)?": "fix",
    r"dearer|dear": "slower, costlier",
    r"kin": "similar",
    r"whoever": "the process that, any user who",
    r"some(?:body|one)(?:'s| else(?:'s)?)?": "another user, another package",
    r"nobody": "no user, no process",
    r"of (?:its|their) own": "own, another",
    r"liv(?:es|ed) in": "is in",
    r"a house": "a place",
    r"go(?:es)? on(?! (?:to|the))|going on": "continue",
    r"com(?:es|e) of (?:it|this|that)": "results",
    r"st(?:ands?|ood) in(?: the place)? (?:for|of)": "replaces",
    r"(?:is|are) taken for": "counts as",
    r"lie(?:s)? beside": "is next to",
    r"worth a look": "note",
    r"say|says|said|saying": "report, state, return, print",
    r"tell|tells|told|telling": "report, print, show",
    r"ask|asks|asked|asking": "require, request, call",
    r"hear|hears|heard": "receive",
    r"promise|promises|promised": "guarantee, declare",
    r"stranger(?:s|'s)?": "third party",
    r"in words": "with a message",
    r"on purpose": "intentionally",
}
BANNED = re.compile(
    r"(?<![\w'`-])(?:" + "|".join(f"(?P<w{n}>{pattern})" for n, pattern in enumerate(WORDS)) + r")(?![\w'`-])", re.I
)
OPENINGS = re.compile(r"\s*(What|Whether|How|Who|Why)\b")
NAMES = {"said", "asked", "told", "heard", "whoever"}
CODE = re.compile(r"``.+?``|`[^`]*`", re.S)
LINK = re.compile(r"\]\([^)]*\)|https?://\S+|<!--.*?-->|\$\$.*?\$\$", re.S)
FORMULA = re.compile(r"\$[^$\n]+\$")


class Offence(NamedTuple):
    """A line that breaks a rule."""

    path: Path
    line: int
    text: str
    rule: str

    def __str__(self) -> str:
        name = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{name}:{self.line}: {self.text!r}: {self.rule}"


def sources() -> list[Path]:
    """Every file whose prose is checked."""
    found = [ROOT / name for name in FILES if (ROOT / name).exists()]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = any(
                part.startswith((".", "_build")) or part in ("build", "results")
                for part in path.relative_to(ROOT).parts
            )
            if path.suffix in SUFFIXES and path.is_file() and not hidden and "egg-info" not in str(path):
                found.append(path)
    linter = {Path(__file__), Path(__file__).with_name("test_language.py")}
    return [path for path in found if path not in linter]


def offences(path: Path) -> Iterator[Offence]:
    """Every offence of one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(path, text)
    elif path.suffix == ".md":
        yield from _markdown(path, text)
    elif path.suffix in (".c", ".h"):
        for comment in re.finditer(r"/\*.*?\*/|//[^\n]*", text, re.S):
            yield from _words(path, text.count("\n", 0, comment.start()) + 1, comment[0])
    elif path.name.endswith(".py.txt"):
        for number, line in enumerate(text.splitlines(), 1):
            yield from _words(path, number, line)


def _python(path: Path, text: str) -> Iterator[Offence]:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and (opening := OPENINGS.match(docstring)):
                line = node.body[0].lineno
                yield Offence(path, line, opening[1], "a docstring begins with a verb or a noun phrase")
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NAMES:
            yield Offence(path, node.lineno, node.id, "a variable names its contents")
        if isinstance(node, ast.arg) and node.arg in NAMES:
            yield Offence(path, node.lineno, node.arg, "a parameter names its contents")
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name.removeprefix("test_").replace("_", " ").strip()
            yield from _words(path, node.lineno, name)
            if node.name.startswith("test_") and (opening := OPENINGS.match(name.capitalize())):
                yield Offence(path, node.lineno, opening[1], "a test is named by a statement")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from _words(path, token.start[0], token.string)


def _markdown(path: Path, text: str) -> Iterator[Offence]:
    blank = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.S | re.M)
    for number, line in enumerate(blank.splitlines(), 1):
        yield from _words(path, number, line)
    for paragraph in re.finditer(r"(?:^(?![#|>\s]).+\n?(?:^ +\S.*\n?)*)+", blank, re.M):
        plain = FORMULA.sub("x", LINK.sub("", CODE.sub("x", paragraph[0])))
        for sentence in re.split(r"(?<=[.!?:])\s+|^ *(?:[-*]|\d+\.) ", plain, flags=re.M):
            words = sum(re.search(r"\w", word) is not None for word in sentence.split())
            if words > LONGEST:
                line = blank.count("\n", 0, paragraph.start()) + 1
                yield Offence(path, line, sentence[:50], f"a sentence of {words} words; at most {LONGEST}")


def _words(path: Path, line: int, text: str) -> Iterator[Offence]:
    plain = LINK.sub("", CODE.sub(lambda code: " " * 1 + "\n" * code[0].count("\n"), text))
    for match in BANNED.finditer(plain):
        number = int(str(match.lastgroup)[1:])
        yield Offence(
            path, line + plain.count("\n", 0, match.start()), match[0], f"use: {list(WORDS.values())[number]}"
        )


def main(names: list[str]) -> int:
    """Print every offence of the named files and folders (by default all); return how many there are."""
    wanted = [Path(name).resolve() for name in names]
    chosen = [path for path in sources() if not wanted or any(path.is_relative_to(name) for name in wanted)]
    every = [offence for path in chosen for offence in offences(path)]
    print("\n".join(map(str, every)))
    print(f"{len(every)} offences in {len({offence.path for offence in every})} of {len(chosen)} files")
    return len(every)


if __name__ == "__main__":
    raise SystemExit(bool(main(sys.argv[1:])))
