"""Texts for language models: Python's language reference, a UTF-8 file, or a folder in the Penn Treebank layout."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

from atn_norms.errors import SpecError, nearest_file, short_repr
from atn_norms.files import read_regular

Unit = Literal["characters", "words"]
LARGEST = 2**30  # bytes of a text
PARTS = ("train", "valid", "test")
# A word is one ideograph or Hiragana sign, since these scripts have no spaces, or a run of other letters, marks and
# digits. A run of other signs includes their marks and joiners, as in an emoji.
WORDS = r"[\p{Han}\p{Hiragana}]\p{M}*|[\w\p{No}--\p{Han}--\p{Hiragana}]+|(?:[^\w\s\p{No}][\p{M}\p{Join_Control}]*)+|\n"
BETWEEN_SPACES = r"\S+|\n"
# `ptb.char` files have spaces between characters; `ptb` files have spaces between words.
LAYOUTS: dict[Unit, tuple[str, ...]] = {"characters": ("ptb.char", "ptb"), "words": ("ptb",)}


class Corpus(NamedTuple):
    """Tokens of a text in three splits; line ends are tokens."""

    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]


def read(path: str | None, unit: Unit, validation: float = 0.05, test: float = 0.05) -> Corpus:
    """Read a text as `characters` or `words`; None is Python's language reference.

    A text is split in reading order: training, then the shares of `validation` and `test`. Its words are runs of
    letters, marks and digits, runs of other signs, and line ends; an ideograph is a word. A folder has its own splits
    in files `ptb.train.txt`, `ptb.valid.txt` and `ptb.test.txt`, with words separated by spaces. For characters, files
    `ptb.char.*` with characters separated by spaces have precedence; of `ptb.*` files the spaces at both ends of a line
    are no characters.

    A file is read in the normal form NFC, so that an accent is part of its letter. LF, CRLF and CR are the same line
    end.

    >>> import pathlib
    >>> _ = pathlib.Path("words.txt").write_bytes("e\u0301tude हिन्दी\\r\\n".encode() * 20)
    >>> read("words.txt", "words").train[:3]
    ['étude', 'हिन्दी', '\\n']

    Errors: `SpecError` naming the file that cannot be read.
    """
    texts, layout = _texts(path, unit)
    if layout == "ptb.char":
        texts = ["\n".join("".join(line.split()) for line in text.split("\n")) for text in texts]
    if unit == "words":
        import regex  # supports the marks of every script, unlike re

        words = regex.compile(BETWEEN_SPACES if layout else WORDS, regex.VERSION1)
        tokens: list[Sequence[str]] = [words.findall(text) for text in texts]
    else:
        tokens = list(texts)
    if not layout:
        (whole,) = tokens
        late = Fraction(str(test))  # exact, as a decimal number is written
        first, second = (int(len(whole) * (1 - share)) for share in (late + Fraction(str(validation)), late))
        tokens = [whole[:first], whole[first:second], whole[second:]]
    return Corpus(*tokens)


def fingerprint(path: str | None, unit: Unit) -> str:
    """Return the hash of the text, `sha256:` and 64 digits; the hash of a folder covers its three files.

    For words, the hash includes the word rule, since another rule gives other tokens.
    """
    texts, layout = _texts(path, unit)
    if unit == "words" and not layout:
        texts = [f"{WORDS}\n{text}" for text in texts]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    one = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return f"sha256:{one}"


def _texts(path: str | None, unit: Unit) -> tuple[list[str], str]:
    """Return one text and no layout, or three texts and their layout."""
    if path is None:
        from pydoc_data.topics import topics

        return ["\n".join(topics[name] for name in sorted(topics))], ""
    folder = Path(path)
    if not folder.is_dir():
        return [_decoded(folder)], ""
    for layout in LAYOUTS[unit]:
        if (folder / f"{layout}.train.txt").exists():
            texts = [_decoded(folder / f"{layout}.{part}.txt") for part in PARTS]
            # The Treebank pads every line; padding that is easy to predict would flatter a score in characters by 1.6%.
            return [_stripped(text) for text in texts] if (layout, unit) == ("ptb", "characters") else texts, layout
    wanted = " or ".join(f"{layout}.train.txt" for layout in LAYOUTS[unit])
    raise SpecError("text", f"{path}, a folder without {wanted}", "a UTF-8 file, or a folder with that layout")


def _stripped(text: str) -> str:
    return "\n".join(line.strip(" ") for line in text.split("\n"))


def _decoded(path: Path) -> str:
    try:
        text = read_regular(path, LARGEST).decode("utf-8-sig")  # removes a byte order mark
        return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    except OSError as error:
        raise SpecError("text", f"{path} ({error.strerror})", "a readable file", nearest_file(path)) from error
    except UnicodeDecodeError as error:
        raise SpecError("text", f"{path}, not UTF-8 at byte {error.start}", "a UTF-8 file") from error
    except ValueError as error:  # for example a NUL character in the name
        raise SpecError("text", f"{short_repr(str(path))} ({error})", "a readable file") from error
