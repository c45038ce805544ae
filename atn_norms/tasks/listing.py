"""List, split and load sequences, one per file, from a folder per class or an index file."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from atn_norms.errors import SpecError, nearest_file, plural, short_repr
from atn_norms.tasks.base import generator
from atn_norms.tasks.tables import INSTALL, MOST_VALUES, TABLES, content, fault, read

if TYPE_CHECKING:
    from atn_norms.tasks.sequences import SequencesSpec

PARTS = ("train", "validation", "test")
FILES = (".npy", *TABLES)
ENDINGS = f"files with the endings {', '.join(FILES)}"


class Item(NamedTuple):
    """A listed sequence: name, file, label, split, and the folder or line that lists it."""

    name: str
    path: Path
    label: str
    part: str | None
    place: str


def listed(spec: SequencesSpec) -> list[Item]:
    """Return the sequences of a folder or an index file, in the order of their names.

    Errors: `SpecError` naming the folder, or the line of the index, that cannot be used.
    """
    path = Path(spec.path)
    items = _in_folder(path, spec) if path.is_dir() else _in_index(path, spec)
    if not items:
        raise fault("path", path, "no sequences", ENDINGS)
    return sorted(items)


def _in_folder(path: Path, spec: SequencesSpec) -> list[Item]:
    if spec.mode == "regress":
        raise fault("path", path, "a folder with mode regress", "an index file with a number for each sequence")
    if spec.split_column is not None:
        raise fault("split_column", path, f"{spec.split_column!r} with a folder", "no column, or an index file")
    folders = [each.name for each in _visible(path)]
    if {"train", "test"} <= set(folders):
        for name in folders:
            if name not in PARTS:
                raise fault("path", path / name, "a folder beside train and test", "validation, or none", PARTS, name)
        return [item for part in folders for item in _of_classes(path / part, part, path)]
    return [*_of_classes(path, None, path)]


def _of_classes(path: Path, part: str | None, root: Path) -> Iterator[Item]:
    for folder in _visible(path):
        if not folder.is_dir():
            raise fault("path", folder, "a file", "a folder for each class, or an index file as `path`")
        if not (files := _visible(folder)):
            raise fault("path", folder, "no sequences", ENDINGS)
        for file in files:
            if file.suffix.lower() not in FILES:
                raise fault("path", file, f"the ending {file.suffix!r}" if file.is_file() else "a folder", ENDINGS)
            yield Item(file.relative_to(root).as_posix(), file, folder.name, part, str(file))


def _visible(path: Path) -> list[Path]:
    try:
        return sorted(each for each in path.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise fault("path", path, error.strerror or "an unreadable folder", "a readable folder") from error


def _in_index(path: Path, spec: SequencesSpec) -> list[Item]:
    table = read(content(path, "path"), path, "path", spec.delimiter, spec.missing)
    table.require([spec.file_column], "file_column")
    table.require([spec.label_column], "label_column")
    files = table.labels(spec.file_column)
    if spec.mode == "classify":
        labels = table.labels(spec.label_column)
    else:
        numbers = table.numbers(spec.label_column)
        if numbers.isnan().any():
            row = int(numbers.isnan().nonzero()[0])
            raise fault("path", table.place(row), f"no value in column {spec.label_column!r}", "a number")
        labels = [repr(number) for number in numbers.tolist()]
    parts: list[str | None] = [None] * table.rows
    if spec.split_column is not None:
        table.require([spec.split_column], "split_column")
        parts = [*table.labels(spec.split_column)]
    items, seen = [], {}
    for row, (name, label, part) in enumerate(zip(files, labels, parts, strict=True)):
        if part is not None and part not in PARTS:
            got = f"{part!r} in column {spec.split_column!r}"
            raise fault("path", table.place(row), got, f"one of {', '.join(PARTS)}", PARTS, part)
        place, cell = table.place(row), f"{name!r} in column {spec.file_column!r}"
        file = path.parent / name
        whole = os.path.normpath(file)  # a path may be written in several ways
        if whole in seen:
            raise fault("path", place, f"{cell} again, after {table.place(seen[whole])}", "each file once")
        if not file.is_file():
            near = nearest_file(file)
            expected = f"a file relative to {path.parent}"
            nearest = near and Path(name).with_name(near).as_posix()
            raise SpecError("path", f"{cell}, and no such file", expected, nearest, str(place))
        seen[whole] = row
        items.append(Item(name, file, label, part, table.place(row)))
    return items


def divided(items: list[Item], spec: SequencesSpec) -> list[Item]:
    """Return the items with their splits, listed or drawn per class with `split_seed`.

    Errors: `SpecError` naming a split without sequences.
    """
    if items[0].part is None:
        items = _drawn(items, {"validation": spec.validation, "test": spec.test}, spec)
    elif not any(item.part == "validation" for item in items):
        train = [item for item in items if item.part == "train"]
        others = [item for item in items if item.part != "train"]
        items = _drawn(train, {"validation": spec.validation}, spec) + others
    for part in PARTS:
        if not any(item.part == part for item in items):
            cure = "at least one; a class is divided where it has three, or name the splits in the files"
            raise fault("path", spec.path, f"no sequences for {part} among {len(items)}", cure)
    return items


def _drawn(items: list[Item], shares: Mapping[str, float], spec: SequencesSpec) -> list[Item]:
    """Draw parts of the given shares from each class; each part gets a sequence if the class has enough."""
    result: list[Item] = []
    groups = sorted({item.label for item in items}) if spec.mode == "classify" else [None]
    for label in groups:
        group = [item for item in items if label in (None, item.label)]
        random = generator(spec.split_seed, "sequences", "split", label or "")
        order = [group[i] for i in torch.randperm(len(group), generator=random).tolist()]
        for part, share in shares.items():
            count = max(1, round(len(group) * share)) if len(group) > len(shares) else 0
            result += [item._replace(part=part) for item in order[:count]]
            order = order[count:]
        result += [item._replace(part="train") for item in order]
    return result


def loaded(items: list[Item], spec: SequencesSpec) -> tuple[list[Tensor], list[str]]:
    """Return the values [T, F] of each sequence, float64 with NaN for missing values, and the feature names.

    Errors: `SpecError` naming the file that cannot be read, or has other features than the first one.
    """
    values: list[Tensor] = []
    names = list(spec.columns) if spec.columns is not None else None  # of tables; an array has no names
    for item in items:
        if item.path.suffix.lower() == ".npy":
            steps = _array(item, spec)
        else:
            steps, names = _rows(item, spec, names)
        if values and steps.shape[1] != values[0].shape[1]:
            got, expected = plural(steps.shape[1], "feature"), f"{values[0].shape[1]}, as in {items[0].path}"
            raise fault("path", item.path, got, expected)
        values.append(steps)
    return values, names or [f"feature {number}" for number in range(values[0].shape[1])]


def missing_values(items: list[Item], values: list[Tensor], names: list[str]) -> Iterator[str]:
    """Yield a sentence for each feature with missing values."""
    absent = torch.cat([each.isnan() for each in values])
    for column, name in enumerate(names):
        if count := int(absent[:, column].sum()):
            at, rows = next((i, v[:, column].isnan()) for i, v in enumerate(values) if v[:, column].isnan().any())
            first = f"{items[at].name}: row {int(rows.nonzero()[0]) + 1}"
            yield f"{name}: {count} of {len(absent)} values are missing and masked (first at {first})"


def _rows(item: Item, spec: SequencesSpec, names: list[str] | None) -> tuple[Tensor, list[str]]:
    table = read(content(item.path, "path"), item.path, "path", spec.delimiter, spec.missing)
    columns = table.names if names is None else names
    table.require(columns, "path" if spec.columns is None else "columns")
    if spec.columns is None and len(table.names) != len(columns):
        extra = next(name for name in table.names if name not in columns)
        raise fault("path", item.path, f"the column {extra!r}", f"the columns of the first table, {', '.join(columns)}")
    return torch.stack([table.numbers(column) for column in columns], 1), columns


def _check_size(data: bytes, item: Item) -> None:
    """Raise `SpecError` for an array that its file does not hold whole, or of too many values, before it is read."""
    from numpy.lib import format as npy

    if not data.startswith(npy.MAGIC_PREFIX):
        return
    file = io.BytesIO(data)
    shape, _, kind = (npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0)(file)
    got, size = f"{kind} of shape {list(shape)} in {plural(len(data), 'byte')}", math.prod(shape)
    if size > MOST_VALUES:
        raise fault("path", item.path, got, f"at most {MOST_VALUES} values")
    if size * kind.itemsize > len(data) - file.tell():
        raise fault("path", item.path, got, "a whole array")


def _array(item: Item, spec: SequencesSpec) -> Tensor:
    try:
        import numpy as np
    except ImportError:
        raise SpecError("path", f"{item.name} without numpy", "numpy to read it", detail=INSTALL) from None
    if spec.columns is not None:
        raise fault("columns", item.path, "an array, which has no names", "CSV or Parquet files, or no `columns`")
    data = content(item.path, "path")
    try:
        _check_size(data, item)
        array: Any = np.load(io.BytesIO(data), allow_pickle=False)
    except SpecError:
        raise
    except (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        raise fault("path", item.path, f"unreadable content ({short_repr(str(error), 100)})", "an .npy file") from error
    if (
        not isinstance(array, np.ndarray)
        or array.dtype.kind not in "fiub"
        or array.ndim not in (1, 2)
        or not array.size
    ):
        got = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise fault("path", item.path, got, "numbers of shape [steps] or [steps, features], not empty")
    steps = torch.from_numpy(array.astype(np.float64))
    steps = steps.unsqueeze(1) if steps.ndim == 1 else steps
    if len(infinite := steps.isinf().nonzero()):
        row, column = infinite[0].tolist()
        raise fault("path", f"{item.path}: row {row + 1}", f"{steps[row, column].item()}", "finite numbers")
    return steps
