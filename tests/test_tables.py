"""Reading tables: numbers, times, missing values, and the position of invalid values."""

import math
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atn_norms.errors import SpecError
from atn_norms.tasks import tables
from atn_norms.tasks.tables import content, read


def table(tmp_path, text, name="load.csv", **options):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(content(path, "file"), path, "file", **options)


def refused(tmp_path, text, message, column=None, kind="numbers", **options):
    """Check that reading a file, or one of its columns, raises exactly this message (`FILE` is the file's path)."""
    with pytest.raises(SpecError) as caught:
        getattr(table(tmp_path, text, **options), kind)(column)
    assert str(caught.value).replace(str(tmp_path / options.get("name", "load.csv")), "FILE") == message


def test_numbers_and_missing_values(tmp_path):
    read_back = table(tmp_path, "a, b,c\n1,true, 2.5 \nNaN,,-1e3\n+.5,FALSE,?\n", missing=["?"])
    assert read_back.names == ["a", "b", "c"] and read_back.rows == 3
    for column, expected in {"a": [1, None, 0.5], "b": [1, None, 0], "c": [2.5, -1000, None]}.items():
        assert [None if math.isnan(value) else value for value in read_back.numbers(column).tolist()] == expected


def test_a_parquet_file_reads_like_a_csv_file(tmp_path):
    columns = {
        "t": pa.array([1, 2], pa.timestamp("s", "UTC")),
        "n": [1, None],
        "d": pa.array(["x ", "y"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "load.parquet")
    read_back = table(tmp_path, (tmp_path / "load.parquet").read_bytes(), "load.parquet")
    assert read_back.numbers("n")[0] == 1 and read_back.numbers("n")[1].isnan()
    assert read_back.times("t")[0].tolist() == [10**9, 2 * 10**9] and read_back.labels("d") == ["x", "y"]
    assert read_back.place(1) == f"{tmp_path / 'load.parquet'}: row 2"


def test_large_integers_of_a_parquet_file_are_rounded_as_in_a_csv_file(tmp_path):
    columns = {"signed": [2**53 + 1, 2], "epoch": [1_700_000_000_123_456_789, -(2**63)], "unsigned": [2**64 - 1, 0]}
    arrays = {name: pa.array(each, pa.uint64() if name == "unsigned" else None) for name, each in columns.items()}
    pq.write_table(pa.table(arrays), tmp_path / "load.parquet")
    binary = table(tmp_path, (tmp_path / "load.parquet").read_bytes(), "load.parquet")
    rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    text = table(tmp_path, "\n".join([",".join(columns), *rows]))
    for column, values in columns.items():
        assert binary.numbers(column).tolist() == text.numbers(column).tolist() == [float(value) for value in values]


@pytest.mark.parametrize(
    ("values", "pattern", "steps", "unit"),
    [
        (["1.5", "2", "4"], None, [0.5, 2], ""),
        (["2020-02-28", "2020-02-29", "2020-03-01"], None, [86400e9] * 2, "ns"),
        (["2020-01-01 00:00", "2020-01-01T01:00:00", "2020-01-01 01:00:00.5"], None, [3600e9, 5e8], "ns"),
        (["2020-01-01T00:00:00Z", "2020-01-01T02:00:00+01:00"], None, [3600e9], "ns"),
        (["31/12/2020", "01/01/2021"], "%d/%m/%Y", [86400e9], "ns"),
        (["2020-02", "2020-03"], None, [29 * 86400e9], "ns"),
    ],
)
def test_times_are_numbers_or_dates(tmp_path, values, pattern, steps, unit):
    times, found = table(tmp_path, "t,x\n" + "".join(f"{value},1\n" for value in values)).times("t", pattern)
    assert times.diff().tolist() == steps and found == unit


def test_line_ends_byte_order_marks_and_quoted_line_ends_are_read(tmp_path):
    for text in ("a,b\r\n1,x\r\n2,y", "a,b\r1,x\r2,y\r", "\ufeffa,b\n1,x\n\n2,y\n\n"):
        assert table(tmp_path, text).numbers("a").tolist() == [1, 2]
    assert table(tmp_path, 'a,b\n"1","x\ny"\n2,z\n').labels("b") == ["x\ny", "z"]


def test_an_empty_line_of_a_single_column_is_a_missing_value(tmp_path):
    values = table(tmp_path, "\nx\n1\n\n3\n").numbers("x")
    assert values.isnan().tolist() == [False, True, False]
    refused(tmp_path, "\nx\n1\n\nb\n", "FILE:5: file: got 'b' in column 'x'; expected a number", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE: file: got an empty file; expected a first line with the names of the columns"),
        ("\n\n", "FILE: file: got an empty file; expected a first line with the names of the columns"),
        ("a,b\n", "FILE: file: got a first line and no rows; expected at least one row"),
        ("a,b\n1,2\n\n3,4,5\n", "FILE:4: file: got 3 fields; expected 2, as in the first line"),
        ("a,b\n1,2\n3\n", "FILE:3: file: got 1 field; expected 2, as in the first line"),
        ('a,b\n"1\n2",2\n3,4,5\n', "FILE:4: file: got 3 fields; expected 2, as in the first line"),
        (b"a,b\n1,2\n3,\xe9\n", "FILE:3: file: got byte 0xe9; expected UTF-8 text"),
        ("a,b\n1,\0\n", "FILE:2: file: got a NUL character; expected a text file"),
        (
            "a;b\n1;2\n",
            "FILE:1: file: got one column 'a;b' with delimiter ','; expected another delimiter; did you mean ';'?",
        ),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_located(tmp_path, text, message):
    refused(tmp_path, text, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n\nx,4\n", "FILE:4: file: got 'x' in column 'a'; expected a number"),
        ("a,b\n1,2\n1_0,4\n", "FILE:3: file: got '1_0' in column 'a'; expected a number"),
        ("a,b\n1,2\n-inf,4\n", "FILE:3: file: got '-inf' in column 'a'; expected a finite number"),
        ("a,b\ntrue,2\n3,4\n", "FILE:2: file: got 'true' in column 'a'; expected a number"),
        ('a,b\n"1,5",2\n', "FILE:2: file: got '1,5' in column 'a'; expected a number with a decimal point"),
    ],
)
def test_an_invalid_number_is_located(tmp_path, text, message):
    refused(tmp_path, text, message, "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,b\n1,2\n,4\n",
            "FILE:3: file: got no value in column 'a'; expected a time. "
            "An empty cell, or a sign such as NA, is a missing value",
        ),
        (
            "a,b\n2020-01-01,2\n2020-01-32,4\n",
            "FILE:3: file: got '2020-01-32' in column 'a'; expected a number or an ISO 8601 time, or a `time_format`",
        ),
        (
            "a,b\n31/12/2020,2\n",
            "FILE:2: file: got '31/12/2020' in column 'a'; expected a number or an ISO 8601 time, or a `time_format`",
        ),
    ],
)
def test_an_invalid_time_is_located(tmp_path, text, message):
    refused(tmp_path, text, message, "a", "times")


def test_a_time_of_another_format_is_located(tmp_path):
    with pytest.raises(
        SpecError, match=r"load.csv:3: file: got '1.2.2020' in column 'a'; expected a time of the format '%d/%m/%Y'"
    ):
        table(tmp_path, "a,b\n1/2/2020,1\n1.2.2020,1\n").times("a", "%d/%m/%Y")


def test_every_row_that_cannot_be_converted_is_found_by_halves(tmp_path):
    for row in range(9):
        values = ["1"] * 9
        values[row] = "x"
        refused(
            tmp_path, "a\n" + "\n".join(values), f"FILE:{row + 2}: file: got 'x' in column 'a'; expected a number", "a"
        )


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    read_back = table(tmp_path, "time,load,load\n1,2,3\n")
    with pytest.raises(
        SpecError, match=r"targets: got 'lod'; expected a column of .*load.csv \('time', 'load', 'load'\); did"
    ):
        read_back.require(["lod"], "targets")
    with pytest.raises(SpecError, match="load.csv: targets: got 2 columns 'load'; expected different names"):
        read_back.require(["load"], "targets")


def test_files_of_another_kind_are_rejected(tmp_path):
    refused(tmp_path, "x", "FILE: file: got the ending '.txt'; expected .csv or .parquet", name="load.txt")
    with pytest.raises(SpecError, match=r"load.parquet: file: got unreadable content \(.*\); expected a Parquet file"):
        table(tmp_path, "no", "load.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    with pytest.raises(SpecError, match="empty.parquet: file: got no rows; expected at least one"):
        table(tmp_path, (tmp_path / "empty.parquet").read_bytes(), "empty.parquet")


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "load.csv").write_text("a\n1\n")
    expected = "expected a readable file; did you mean 'load.csv'"
    with pytest.raises(SpecError, match=rf"file: got .*laod.csv \(No such file or directory\); {expected}"):
        content(tmp_path / "laod.csv", "file")
    with pytest.raises(SpecError, match=re.escape(f"{tmp_path}: file: got a folder; expected a regular file")):
        content(tmp_path, "file")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_special_file_is_rejected_without_reading_it(tmp_path, kind, monkeypatch):
    path = tmp_path / "load.csv"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    # A file may be replaced after a check by its path, so only the opened file is checked.
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
    with pytest.raises(SpecError, match=r"file: got .*load.csv \(a special file\); expected a readable file$"):
        content(path, "file")


def test_a_file_above_the_limit_or_of_an_impossible_name_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST", 3)
    (tmp_path / "load.csv").write_text("a\n1\n")
    with pytest.raises(SpecError, match=r"load.csv \(a file of more than 3 bytes\)"):
        content(tmp_path / "load.csv", "file")
    with pytest.raises(SpecError, match=r"\(embedded null (byte|character in path)\); expected a readable file"):
        content(tmp_path / "a\0b", "file")


def test_without_arrow_the_message_has_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(SpecError, match=r"file: got load.csv without pyarrow; .* Run pip install 'atn-norms\[data\]'"):
        table(tmp_path, "a\n1\n")
