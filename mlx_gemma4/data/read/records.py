"""Bytes of a file -> its raw rows, one at a time, each with the line it stands on.

A raw row is what a format gives unseen: the bytes of a JSONL line, a value of a JSON file, the
`Cells` of a CSV line, a row of a table. `record_of`, which runs in the workers, makes a dict of it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any, NamedTuple, NoReturn

from ...errors import DataError, row_error
from ...extras import import_extra

Raw = Any

_MOST_BYTES = 8_000_000
"""A longer row is refused: no context holds it, and it is often a file without line ends."""

_SPACE = re.compile(r"[ \t\r\n]*")


class Cells(NamedTuple):
    """A line of a CSV file: its cells, and the names that the first line gives them."""

    names: list[str]
    cells: list[str]


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Errors about rows that come out of the block begin with a place, such as "file:3"."""
    try:
        yield
    except DataError as error:
        raise row_error(f"{place}: {error.found}", error.wanted, error.do) from None


def record_of(raw: Raw) -> dict[str, Any]:
    """A raw row as a dict.

    A DataError refuses what is too long, not UTF-8, not JSON or no object, or a CSV line with more
    or fewer cells than the first.
    """
    if isinstance(raw, Cells):
        if len(raw.cells) != len(raw.names):
            wanted = f"{len(raw.names)}, as the first line: {', '.join(raw.names)}"
            raise row_error(f"has {len(raw.cells)} cells", wanted)
        return dict(zip(*raw))
    value = _parsed(raw) if isinstance(raw, bytes) else raw
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise row_error(f"is of type {kind}", "an object with the fields of a row")
    return value


def without_nulls(value: Any) -> Any:
    """The value without fields that are null: Arrow gives every row the fields of all rows."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def lines(stream: IO[bytes], place: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank; of one over the limit a piece that is over it too."""
    number = 0
    while line := stream.readline(_MOST_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > _MOST_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(_MOST_BYTES)) and not rest.endswith(b"\n"):
                pass
        if len(line) > _MOST_BYTES or line.strip():
            yield number, line


def json_values(stream: IO[bytes], place: str) -> Iterator[tuple[int, Any]]:
    """The items of an array, or values one after the other; never more than a few in memory."""
    text = _JsonText(io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape"), place)
    if not text.take("["):
        while text.peek():
            yield text.value()
    elif not text.take("]"):
        yield text.value()
        while text.take(","):
            yield text.value()
        if not text.take("]"):
            text.refuse("no comma or ']' behind a value")
    if text.peek():
        text.refuse("text after the last value")


def csv_rows(stream: IO[bytes], place: str) -> Iterator[tuple[int, Cells]]:
    """The lines below the first, which names the columns; commas, tabs or semicolons."""
    csv.field_size_limit(_MOST_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    header = text.readline()
    delimiter = next((d for d in ",\t;" if d in header), ",")
    names = next(csv.reader([header], delimiter=delimiter), [])
    if any(not name.strip() for name in names) or len(set(names)) < len(names):
        found = f"{place}1: has the columns {', '.join(map(repr, names))}"
        raise row_error(found, "a first line that names every column, each once")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    number = 2
    try:
        for cells in reader:
            if cells:
                yield number, Cells(names, cells)
            number = reader.line_num + 2
    except csv.Error as error:
        wanted = 'cells with commas, quotes or line ends in "quotes"'
        raise row_error(f"{place}{number}: is not CSV: {error}", wanted) from None


def parquet_rows(stream: IO[bytes], place: str) -> Iterator[tuple[int, dict]]:
    """The rows of a Parquet file, counted from 1."""
    pyarrow = import_extra("pyarrow", "data")
    parquet = import_extra("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(stream) as table:
            batches = table.iter_batches(batch_size=1000)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from enumerate(map(without_nulls, rows), 1)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _parsed(line: bytes) -> Any:
    if len(line) > _MOST_BYTES and not line.endswith(b"\n"):
        wanted = "one row a line, each shorter than the model's context"
        raise row_error(f"is longer than {_MOST_BYTES // 1_000_000} MB", wanted)
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise row_error(f"is not UTF-8: {error}", "text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None


def _not_json(error: Exception | str) -> DataError:
    told = "nested too deep" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        told = f"{error.msg}, column {error.colno}"
    return row_error(f"is not JSON: {told}", "one JSON object a line")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class _JsonText:
    """A window on JSON text that grows until the next value is whole."""

    def __init__(self, stream: io.TextIOWrapper, place: str):
        self._stream, self._place = stream, place
        self._text, self._at, self._line = "", 0, 1

    def _more(self) -> bool:
        piece = self._stream.read(max(1 << 18, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def _advance(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._advance(match.end() if match else self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        """Whether a character comes next, which is then passed."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> tuple[int, Any]:
        """(line, value); of a value over the limit its text, which is over it too."""
        if not self.peek():
            self.refuse("the file ends within a value")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                break
            except (ValueError, RecursionError) as error:
                wide = len(self._text) - self._at > 4 * _MOST_BYTES
                if wide or isinstance(error, RecursionError) or not self._more():
                    self.refuse(error)
        line, start = self._line, self._at
        self._advance(end)
        if end - start > _MOST_BYTES:
            value = self._text[start:end].encode("utf-8", "surrogateescape")
        return line, value

    def refuse(self, error: Exception | str) -> NoReturn:
        """Raise what is wrong, with the line that it stands on."""
        line = self._line
        if isinstance(error, json.JSONDecodeError):
            line += self._text.count("\n", self._at, error.pos)
            error = error.msg
        with located(f"{self._place}{line}"):
            raise _not_json(error) from None
