"""Read specifications from files and mappings, validate them and build layers; errors name file, line and column."""

from __future__ import annotations

import io
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from atn_norms.errors import Problem, SpecError, dotted, nearest_file, short_repr, to_spec_error, unknown
from atn_norms.files import read_regular

if TYPE_CHECKING:
    import torch

    from atn_norms.layers import LayerSpec, Recurrent

Where = Callable[[tuple[Any, ...]], str]
Position = tuple[int, int]  # line and column, from 1
Locate = Callable[[tuple[Any, ...]], Position | None]
Model = TypeVar("Model", bound=BaseModel)
LARGEST = 1_000_000  # bytes of a file
MOST_VALUES = 100_000  # of a file, each counted as often as aliases repeat it
MOST_WRITTEN = 10_000  # values of a YAML text: ruamel.yaml reads about as many in a second
DEEPEST = 100  # levels: all that walks through data may do so recursively
MOST_DIGITS = 50  # of an integer, so that arithmetic on options does not overflow


def build(
    source: Mapping[str, Any] | str | os.PathLike[str] | LayerSpec,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Recurrent:
    """Build a layer from a mapping, a YAML, JSON or TOML file, or a `LayerSpec`.

    Errors: `SpecError` (a `ValueError`) with path, value, expected and nearest value, and the position
    `file:line:column` where the source is a file (TOML: the file).

    >>> layer = build({"cell": "gru", "input_size": 2, "hidden_size": 3, "norm": "layer", "window": 5})
    >>> layer.hidden_size
    3
    >>> build({"cell": "gru", "input_size": 2, "hidden_sise": 3})
    Traceback (most recent call last):
    ...
    atn_norms.errors.SpecError: hidden_sise: got an unknown key; expected one of ...; did you mean 'hidden_size'?
    hidden_size: got nothing; expected a value
    """
    from atn_norms.layers import LayerSpec

    if isinstance(source, LayerSpec):
        return source.build(device=device, dtype=dtype)
    if isinstance(source, Mapping):
        return validate(LayerSpec, source).build(device=device, dtype=dtype)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source: got {type(source).__name__} {short_repr(source)}; expected a mapping, a path or a LayerSpec"
        )
    data, where = read(source)
    spec = validate(LayerSpec, data, where)
    try:
        return spec.build(device=device, dtype=dtype)
    except ValueError as error:  # found only while building, such as a size too large
        problems = error.problems if isinstance(error, SpecError) else [Problem(detail=str(error))]
        raise SpecError.of(replace(problem, position=os.fspath(source)) for problem in problems) from error


def validate(model_class: type[Model], data: Any, where: Where | None = None) -> Model:
    """Validate a mapping as a model of options; `where` (from `read`) places the errors in their file.

    >>> from atn_norms.registry import Options
    >>> class Blur(Options):
    ...     size: int
    >>> validate(Blur, {"size": "3"}, lambda path: "blur.yaml:1:1")
    Traceback (most recent call last):
    ...
    atn_norms.errors.SpecError: blur.yaml:1:1: size: got '3'; expected an integer
    """
    _refuse_impossible(data, where)
    try:
        return model_class.model_validate(data)
    except ValidationError as error:
        raise to_spec_error(error, where, data) from None  # pydantic's own text would repeat it


def _refuse_impossible(data: Any, where: Where | None) -> None:
    problem = _impossible(data)
    if problem is not None:
        position = where(problem.path) if where is not None else ""
        raise SpecError.of([replace(problem, position=position)])


def _impossible(data: Any) -> Problem | None:
    """Find the first value that no option can have; None where there is none."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    count = 0
    while waiting:
        path, value = waiting.pop()
        count += len(value) if isinstance(value, Mapping | list | tuple) else 0
        if count > MOST_VALUES:
            return Problem((), f"more than {MOST_VALUES} values", f"at most {MOST_VALUES}")
        if len(path) > DEEPEST:
            return Problem(path[:DEEPEST], "a value nested too deeply", f"at most {DEEPEST} levels")
        if isinstance(value, Mapping):
            waiting += [((*path, key), each) for key, each in reversed(list(value.items()))]
            waiting += [(path, key) for key in value if isinstance(key, str)]
        elif isinstance(value, list | tuple):
            waiting += [((*path, index), each) for index, each in reversed(list(enumerate(value)))]
        elif isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            return Problem(path, f"an integer of more than {MOST_DIGITS} digits", f"at most {MOST_DIGITS} digits")
        elif isinstance(value, str) and not _is_unicode(value):
            return Problem(path, f"{value[:40]!a}", "text without lone surrogates")
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def schema(model_class: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a model of options, every registered kind included.

    >>> from atn_norms.registry import Options
    >>> class Blur(Options):
    ...     size: int
    >>> schema(Blur)["properties"]
    {'size': {'title': 'Size', 'type': 'integer'}}
    """
    described = _without_examples(model_class.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def _without_examples(schema: Any) -> Any:
    """Remove from every description the examples at the end of a docstring: editors show descriptions unchanged."""
    if isinstance(schema, list):
        return [_without_examples(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _without_examples(each) for name, each in schema.items()}
    if isinstance(kept.get("description"), str):
        kept["description"] = kept["description"].partition("\n>>> ")[0].rstrip()
    return kept


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Where]:
    """Read a YAML, JSON or TOML file; return its mapping, and a function from a path in it to `file:line:column`.

    The place is that of the key or the item. The place of a missing key is that of the mapping that should have it. For
    TOML it is the file's name.

    Errors: `SpecError` for a file that is not regular or has more than 1,000,000 bytes, for duplicate keys, numbers
    that are too large, JSON numbers that are not finite, more than 100 levels, and where the top level is no mapping.
    """
    file = Path(path)
    reader = _reader(file)
    return _parsed(_text(file), file, reader)


def parse(text: str, name: str) -> tuple[dict[str, Any], Where]:
    """Read a text as `read` reads a file with this name.

    >>> parse("norm: {kind: layer}", "example.yaml")[0]
    {'norm': {'kind': 'layer'}}
    """
    return _parsed(text, Path(name), _reader(Path(name)))


def value(text: str, place: str) -> Any:
    """Read a text as one YAML value, with the checks of `read`; errors start with `place`.

    >>> value("[none, layer]", "--set axes.norm")
    ['none', 'layer']
    """
    data = _guarded(lambda: _read_yaml(text)[0], lambda position: place)
    _refuse_impossible(data, lambda path: place)
    return data


def to_yaml(value: Any) -> str:
    """Write a value as YAML text; mappings keep their order.

    >>> print(to_yaml({"norm": {"kind": "layer"}, "window": None}), end="")
    norm: {kind: layer}
    window: null
    """
    from ruamel.yaml import YAML

    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 110
    yaml.dump(value, out)
    return out.getvalue()


def _reader(file: Path) -> Callable[[str], tuple[Any, Locate]]:
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json, ".toml": _read_toml}
    if file.suffix.lower() not in readers:
        kind = unknown("kind of file", file.suffix, list(readers))
        raise SpecError.of([replace(kind, position=str(file))])
    return readers[file.suffix.lower()]


def _parsed(text: str, file: Path, reader: Callable[[str], tuple[Any, Locate]]) -> tuple[dict[str, Any], Where]:
    data, locate = _guarded(lambda: reader(text), lambda position: _place(file, position))
    if not isinstance(data, dict):
        contents = "nothing" if data is None else type(data).__name__
        raise SpecError(position=str(file), got=contents, expected="a mapping (key: value)")

    def where(path: tuple[Any, ...]) -> str:
        return _place(file, locate(path))

    _refuse_impossible(data, where)
    return data, where


def _guarded(read: Callable[[], Any], place: Callable[[Position | None], str]) -> Any:
    try:
        return read()
    except _Misplaced as error:
        raise SpecError(position=place(error.position), detail=str(error)) from None
    except RecursionError:
        detail = f"nested too deeply; expected at most {DEEPEST} levels"
        raise SpecError(position=place(None), detail=detail) from None
    except ValueError as error:
        raise SpecError(position=place(None), detail=str(error)) from None


class _Misplaced(Exception):
    """An error in a text, and its position."""

    def __init__(self, message: str, position: Position | None) -> None:
        self.position = position
        super().__init__(message)


def _place(file: Path, position: Position | None) -> str:
    return str(file) if position is None else f"{file}:{position[0]}:{position[1]}"


def _text(file: Path) -> str:
    try:
        raw = read_regular(file, LARGEST)
    except FileNotFoundError:
        near = nearest_file(file)
        raise SpecError(position=str(file), got="no such file", expected="a file", nearest=near) from None
    except OSError as error:
        raise SpecError(position=str(file), got=str(error.strerror), expected="a readable file") from None
    except ValueError as error:  # the system's names hold no zero character
        raise SpecError(
            position=short_repr(str(file)), got=str(error), expected="a name that a file can have"
        ) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig")
        position = _place(file, _position(before, len(before)))
        raise SpecError(position=position, got="bytes that are not UTF-8", expected="UTF-8 text") from None


def _position(text: str, index: int) -> Position:
    line_start = text.rfind("\n", 0, index) + 1
    return text.count("\n", 0, index) + 1, index - line_start + 1


def _read_yaml(text: str) -> tuple[Any, Locate]:
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
        if twice := re.match(r'found duplicate key "(.*?)" with value ', message):
            message = f"got the key {short_repr(twice[1])} twice; expected it once"
        raise _Misplaced(message, mark and (mark.line + 1, mark.column + 1)) from None
    except ReaderError as error:
        position = _position(text, error.position) if isinstance(error.position, int) else None
        character = error.character if isinstance(error.character, str) else chr(error.character)
        raise _Misplaced(f"got the character {character!a}; YAML does not allow it", position) from None
    return data, lambda path: _yaml_position(node, path)


def _yaml() -> Any:
    """Return a reader of YAML whose limits hold while it reads, and whose every error has a position."""
    from ruamel.yaml import YAML
    from ruamel.yaml.composer import Composer
    from ruamel.yaml.constructor import SafeConstructor
    from ruamel.yaml.error import YAMLError

    class Limited(Composer):
        count = level = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.count += 1
            self.level += 1
            mark = self.parser.peek_event().start_mark
            position = mark.line + 1, mark.column + 1
            if self.count > MOST_WRITTEN:
                message = f"got more than {MOST_WRITTEN} values in one text; expected at most {MOST_WRITTEN}"
                raise _Misplaced(message, position)
            if self.level > DEEPEST + 1:
                raise _Misplaced(f"nested too deeply; expected at most {DEEPEST} levels", position)
            node = super().compose_node(parent, index)
            self.level -= 1
            return node

    class Located(SafeConstructor):
        def construct_non_recursive_object(self, node: Any, tag: Any = None) -> Any:
            try:
                return super().construct_non_recursive_object(node, tag)
            except (YAMLError, _Misplaced):
                raise
            except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
                kind = str(node.tag).rpartition(":")[2]
                message = f"got {short_repr(node.value)}; expected a valid {kind}"
                reason = f" ({error})" if type(error) is ValueError and kind == "timestamp" else ""
                position = node.start_mark.line + 1, node.start_mark.column + 1
                raise _Misplaced(message + reason, position) from None

    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Constructor = Limited, Located
    return yaml


def _count(node: Any, above: tuple[int, ...], counted: dict[int, int]) -> int:
    """Count the values of a node with all aliases written out; refuse endless, too many and too deep ones."""
    position = node.start_mark.line + 1, node.start_mark.column + 1
    if id(node) in above:
        raise _Misplaced("got an alias (*name) inside the value that it names; expected a finite value", position)
    if len(above) >= DEEPEST and node.id != "scalar":
        raise _Misplaced(f"nested too deeply; expected at most {DEEPEST} levels", position)
    if id(node) not in counted:
        parts = [part for pair in node.value for part in pair] if node.id == "mapping" else node.value
        below = (*above, id(node))
        total = 1 if node.id == "scalar" else 1 + sum(_count(part, below, counted) for part in parts)
        if total > MOST_VALUES:
            message = f"got {total} values with every alias (*name) written out; expected at most {MOST_VALUES}"
            raise _Misplaced(message, position)
        counted[id(node)] = total
    return counted[id(node)]


def _yaml_position(node: Any, path: tuple[Any, ...]) -> Position | None:
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


def _read_json(text: str) -> tuple[Any, Locate]:
    def integer(digits: str) -> int:
        if len(digits) > MOST_DIGITS + 1:
            message = f"got an integer of {len(digits.lstrip('-'))} digits; expected at most {MOST_DIGITS} digits"
            raise _Misplaced(message, _position(text, text.index(digits)))
        return int(digits)

    def refuse_constant(name: str) -> None:
        word = re.search(rf"(?<![\w\"]){re.escape(name)}", text)
        raise _Misplaced(f"got {name}; expected a finite number", word and _position(text, word.start()))

    try:
        data = json.loads(text, parse_constant=refuse_constant, parse_int=integer)
    except json.JSONDecodeError as error:
        raise _Misplaced(error.msg[:1].lower() + error.msg[1:], (error.lineno, error.colno)) from None
    except RecursionError:
        _json_starts(text)  # raises with the position
        raise
    starts = _json_starts(text)

    def locate(path: tuple[Any, ...]) -> Position:
        while path not in starts:
            path = path[:-1]
        return _position(text, starts[path])

    return data, locate


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]|[^][{}:,"\s]+')


def _json_starts(text: str) -> dict[tuple[Any, ...], int]:
    """Find where each key and each item of a JSON text starts; refuse duplicate keys."""
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
                raise _Misplaced(message, _position(text, token.start()))
            starts[tuple(path)] = token.start()
            expects_key = False
        elif kind != ":":
            starts.setdefault(tuple(path), token.start())
            if kind in "{[":
                if len(path) >= DEEPEST:
                    message = f"nested too deeply; expected at most {DEEPEST} levels"
                    raise _Misplaced(message, _position(text, token.start()))
                expects_key = kind == "{"
                path.append(None if expects_key else 0)
    return starts


def _read_toml(text: str) -> tuple[Any, Locate]:
    try:
        return tomllib.loads(text), lambda path: None
    except tomllib.TOMLDecodeError as error:
        match = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        message = str(error)[: match.start()] if match else str(error)
        position = (int(match[1]), int(match[2])) if match else None
        raise _Misplaced(message[:1].lower() + message[1:], position) from None
    except ValueError:  # Python refuses to read an integer of thousands of digits
        digits = re.search(rf"\d[\d_]{{{MOST_DIGITS},}}", text)
        if digits is None:
            raise
        message = f"got an integer of {len(digits[0].replace('_', ''))} digits; expected at most {MOST_DIGITS} digits"
        raise _Misplaced(message, _position(text, digits.start())) from None
