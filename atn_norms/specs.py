"""Read specifications from files and mappings, validate them and build layers; errors name file, line and column."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from atn_norms.errors import Problem, SpecError, nearest_file, short_repr, to_spec_error, unknown
from atn_norms.files import read_regular
from atn_norms.formats import (
    DEEPEST,
    MOST_DIGITS,
    MOST_VALUES,
    READERS,
    Locate,
    Misplaced,
    Position,
    position_of,
    read_yaml,
)

if TYPE_CHECKING:
    import torch

    from atn_norms.layers import LayerSpec, Recurrent

Where = Callable[[tuple[Any, ...]], str]
LARGEST = 1_000_000  # bytes of a file
Model = TypeVar("Model", bound=BaseModel)


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
    except ValueError as error:  # a fault that validation does not detect, such as a size too large
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
        raise to_spec_error(error, where, data) from None  # the text of pydantic's error would repeat the message


def _refuse_impossible(data: Any, where: Where | None) -> None:
    problem = _impossible(data)
    if problem is not None:
        position = where(problem.path) if where is not None else ""
        raise SpecError.of([replace(problem, position=position)])


def _impossible(data: Any) -> Problem | None:
    """Return a problem for the first value that no option can have, or None."""
    stack: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    count = 0
    while stack:
        path, value = stack.pop()
        count += len(value) if isinstance(value, Mapping | list | tuple) else 0
        if count > MOST_VALUES:
            return Problem((), f"more than {MOST_VALUES} values", f"at most {MOST_VALUES}")
        if len(path) > DEEPEST:
            return Problem(path[:DEEPEST], "a value nested too deeply", f"at most {DEEPEST} levels")
        if isinstance(value, Mapping):
            stack += [((*path, key), each) for key, each in reversed(list(value.items()))]
            stack += [(path, key) for key in value if isinstance(key, str)]
        elif isinstance(value, list | tuple):
            stack += [((*path, index), each) for index, each in reversed(list(enumerate(value)))]
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
    content = _without_examples(model_class.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content}


def _without_examples(schema: Any) -> Any:
    """Remove the examples at the end of every description: editors show descriptions unchanged."""
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

    The position is that of the key or the item; for a missing key, that of its mapping. For TOML it is the file's name.

    Errors: `SpecError` for a file that is not regular or has more than 1,000,000 bytes, for duplicate keys, numbers
    that are too large, JSON numbers that are not finite, more than 100 levels, and a top level that is no mapping.
    """
    file = Path(path)
    reader = _reader(file)
    return _parsed(_text(file), file, reader)


def parse(text: str, name: str) -> tuple[dict[str, Any], Where]:
    """Parse a text as `read` parses the content of a file with this name.

    >>> parse("norm: {kind: layer}", "example.yaml")[0]
    {'norm': {'kind': 'layer'}}
    """
    return _parsed(text, Path(name), _reader(Path(name)))


def value(text: str, place: str) -> Any:
    """Parse a text as one YAML value, with the checks of `read`; errors start with `place`.

    >>> value("[none, layer]", "--set axes.norm")
    ['none', 'layer']
    """
    data = _guarded(lambda: read_yaml(text)[0], lambda position: place)
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
    if file.suffix.lower() not in READERS:
        kind = unknown("kind of file", file.suffix, list(READERS))
        raise SpecError.of([replace(kind, position=str(file))])
    return READERS[file.suffix.lower()]


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
    except Misplaced as error:
        raise SpecError(position=place(error.position), detail=str(error)) from None
    except RecursionError:
        detail = f"nested too deeply; expected at most {DEEPEST} levels"
        raise SpecError(position=place(None), detail=detail) from None
    except ValueError as error:
        raise SpecError(position=place(None), detail=str(error)) from None


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
    except ValueError as error:  # a name with a zero character, which no file can have
        raise SpecError(
            position=short_repr(str(file)), got=str(error), expected="a name that a file can have"
        ) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig")
        position = _place(file, position_of(before, len(before)))
        raise SpecError(position=position, got="bytes that are not UTF-8", expected="UTF-8 text") from None
