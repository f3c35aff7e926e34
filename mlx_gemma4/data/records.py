"""A file -> its raw rows, one at a time, each with the line it stands on.

A raw row is the bytes of a JSONL line, which a worker parses, or a dict. A row that is broken in
itself is handed on as the DataError that says so: whoever reads decides whether to stop.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import DataError
from .files import DataFile, open_bytes, unreadable

__all__ = ["MOST_BYTES", "Raw", "parse_line", "read_records", "without_nulls"]

Raw = bytes | dict | DataError

MOST_BYTES = 8_000_000
"""A longer row is refused: no context holds it, and it is often a file without line ends."""

_SPACE = re.compile(r"[ \t\r\n]*")


def read_records(file: DataFile) -> Iterator[tuple[int, Raw]]:
    """(line, raw row) of every row of a file; blank lines are passed over.

    Raises:
        DataError: the file as a whole cannot be read on.
    """
    reader = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}[file.kind]
    try:
        yield from reader(file)
    except (OSError, EOFError, csv.Error) as error:
        raise unreadable(file.path, error) from None


def parse_line(line: bytes, origin: str) -> Any:
    """The JSON value of a line.

    Raises:
        DataError: a line that is not UTF-8, or not JSON.
    """
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad_encoding(origin, error) from None
    except (ValueError, RecursionError) as error:
        raise _not_json(origin, error) from None


def without_nulls(value: Any) -> Any:
    """The value without fields that are null: Arrow gives every row the fields of all rows."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_constant)


def _not_json(origin: str, error: Exception) -> DataError:
    told = "nested too deep" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        told = f"{error.msg}, column {error.colno}"
    return DataError(
        f"{origin} is not JSON: {told}",
        wanted="one JSON object a line",
        do="mend or remove the line",
    )


def _bad_encoding(origin: str, error: UnicodeError) -> DataError:
    return DataError(
        f"{origin} is not UTF-8: {error}",
        wanted="text in UTF-8",
        do="save the file as UTF-8, or remove the line",
    )


def _too_long(origin: str) -> DataError:
    return DataError(
        f"{origin} is longer than {MOST_BYTES // 1_000_000} MB",
        wanted="one row a line, each shorter than the model's context",
        do="split the text into rows, or check the line ends",
    )


def _jsonl(file: DataFile) -> Iterator[tuple[int, Raw]]:
    with open_bytes(file) as stream:
        number = 0
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MOST_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(MOST_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, _too_long(file.origin(number))
            elif line.strip():
                yield number, line


def _json(file: DataFile) -> Iterator[tuple[int, Raw]]:
    """The items of an array, or values one after the other; never more than a few in memory."""
    with open_bytes(file) as stream:
        text = _JsonText(file, io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape"))
        if text.peek() == "[":
            text.at += 1
            more = text.peek() != "]"
            while more:
                yield text.value()
                more = text.peek() == ","
                text.at += more
            text.expect("]")
        else:
            while text.peek():
                yield text.value()
        if text.peek():
            raise _not_json(file.origin(text.line), ValueError("text after the last value"))


class _JsonText:
    """A window on JSON text that grows until the next value is whole."""

    def __init__(self, file: DataFile, stream: io.TextIOWrapper):
        self._file, self._stream = file, stream
        self._text, self.at, self.line = "", 0, 1

    def _more(self) -> bool:
        piece = self._stream.read(max(1 << 18, len(self._text) - self.at))
        self._text, self.at = self._text[self.at :] + piece, 0
        return bool(piece)

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self.at, to)
        self.at = to

    def peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            match = _SPACE.match(self._text, self.at)
            self._advance(match.end() if match else self.at)
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self._error(ValueError(f"no comma or {character!r} behind a value"))
        self.at += 1

    def value(self) -> tuple[int, Raw]:
        if not self.peek():
            raise self._error(ValueError("the file ends within a value"))
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.at)
            except (ValueError, RecursionError) as error:
                wide = len(self._text) - self.at > 4 * MOST_BYTES
                if wide or isinstance(error, RecursionError) or not self._more():
                    raise self._error(error) from None
                continue
            line, size = self.line, end - self.at
            self._advance(end)
            origin = self._file.origin(line)
            if size > MOST_BYTES:
                return line, _too_long(origin)
            return line, value if isinstance(value, dict) else no_object(value, origin)

    def _error(self, error: Exception) -> DataError:
        line = self.line
        if isinstance(error, json.JSONDecodeError):
            line += self._text.count("\n", self.at, error.pos)
            error = ValueError(error.msg)
        return _not_json(self._file.origin(line), error)


def no_object(value: Any, origin: str) -> DataError:
    """The error for JSON that is no object."""
    return DataError(
        f"{origin} is a JSON {type(value).__name__}",
        wanted="an object with the fields of a row",
        do="mend or remove the line",
    )


def _csv(file: DataFile) -> Iterator[tuple[int, Raw]]:
    csv.field_size_limit(MOST_BYTES)
    with open_bytes(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        header = text.readline()
        tabs = "\t" in header and "," not in header
        delimiter = "\t" if tabs else ";" if ";" in header and "," not in header else ","
        names = next(csv.reader([header], delimiter=delimiter), [])
        if any(not name.strip() for name in names) or len(set(names)) < len(names):
            raise DataError(
                f"{file.path}:1 has the columns {', '.join(map(repr, names))}",
                wanted="a first line that names every column, each once",
                do="mend the first line",
            )
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            number = reader.line_num + 2
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{file.origin(number)} is not CSV: {error}",
                    wanted='cells with commas, quotes or line ends in "quotes"',
                    do="mend the line",
                ) from None
            if not cells:
                continue
            if len(cells) != len(names):
                yield (
                    number,
                    DataError(
                        f"{file.origin(number)} has {len(cells)} cells",
                        wanted=f"{len(names)}, as the first line: {', '.join(names)}",
                        do="mend or remove the line",
                    ),
                )
            else:
                yield number, dict(zip(names, cells))


def _parquet(file: DataFile) -> Iterator[tuple[int, Raw]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(record)
    except pyarrow.ArrowException as error:
        raise unreadable(file.path, error) from None
