"""Read YAML, JSON and TOML texts: their values, and the position of each."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from typing import Any

from atn_norms.errors import brief, dotted, short_repr

Position = tuple[int, int]  # line and column, from 1
Locate = Callable[[tuple[Any, ...]], Position | None]
MOST_VALUES = 100_000  # values of a file; an alias counts as many values as it repeats
MOST_WRITTEN = 10_000  # values of a YAML text: ruamel.yaml reads about as many in a second
DEEPEST = 100  # levels, so that code may walk through data recursively
LONGEST = 300  # characters of a tag, and of a message
MOST_DIGITS = 50  # digits of an integer, so that arithmetic on options does not overflow


class Misplaced(Exception):
    """An error in a text, and its position."""

    def __init__(self, message: str, position: Position | None) -> None:
        self.position = position
        super().__init__(message)


_HINTS = {  # words of the parser -> a common cause
    "expected <block end>": "Entries of one mapping or list start in one column",
    "could not find expected ':'": "A key needs a colon and a blank: `key: value`",
    "sequence entries are not allowed here": "A list starts on its own line, or is written [a, b]",
    "mapping values are not allowed here": "Keys of a mapping start in one column, and text with `: ` needs quotes",
    "'\\t' that cannot start any token": "YAML indents with blanks",
}


def position_of(text: str, index: int) -> Position:
    """Return the line and column of an index into a text."""
    line_start = text.rfind("\n", 0, index) + 1
    return text.count("\n", 0, index) + 1, index - line_start + 1


def read_yaml(text: str) -> tuple[Any, Locate]:
    """Read YAML 1.2 without custom tags; errors are `Misplaced`."""
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    yaml = _yaml()
    try:
        node = yaml.compose(text)
        if node is not None:
            _count(node, (), {})  # before any value is constructed: a merge (<<) repeats its mapping too
        data = None if node is None else yaml.constructor.construct_document(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(str(error.problem or error.context).split())
        message = f"{error.context}, {message}" if message.startswith("but ") else message
        message += next((f". {hint}" for words, hint in _HINTS.items() if words in message), "")
        raise Misplaced(brief(message, LONGEST), mark and (mark.line + 1, mark.column + 1)) from None
    except ReaderError as error:
        position = position_of(text, error.position) if isinstance(error.position, int) else None
        character = error.character if isinstance(error.character, str) else chr(error.character)
        raise Misplaced(f"got the character {character!a}; YAML does not allow it", position) from None
    return data, lambda path: _yamlposition_of(node, path)


def _yaml() -> Any:
    """Return a reader of YAML that checks the limits while it reads; every error has a position."""
    from ruamel.yaml import YAML
    from ruamel.yaml.composer import Composer
    from ruamel.yaml.constructor import SafeConstructor
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.scanner import Scanner

    class Short(Scanner):
        def scan_tag_uri(self, name: Any, start_mark: Any) -> Any:  # reads a long one in quadratic time
            if not any(self.reader.peek(ahead) in " \r\n\0" for ahead in range(LONGEST + 1)):
                message = f"got a tag of over {LONGEST} characters; expected at most {LONGEST}"
                raise Misplaced(message, (start_mark.line + 1, start_mark.column + 1))
            return super().scan_tag_uri(name, start_mark)

    class Limited(Composer):
        count = level = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.count += 1
            self.level += 1
            mark = self.parser.peek_event().start_mark
            position = mark.line + 1, mark.column + 1
            if self.count > MOST_WRITTEN:
                message = f"got more than {MOST_WRITTEN} values in one text; expected at most {MOST_WRITTEN}"
                raise Misplaced(message, position)
            if self.level > DEEPEST + 1:
                raise Misplaced(f"nested too deeply; expected at most {DEEPEST} levels", position)
            node = super().compose_node(parent, index)
            self.level -= 1
            return node

    class Located(SafeConstructor):
        def check_mapping_key(self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any) -> bool:
            if key in mapping:
                position = key_node.start_mark.line + 1, key_node.start_mark.column + 1
                raise Misplaced(f"got the key {short_repr(str(key))} twice; expected it once", position)
            return True

        def construct_non_recursive_object(self, node: Any, tag: Any = None) -> Any:
            try:
                return super().construct_non_recursive_object(node, tag)
            except (YAMLError, Misplaced):
                raise
            except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
                kind = str(node.tag).rpartition(":")[2]
                message = f"got {short_repr(node.value)}; expected a valid {kind}"
                reason = f" ({error})" if type(error) is ValueError and kind == "timestamp" else ""
                position = node.start_mark.line + 1, node.start_mark.column + 1
                raise Misplaced(message + reason, position) from None

    yaml = YAML(typ="safe", pure=True)
    yaml.Scanner, yaml.Composer, yaml.Constructor = Short, Limited, Located
    return yaml


def _count(node: Any, above: tuple[int, ...], counted: dict[int, int]) -> int:
    """Count the values of a node with all aliases expanded; raise an error for endless, too many or too deep values."""
    position = node.start_mark.line + 1, node.start_mark.column + 1
    if id(node) in above:
        raise Misplaced("got an alias (*name) inside the value that it names; expected a finite value", position)
    if len(above) >= DEEPEST and node.id != "scalar":
        raise Misplaced(f"nested too deeply; expected at most {DEEPEST} levels", position)
    if id(node) not in counted:
        parts = [part for pair in node.value for part in pair] if node.id == "mapping" else node.value
        below = (*above, id(node))
        total = 1 if node.id == "scalar" else 1 + sum(_count(part, below, counted) for part in parts)
        if total > MOST_VALUES:
            message = f"got {total} values with every alias (*name) written out; expected at most {MOST_VALUES}"
            raise Misplaced(message, position)
        counted[id(node)] = total
    return counted[id(node)]


def _yamlposition_of(node: Any, path: tuple[Any, ...]) -> Position | None:
    mark = node.start_mark
    for step in path:
        below = _yaml_below(node, step)
        if below is None:
            break
        mark, node = below
    return mark.line + 1, mark.column + 1


def _yaml_below(node: Any, step: Any) -> tuple[Any, Any] | None:
    if node.id == "sequence" and isinstance(step, int) and step < len(node.value):
        return node.value[step].start_mark, node.value[step]
    if node.id == "mapping":
        for key, value in node.value:  # construction has added the entries of a merge (<<)
            if key.value == str(step):
                return key.start_mark, value
    return None


def read_json(text: str) -> tuple[Any, Locate]:
    """Read JSON with finite numbers and unique keys; errors are `Misplaced`."""

    def integer(digits: str) -> int:
        if len(digits) > MOST_DIGITS + 1:
            message = f"got an integer of {len(digits.lstrip('-'))} digits; expected at most {MOST_DIGITS} digits"
            raise Misplaced(message, position_of(text, text.index(digits)))
        return int(digits)

    def reject_constant(name: str) -> None:
        word = re.search(rf"(?<![\w\"]){re.escape(name)}", text)
        raise Misplaced(f"got {name}; expected a finite number", word and position_of(text, word.start()))

    try:
        data = json.loads(text, parse_constant=reject_constant, parse_int=integer)
    except json.JSONDecodeError as error:
        raise Misplaced(error.msg[:1].lower() + error.msg[1:], (error.lineno, error.colno)) from None
    except RecursionError:
        _json_starts(text)  # raises with the position
        raise
    starts = _json_starts(text)

    def locate(path: tuple[Any, ...]) -> Position:
        while path not in starts:
            path = path[:-1]
        return position_of(text, starts[path])

    return data, locate


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]|[^][{}:,"\s]+')


def _json_starts(text: str) -> dict[tuple[Any, ...], int]:
    """Return the start of each key and item of a JSON text; raise an error for duplicate keys."""
    starts: dict[tuple[Any, ...], int] = {}
    path: list[Any] = []  # the step into each open container: an index, or a key, or None before the first key
    expects_key = False
    for token in _JSON_TOKEN.finditer(text):
        kind = token.group()
        if kind in "}]":
            path.pop()
            expects_key = False
        elif kind == ",":
            expects_key = not isinstance(path[-1], int)
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
        elif expects_key:
            path[-1] = json.loads(kind)
            if tuple(path) in starts:
                message = f"got the key {short_repr(dotted(path))} twice; expected it once"
                raise Misplaced(message, position_of(text, token.start()))
            starts[tuple(path)] = token.start()
            expects_key = False
        elif kind != ":":
            starts.setdefault(tuple(path), token.start())
            if kind in "{[":
                if len(path) >= DEEPEST:
                    message = f"nested too deeply; expected at most {DEEPEST} levels"
                    raise Misplaced(message, position_of(text, token.start()))
                expects_key = kind == "{"
                path.append(None if expects_key else 0)
    return starts


_KEY = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
# A dotted key of more parts than levels: tomllib reads it in quadratic time. It follows a line end, a brace or a comma.
_LONG_KEY = re.compile(rf"(?:^|[{{,])[ \t\[]*+({_KEY}(?:[ \t]*+\.[ \t]*+{_KEY}){{{DEEPEST}}})", re.MULTILINE)


def read_toml(text: str) -> tuple[Any, Locate]:
    """Read TOML; positions of values are not known. Errors are `Misplaced`."""
    if deep := _LONG_KEY.search(text):
        raise Misplaced(f"nested too deeply; expected at most {DEEPEST} levels", position_of(text, deep.start(1)))
    try:
        return tomllib.loads(text), lambda path: None
    except tomllib.TOMLDecodeError as error:
        match = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        message = str(error)[: match.start()] if match else str(error)
        position = (int(match[1]), int(match[2])) if match else None
        raise Misplaced(message[:1].lower() + message[1:], position) from None
    except ValueError:  # Python does not parse an integer of thousands of digits
        digits = re.search(rf"\d[\d_]{{{MOST_DIGITS},}}", text)
        if digits is None:
            raise
        message = f"got an integer of {len(digits[0].replace('_', ''))} digits; expected at most {MOST_DIGITS} digits"
        raise Misplaced(message, position_of(text, digits.start())) from None


READERS: dict[str, Callable[[str], tuple[Any, Locate]]] = {
    ".yaml": read_yaml,
    ".yml": read_yaml,
    ".json": read_json,
    ".toml": read_toml,
}
