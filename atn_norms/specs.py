"""From a file or a mapping to a validated specification, and from that to a layer; errors say file, line and column."""

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

if TYPE_CHECKING:
    import torch

    from atn_norms.layers import LayerSpec, Recurrent

Where = Callable[[tuple[Any, ...]], str]
Position = tuple[int, int]  # line and column, from 1
Locate = Callable[[tuple[Any, ...]], Position | None]
Model = TypeVar("Model", bound=BaseModel)
MOST_VALUES = 100_000  # of a YAML text, each counted as often as aliases repeat it
DEEPEST = 100  # levels: all that walks through data may do so recursively


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
    except ValueError as error:  # what only building can find out, such as a size too large, belongs to the file too
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
    try:
        return model_class.model_validate(data)
    except ValidationError as error:
        raise to_spec_error(error, where, data) from None  # pydantic's own rendering would only say it twice
    except (OverflowError, RecursionError) as error:  # what a check of ours cannot reckon with
        position = where(()) if where is not None else ""
        detail = "nested too deeply" if isinstance(error, RecursionError) else f"a number is too large: {error}"
        raise SpecError(position=position, detail=detail) from None


def schema(model_class: type[BaseModel]) -> dict[str, Any]:
    """Give the JSON schema of a model of options, every registered kind included.

    >>> from atn_norms.registry import Options
    >>> class Blur(Options):
    ...     size: int
    >>> schema(Blur)["properties"]
    {'size': {'title': 'Size', 'type': 'integer'}}
    """
    described = _without_examples(model_class.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def _without_examples(schema: Any) -> Any:
    """Leave out of every description the examples that end a docstring: an editor shows it as it is."""
    if isinstance(schema, list):
        return [_without_examples(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _without_examples(each) for name, each in schema.items()}
    if isinstance(kept.get("description"), str):
        kept["description"] = kept["description"].partition("\n>>> ")[0].rstrip()
    return kept


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Where]:
    """Read a YAML, JSON or TOML file: its mapping, and a function from a path in it to `file:line:column`.

    The place is the key's or the item's; for what is missing, that of the nearest thing around it. A TOML file
    gives its name alone. Keys given twice, non-finite JSON numbers and anything but a mapping at the top are refused.

    Errors: `SpecError`.
    """
    file = Path(path)
    reader = _reader(file)
    return _parsed(_text(file), file, reader)


def parse(text: str, name: str) -> tuple[dict[str, Any], Where]:
    """Read a text as `read` reads a file of this name.

    >>> parse("norm: {kind: layer}", "example.yaml")[0]
    {'norm': {'kind': 'layer'}}
    """
    return _parsed(text, Path(name), _reader(Path(name)))


def value(text: str, place: str) -> Any:
    """Read a text as one YAML value, guarded as a file is; `place` is what errors start with.

    >>> value("[none, layer]", "--set axes.norm")
    ['none', 'layer']
    """
    return _guarded(lambda: _read_yaml(text)[0], lambda position: place)


def to_yaml(value: Any) -> str:
    """Write a value as YAML text, mappings in their own order.

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
        found = "nothing" if data is None else type(data).__name__
        raise SpecError(position=str(file), got=found, expected="a mapping (key: value)")
    return data, lambda place: _place(file, locate(place))


def _guarded(reading: Callable[[], Any], place: Callable[[Position | None], str]) -> Any:
    try:
        return reading()
    except _Misplaced as error:
        raise SpecError(position=place(error.position), detail=str(error)) from None
    except RecursionError:
        raise SpecError(position=place(None), detail="nested too deeply") from None
    except ValueError as error:  # such as an integer of thousands of digits, which Python refuses to read
        raise SpecError(position=place(None), detail=str(error)) from None


class _Misplaced(Exception):
    """A fault in a text, and its position."""

    def __init__(self, message: str, position: Position | None) -> None:
        self.position = position
        super().__init__(message)


def _place(file: Path, position: Position | None) -> str:
    return str(file) if position is None else f"{file}:{position[0]}:{position[1]}"


def _text(file: Path) -> str:
    try:
        raw = file.read_bytes()
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
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        if node is not None:
            _count(node, (), {})  # before anything is made of them: a merge (<<) repeats what it names too
        data = None if node is None else yaml.constructor.construct_document(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(str(error.problem or error.context).split())
        said = f"{error.context}, {said}" if said.startswith("but ") else said
        if twice := re.match(r'found duplicate key "(.*?)" with value ', said):
            said = f"key {short_repr(twice[1])} is given twice"
        raise _Misplaced(said, mark and (mark.line + 1, mark.column + 1)) from None
    except ReaderError as error:
        raise _Misplaced(f"a character that YAML does not allow: {error.character!r}", None) from None
    return data, lambda path: _yaml_position(node, path)


def _count(node: Any, above: tuple[int, ...], counted: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out; endless, far too many or too deep is refused."""
    position = node.start_mark.line + 1, node.start_mark.column + 1
    if id(node) in above:
        raise _Misplaced("an alias (*name) stands inside what it names", position)
    if len(above) >= DEEPEST and node.id != "scalar":
        raise _Misplaced(f"nested too deeply; allowed: {DEEPEST} levels", position)
    if id(node) not in counted:
        parts = [part for pair in node.value for part in pair] if node.id == "mapping" else node.value
        below = (*above, id(node))
        total = 1 if node.id == "scalar" else 1 + sum(_count(part, below, counted) for part in parts)
        if total > MOST_VALUES:
            raise _Misplaced(f"{total} values, with every alias (*name) written out; at most {MOST_VALUES}", position)
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
        for key, value in node.value:  # construction has put the entries of a merge (<<) among the others
            if key.value == str(step):
                return key.start_mark, value
    return None


def _read_json(text: str) -> tuple[Any, Locate]:
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _Misplaced(error.msg[:1].lower() + error.msg[1:], (error.lineno, error.colno)) from None
    starts = _json_starts(text)

    def locate(path: tuple[Any, ...]) -> Position:
        while path not in starts:
            path = path[:-1]
        return _position(text, starts[path])

    return data, locate


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON allows")


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]|[^][{}:,"\s]+')


def _json_starts(text: str) -> dict[tuple[Any, ...], int]:
    """Find where each key and each item of a valid JSON text starts; a key given twice is refused."""
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
                raise _Misplaced(f"key {short_repr(dotted(path))} is given twice", _position(text, token.start()))
            starts[tuple(path)] = token.start()
            expects_key = False
        elif kind != ":":
            starts.setdefault(tuple(path), token.start())
            if kind in "{[":
                if len(path) >= DEEPEST:
                    raise _Misplaced(f"nested too deeply; allowed: {DEEPEST} levels", _position(text, token.start()))
                expects_key = kind == "{"
                path.append(None if expects_key else 0)
    return starts


def _read_toml(text: str) -> tuple[Any, Locate]:
    try:
        return tomllib.loads(text), lambda path: None
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        said = str(error)[: found.start()] if found else str(error)
        position = (int(found[1]), int(found[2])) if found else None
        raise _Misplaced(said[:1].lower() + said[1:], position) from None
