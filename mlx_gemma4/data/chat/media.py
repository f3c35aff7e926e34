"""Images and audio of rows: parts of a turn, by the path of a file each.

A part is {"type": "text" | "image" | "audio", the same word: text or path}. Paths stay in the
rows' folder. What the row holds itself becomes a file in the cache, named by its content.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...media.kinds import content_of, kept
from ..read.records import row_error

MEDIA = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
}
"""Types of parts, as files write them, and what we call them."""

_FIELDS = {"audio": ("audio", "audios"), "image": ("image", "images")}
_MARKS = {"audio": "<audio>", "image": "<image>"}  # where LLaVA's rows have media in their text
_BASE64 = {
    "image": ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD"),
    "audio": ("UklGR", "ZkxhQ", "T2dnU", "SUQz"),
}
"""How base64 of a JPEG, PNG, WebP and GIF file begins, and of a WAV, FLAC, Ogg and MP3 file."""


def add_media(turns: list, record: dict) -> list:
    """Turns with the images and audio of the row's own columns as parts.

    They take the places that wait for them, parts without content or <image> and <audio> in a
    text, and without any place come first in the first user turn.

    Raises:
        DataError: more or fewer places than there are media of a kind.
    """
    for kind, fields in _FIELDS.items():
        given = (record.get(field) for field in fields)
        values = (value for value in given if not _is_empty(value))
        lists = (value if isinstance(value, list) else [value] for value in values)
        if parts := [{"type": kind, kind: value} for values in lists for value in values]:
            turns = _placed(turns, parts, kind)
    return turns


def _is_empty(value: Any) -> bool:
    """Whether a column or a part holds nothing; arrays have no truth of their own."""
    return value is None or (isinstance(value, (str, bytes, list, dict)) and not value)


def _placed(turns: list, media: list[dict], kind: str) -> list:
    split = [_with_marks(turn, _MARKS[kind], kind) for turn in turns]
    shown = [part for turn in split for part in _parts(turn) if MEDIA.get(part["type"]) == kind]
    if not shown:
        return _first(turns, media)
    waiting = [part for part in shown if _content_of(part) is None]
    if len(waiting) != len(media):
        word = {"image": "images", "audio": "recordings"}[kind]
        found = f"has {len(media)} {word}, and {len(waiting)} places for them in its turns"
        raise row_error(found, "a place for each, or none at all")
    for place, medium in zip(waiting, media):
        place.update(medium)
    return split


def _first(turns: list, parts: list[dict]) -> list:
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and (turn.get("from") or turn.get("role")) in ("user", "human"):
            key = _key(turn)
            text = turn.get(key)
            rest = text if isinstance(text, list) else [{"type": "text", "text": text}]
            return [*turns[:i], {**turn, key: parts + rest}, *turns[i + 1 :]]
    raise row_error("images or audio and no user turn", "a user turn to show them in")


def _key(turn: dict) -> str:
    return "value" if "from" in turn else "content"


def _with_marks(turn: Any, mark: str, kind: str) -> Any:
    """A copy of a turn; its text is cut into parts where it has marks."""
    if not isinstance(turn, dict):
        return turn
    content = turn.get(_key(turn))
    if isinstance(content, str) and mark in content:
        first, *rest = content.split(mark)
        pieces: list = [{"type": "text", "text": first}]
        for text in rest:
            pieces += [{"type": kind}, {"type": "text", "text": text}]
        content = [piece for piece in pieces if piece.get("text", mark).strip()]
    elif isinstance(content, list):
        content = [{**part} if isinstance(part, dict) else part for part in content]
    return {**turn, _key(turn): content}


def _parts(turn: Any) -> Iterator[dict]:
    """The parts of a turn that say their type."""
    content = turn.get(_key(turn)) if isinstance(turn, dict) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("type"), str):
            yield part


def _content_of(part: dict) -> Any:
    """What a part of media holds or names, or None."""
    keys = (part["type"], MEDIA[part["type"]], "path", "url", "bytes", "base64")
    value = next((part[key] for key in keys if not _is_empty(part.get(key))), None)
    if isinstance(value, dict) and "array" not in value:
        names = ("bytes", "data", "url", "path")
        value = next((value[name] for name in names if not _is_empty(value.get(name))), None)
    return value


def media_part(part: dict, folder: Path | None, anywhere: bool) -> dict[str, str]:
    """A part, however it is written, with the whole path of its file.

    Raises:
        DataError: an address instead of a path, a path outside the folder, or no file there.
    """
    kind, value = MEDIA[part["type"]], _content_of(part)
    content = content_of(kind, value)
    if content is None and isinstance(value, str):
        content = _decoded(value, kind)
    if content is not None:
        return {"type": kind, kind: str(kept(kind, content))}
    return {"type": kind, kind: str(_within(value, kind, folder, anywhere))}


def _decoded(value: str, kind: str) -> bytes | None:
    """The content of a file that is written as base64; None for a path."""
    is_address = value[:5].lower() == "data:"
    if not is_address and not value.startswith(_BASE64[kind]):
        return None
    head, _, text = value.partition(",") if is_address else (";base64", "", value)
    try:
        if head.endswith(";base64"):
            return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        pass
    example = {"image": "image/png", "audio": "audio/wav"}[kind]
    found = f"has the {kind} {value[:40]!r}..., which is not base64"
    raise row_error(found, f"a path, or data:{example};base64,...")


def _within(name: Any, kind: str, folder: Path | None, anywhere: bool) -> Path:
    """The file that a row names, in the folder of the rows unless it may be anywhere."""
    told = f"has the {kind} {name!r}"[:220]
    if not isinstance(name, str):
        raise row_error(told, "the path of a file")
    name = name.removeprefix("file://")
    if "://" in name or name.startswith("data:") or not (folder or anywhere):
        wanted = "a path within the data folder; nothing is downloaded"
        raise row_error(told, wanted, "save the file beside the rows and name its path")
    home = folder or Path.cwd()
    path = home / name
    try:
        within, there = path.resolve().is_relative_to(home.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError):
        within, there = True, False
    if not (within or anywhere):
        wanted = "paths within the folder of the rows"
        do = "move the file there, or set media_anywhere if you trust these rows"
        raise row_error(f"{told}, outside of {home}", wanted, do)
    if not there:
        raise row_error(f"{told}, and no such file is in {home}", "the path of a file")
    return path.resolve()
