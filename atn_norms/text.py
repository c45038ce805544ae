"""Make any text safe to print: escape control characters, and characters that an encoding lacks."""

from __future__ import annotations

import codecs
import re

# C0 but for tab and line feed, DEL, C1, line and paragraph separators, and marks that reorder the text around them.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
PLAIN = {"\N{MINUS SIGN}": "-", "━": "=", "╌": "-", "─": "-", "…": "...", "\N{MULTIPLICATION SIGN}": "x"}
ENCODING_ERRORS = "atn_norms.plain"


def escape_controls(text: str) -> str:
    r"""Escape control characters as Python does, except tabs and line feeds.

    >>> print(escape_controls("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def encodable(text: str, encoding: str = "utf-8") -> str:
    r"""Replace characters that an encoding lacks: signs by their ASCII form, all others by escapes.

    UTF-8 lacks lone surrogates, which Python makes of the undecodable bytes of a file name.

    >>> encodable("\N{MINUS SIGN}1 \N{GREEK SMALL LETTER ALPHA}", "ascii")
    '-1 \\u03b1'
    """
    return text.encode(encoding, ENCODING_ERRORS).decode(encoding)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(PLAIN.get(each) or each.encode("unicode_escape").decode() for each in characters), error.end


codecs.register_error(ENCODING_ERRORS, _plain)
