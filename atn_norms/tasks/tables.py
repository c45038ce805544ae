"""Read numbers, times and labels from CSV and Parquet files; errors name the file, the line and the column."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atn_norms.errors import SpecError, nearest, nearest_file, plural, short_repr
from atn_norms.files import read_regular

TABLES = (".csv", ".parquet")
INSTALL = "Run pip install 'atn-norms[data]'"
LARGEST = 2**31 - 1  # bytes of a file: the largest block of CSV that Arrow can parse
MOST_VALUES = 2**28  # of a file whose format may compress them: 2 GiB of float64


def fault(
    option: str, place: object, got: str, expected: str, choices: Iterable[str] = (), word: str = ""
) -> SpecError:
    """Build an error, `place: option: got X; expected Y; did you mean Z?`, where Z is the choice nearest to `word`.

    >>> print(fault("targets", "", "'laod'", "a column of load.csv", ["load", "time"], "laod"))
    targets: got 'laod'; expected a column of load.csv; did you mean 'load'?
    """
    near = nearest(word, choices) if word else None
    return SpecError(option, got, expected, near, str(place))


def content(path: Path, option: str) -> bytes:
    """Return the bytes of a regular file of at most `LARGEST` bytes.

    Errors: `SpecError` naming the option and the file that cannot be read.
    """
    try:
        return read_regular(path, LARGEST)
    except IsADirectoryError:
        raise fault(option, path, "a folder", "a regular file") from None
    except OSError as error:
        raise SpecError(option, f"{path} ({error.strerror})", "a readable file", nearest_file(path)) from error
    except ValueError as error:  # a path with a zero character
        raise SpecError(option, f"{short_repr(str(path))} ({error})", "a readable file") from error


def digest(data: bytes) -> str:
    """Return the SHA-256 of some bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _arrow(option: str, path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise SpecError(option, f"{path.name} without pyarrow", "pyarrow to read it", detail=INSTALL) from None
    return pyarrow


class Table:
    """The columns of one file, converted on request.

    | symbol | meaning |
    |---|---|
    | `path` | the file |
    | `option` | the option that names the file, for error messages |
    | `names` | names of the columns, in the file's order |
    | `rows` | number of rows |
    """

    def __init__(self, path: Path, option: str, columns: Any, line: Callable[[int], int] | None) -> None:
        self.path, self.option, self.names, self.rows = path, option, list(columns.column_names), columns.num_rows
        self._columns, self._line, self._arrow = columns, line, _arrow(option, path)

    def place(self, row: int, folder: bool = True) -> str:
        """Return the position of a row (from 0): `file:line`, or `file: row n` (from 1) where a file has no lines."""
        file = self.path if folder else self.path.name
        return f"{file}: row {row + 1}" if self._line is None else f"{file}:{self._line(row)}"

    def require(self, columns: Iterable[str], option: str) -> None:
        """Raise a `SpecError` of the option that names a missing column and the nearest column."""
        for column in columns:
            if column not in self.names:
                known = ", ".join(map(short_repr, self.names[:20])) + (", ..." if len(self.names) > 20 else "")
                raise fault(option, "", short_repr(column), f"a column of {self.path} ({known})", self.names, column)
            if self.names.count(column) > 1:
                raise fault(option, self.path, f"{self.names.count(column)} columns {column!r}", "different names")

    def numbers(self, column: str) -> Tensor:
        """Return a column as float64 `[rows]`, NaN where a value is missing; true is 1 and false is 0.

        Integers beyond 2^53 are rounded, as in a CSV file.

        Errors: `SpecError` naming the first value that is not a finite number.
        """
        pa = self._arrow
        values = self._column(column)
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.int8())
        if pa.types.is_integer(values.type):
            values = values.cast(pa.float64(), safe=False)
        converted = self._cast(values, pa.float64())
        if isinstance(converted, int):
            refused, converted = converted, self._cast(values, pa.bool_())
            if isinstance(converted, int):
                raise self._invalid(column, refused, values, "a number")
            converted = converted.cast(pa.float64())
        numbers = torch.from_dlpack(converted.fill_null(math.nan)).clone()
        infinite = numbers.isinf().nonzero()
        if len(infinite):
            raise self._invalid(column, int(infinite[0]), values, "a finite number")
        return numbers

    def times(self, column: str, pattern: str | None = None) -> tuple[Tensor, str]:
        """Return a time column, `[rows]` float64 numbers or int64 nanoseconds, and its unit (`""` or `"ns"`).

        `pattern` is a format of `strptime`; without one, numbers and ISO 8601 months, dates and times are read.

        Errors: `SpecError` naming the first value that is missing or not a time.
        """
        pa = self._arrow
        values = self._column(column)
        if values.null_count:
            raise self._invalid(column, pa.compute.index(values.is_null(), True).as_py(), values, "a time")
        if pa.types.is_temporal(values.type):
            return torch.from_dlpack(
                values.cast(pa.timestamp("ns", getattr(values.type, "tz", None))).cast(pa.int64())
            ), "ns"
        if pattern is not None:
            parsed = pa.compute.strptime(values.cast(pa.string()), pattern, "us", error_is_null=True)
            if parsed.null_count:
                first = pa.compute.index(parsed.is_null(), True).as_py()
                raise self._invalid(column, first, values, f"a time of the format {pattern!r}")
            return torch.from_dlpack(parsed.cast(pa.timestamp("ns")).cast(pa.int64())), "ns"
        months = pa.compute.strptime(values.cast(pa.string()), "%Y-%m", "us", error_is_null=True)
        if not months.null_count:
            return torch.from_dlpack(months.cast(pa.timestamp("ns")).cast(pa.int64())), "ns"
        furthest = -1
        for kind in (pa.float64(), pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
            converted = self._cast(values, kind)
            if not isinstance(converted, int):
                number = pa.types.is_floating(kind)
                return torch.from_dlpack(converted if number else converted.cast(pa.int64())), "" if number else "ns"
            furthest = max(furthest, converted)
        raise self._invalid(column, furthest, values, "a number or an ISO 8601 time, or a `time_format`")

    def labels(self, column: str) -> list[str]:
        """Return a column as text.

        Errors: `SpecError` naming the first row without a value.
        """
        pa = self._arrow
        values = self._column(column)
        if values.null_count:
            raise self._invalid(column, pa.compute.index(values.is_null(), True).as_py(), values, "a value")
        return values.cast(pa.string()).to_pylist()

    def text(self, column: str, row: int) -> str:
        """Return the `repr` of one value, shortened if it is long."""
        return short_repr(self._columns.column(column)[row].as_py())

    def _column(self, column: str) -> Any:
        pa = self._arrow
        values = self._columns.column(column).combine_chunks()
        values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        return pa.compute.utf8_trim_whitespace(values) if pa.types.is_string(values.type) else values

    def _cast(self, values: Any, kind: Any) -> Any:
        """Return converted values, or the row of the first value that cannot be converted."""
        pa = self._arrow
        try:
            return values.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            first, last = 0, len(values)  # bisection: the first bad value is in values[first:last]
            while last - first > 1:
                middle = (first + last) // 2
                try:
                    values.slice(first, middle - first).cast(kind)
                    first = middle
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    last = middle
            return first

    def _invalid(self, column: str, row: int, values: Any, expected: str) -> SpecError:
        value = values[row].as_py()
        got = "no value" if value is None else short_repr(value)
        if value is None:
            expected += ". An empty cell, or a sign such as NA, is a missing value"
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value):
            expected += " with a decimal point"
        return fault(self.option, self.place(row), f"{got} in column {column!r}", expected)


def read(data: bytes, path: Path, option: str, delimiter: str = ",", missing: Iterable[str] = ()) -> Table:
    """Read the bytes of a CSV or Parquet file as a table; the file extension selects the format.

    A CSV file is UTF-8 and its first line names the columns. Every row must have as many fields as the first line.
    Missing values are empty fields, the usual spellings (`NA`, `NaN`, `null`, ...) and those in `missing`.

    Errors: `SpecError` naming the option, the file and the line that cannot be read.
    """
    if path.suffix.lower() == ".csv":
        return _read_csv(data, path, option, delimiter, missing)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(data, path, option)
    raise fault(option, path, f"the ending {path.suffix!r}", " or ".join(TABLES))


def _read_parquet(data: bytes, path: Path, option: str) -> Table:
    pa = _arrow(option, path)
    try:
        sizes = pa.parquet.ParquetFile(pa.BufferReader(data)).metadata
        if sizes.num_rows * sizes.num_columns > MOST_VALUES:
            raise fault(
                option, path, f"{sizes.num_rows} rows of {sizes.num_columns} columns", f"at most {MOST_VALUES} values"
            )
        columns = pa.parquet.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise fault(option, path, f"unreadable content ({_first_line(error)})", "a Parquet file") from error
    if columns.num_rows == 0:
        raise fault(option, path, "no rows", "at least one")
    return Table(path, option, columns, None)


def _read_csv(data: bytes, path: Path, option: str, delimiter: str, missing: Iterable[str]) -> Table:
    pa = _arrow(option, path)
    header, empty = _header(data, path, option, delimiter)
    lone = len(header) == 1  # in a single column, an empty line is a missing value
    first = empty + 1 if lone else 1  # the first record that is a row
    refused: list[Any] = []

    def keep(row: Any) -> str:
        refused.append(row)
        return "error"

    def line(row: int) -> int:
        return _line(data, delimiter, row + first, skip_empty=not lone)

    try:
        columns = pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=header),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=not lone, invalid_row_handler=keep
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.string() for name in header},
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
                null_values=[*pa.csv.ConvertOptions().null_values, *missing],
            ),
        )
    except pa.ArrowInvalid as error:
        if not refused:
            raise fault(option, path, f"unreadable content ({_first_line(error)})", "a CSV file") from error
        (row,) = refused
        place = f"{path}:{_line(data, delimiter, row.number - 1, skip_empty=not lone)}"
        raise fault(
            option, place, plural(row.actual_columns, "field"), f"{row.expected_columns}, as in the first line"
        ) from error
    columns = columns.slice(first)
    if columns.num_rows == 0:
        raise fault(option, path, "a first line and no rows", "at least one row")
    return Table(path, option, columns, line)


def _header(data: bytes, path: Path, option: str, delimiter: str) -> tuple[list[str], int]:
    """Return the names in the first line that is not empty, and the number of empty lines before it."""
    try:
        text = data.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise fault(option, f"{path}:{line}", f"byte {data[error.start]:#04x}", "UTF-8 text") from error
    if "\0" in text:
        raise fault(option, f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}", "a NUL character", "a text file")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    empty, header = next(((number, row) for number, row in enumerate(rows) if row), (0, None))
    if header is None:
        raise fault(option, path, "an empty file", "a first line with the names of the columns")
    other = next((sign for sign in ";\t|," if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        got = f"one column {short_repr(header[0])} with delimiter {delimiter!r}"
        raise fault(option, f"{path}:1", got, "another delimiter", [other], other)
    return [name.strip() for name in header], empty


def _line(data: bytes, delimiter: str, record: int, skip_empty: bool) -> int:
    """Return the line at which a record starts; record 0 is the first line with the names."""
    rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter)
    start, before = 1, -1
    for row in rows:
        before += bool(row) or not skip_empty
        if before == record:
            return start
        start = rows.line_num + 1
    return start


def _first_line(error: BaseException) -> str:
    return short_repr(str(error).partition("\n")[0], 100)
