"""Which files a source names, and what each of them is, told by its content."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ... import storage
from ...errors import DataError, listing
from ...extras import import_extra
from ...trust import require_inside
from .records import Raw, csv_rows, json_values, lines, parquet_rows

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev"), "valid"
)
_NAME = re.compile(
    rf"({'|'.join(SPLIT_NAMES)})(?:[-_.]\d[\w-]*)?"
    r"\.(jsonl|ndjson|json|csv|tsv|parquet)((?:\.gz|\.zst)?)"
)
_READERS = {"jsonl": lines, "json": json_values, "csv": csv_rows, "parquet": parquet_rows}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_WANTED = "rows as JSONL, JSON, CSV or Parquet, in UTF-8, also .gz or .zst"


@dataclass(frozen=True)
class DataFile:
    """A file of rows; its kind is one of _READERS, its compression ".gz", ".zst" or ""."""

    path: Path
    kind: str
    compression: str = ""

    count = None

    @property
    def label(self) -> str:
        """The kind as a file ending: "jsonl.gz"."""
        return self.kind + self.compression

    @property
    def place(self) -> str:
        """What stands before a row's number: "file:", or "file:row " where there are no lines."""
        return f"{self.path}:row " if self.kind == "parquet" else f"{self.path}:"

    @property
    def folder(self) -> Path:
        """Where paths of images and audio begin."""
        return self.path.parent

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def fingerprint(self) -> str:
        """Changes with the content, and with what it is read as."""
        return f"{self.label} {hash_file(self.path)}"

    def records(self) -> Iterator[tuple[int, Raw]]:
        """(line, raw row) of every row; a DataError if the file as a whole cannot be read on."""
        with _readable(self.path), _opened(self.path, self.compression) as stream:
            yield from _READERS[self.kind](stream, self.place)

    @classmethod
    def of(cls, path: Path) -> DataFile:
        """What a file is, by its first bytes; its name decides only what those leave open.

        A DataError refuses a file that cannot be read, or holds something other than rows.
        """
        with _readable(path):
            with path.open("rb") as file:
                start = file.read(4)
            compression = next((c for m, c in _MAGIC.items() if start.startswith(m)), "")
            with _opened(path, compression) as stream:
                head = stream.read(4096)
        suffixes = [s for s in path.suffixes if s not in _MAGIC.values()]
        kind = _kind(head, suffixes[-1].lower() if suffixes else "")
        if kind == "parquet" and compression:
            kind = "a compressed Parquet file"
        if kind in _READERS:
            return cls(path, kind, compression)
        do = "convert the file, or name another"
        raise DataError(f"{path} is {kind}", wanted=_WANTED, do=do)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of reading that come out of the block name the file."""
    try:
        yield
    except (OSError, EOFError, csv.Error) as error:
        found = f"cannot read {path}: {error}"
        raise DataError(found, wanted=_WANTED, do="check the file") from None


def _opened(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".zst":
        pyarrow = import_extra("pyarrow", "data")
        source = pyarrow.OSFile(str(path))
        return io.BufferedReader(pyarrow.CompressedInputStream(source, "zstd"), 1 << 20)
    return path.open("rb", buffering=1 << 20)


def _kind(head: bytes, suffix: str) -> str:
    """The kind of a file, or what it is instead, for a message."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if b"\0" in head and first not in (b"{", b"["):
        return "a binary file"
    if suffix in (".csv", ".tsv"):
        return "csv"
    if first == b"[":
        return "json"
    if first == b"{" or suffix in (".jsonl", ".ndjson", ".json"):
        return "json" if suffix == ".json" and first == b"{" else "jsonl"
    return "a file of a kind that is not known"


def hash_file(path: Path) -> str:
    """As `storage.hash_file`, with a DataError."""
    with _readable(path):
        return storage.hash_file(path)


def find_files(source: str | Path) -> dict[str, list[DataFile]]:
    """The files of each split: of a folder its train, valid and test files, of a file train.

    A split is one file or several (`train-00000-of-00002.parquet`); see SPLIT_NAMES for its names.

    A DataError refuses a path that is neither, no train file, a split in two formats, and a link
    out of the folder.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return {"train": [DataFile.of(source)]}
    if not source.is_dir():
        found = f"{source} is no file" if source.exists() else f"{source} does not exist"
        wanted = "a folder with train.jsonl, a file of rows, or the id of a Hub dataset"
        raise DataError(found, wanted=wanted, do="check the path given as data")
    with _readable(source):
        paths = sorted(source.iterdir())
    splits: dict[str, list[re.Match]] = {split: [] for split in SPLITS}
    for path in paths:
        if (match := _NAME.fullmatch(path.name)) and not path.is_dir():
            require_inside(path, source, DataError)
            splits[SPLIT_NAMES[match[1]]].append(match)
    if not splits["train"]:
        held = ", ".join(path.name for path in paths[:10]) or "nothing"
        found = f"{source} has no train.jsonl; it holds {held}"
        wanted = "train.jsonl (.json, .csv, .parquet), and if you have them valid and test"
        raise DataError(found, wanted=wanted, do="rename the file, or name it as data")
    for split, names in splits.items():
        if len({name.groups() for name in names}) > 1:
            several = listing(name.string for name in names)
            found = f"{source} has the {split} split in several forms:{several}"
            raise DataError(found, wanted="one form of each split", do="remove the others")
    return {
        split: [DataFile.of(source / name.string) for name in names]
        for split, names in splits.items()
        if names
    }
