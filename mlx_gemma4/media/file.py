"""`MediaFile`: an image or a recording by its file, which may come from a stranger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import Gemma4Error, row_error


class MediaFile(NamedTuple):
    """A medium of an example: where its file is, and what the file was when it was read.

    Attributes:
        kind: "image" or "audio".
        columns, rows: of soft tokens; audio has one row.
        digest: of the content.
        size, changed: bytes of the file, and its time of change in nanoseconds.
    """

    kind: str
    path: str
    columns: int
    rows: int
    digest: str
    size: int
    changed: int

    @property
    def num_tokens(self) -> int:
        """Soft tokens: as many tokens of the kind stand in the text."""
        return self.columns * self.rows


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a file."""
    found = Path(path).stat()
    return found.st_size, found.st_mtime_ns


def is_unchanged(file: MediaFile) -> bool:
    """Whether the file is there with the size and time that it had."""
    try:
        return stamp(file.path) == (file.size, file.changed)
    except OSError:
        return False


def name_of(source: str | bytes) -> str:
    """What a message calls a path, or the content of a file."""
    return "in the row" if isinstance(source, bytes) else source


@contextmanager
def told(what: str, wanted: str) -> Iterator[None]:
    """Whatever a decoder raises, as one line."""
    try:
        yield
    except Gemma4Error:
        raise
    except Exception as error:  # anything: another library reads files that may be broken
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise row_error(f"the {what} cannot be read: {reason}", wanted) from None
