"""Images and audio that rows name: as parts of a turn, by paths that stay in the rows' folder.

A part is {"type": "text" | "image" | "audio", the same word: text or path}.
"""

from __future__ import annotations

from pathlib import Path

from ..read.records import row_error

MEDIA = {"image": "image", "image_url": "image", "audio": "audio", "audio_url": "audio"}
"""Types of parts, as files write them, and what we call them."""

_FIELDS = {"image": "image", "images": "image", "audio": "audio", "audios": "audio"}


def add_media(turns: list, record: dict) -> list:
    """Images and audio of the row as parts that come first in the first user turn."""
    parts = [
        {"type": kind, kind: path}
        for field, kind in _FIELDS.items()
        if (value := record.get(field))
        for path in (value if isinstance(value, list) else [value])
    ]
    if not parts:
        return turns
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and (turn.get("from") or turn.get("role")) in ("user", "human"):
            key = "value" if "from" in turn else "content"
            text = turn.get(key)
            rest = text if isinstance(text, list) else [{"type": "text", "text": text}]
            return [*turns[:i], {**turn, key: parts + rest}, *turns[i + 1 :]]
    raise row_error("images or audio and no user turn", "a user turn to show them in")


def media_part(part: dict, folder: Path | None, anywhere: bool) -> dict[str, str]:
    """A part that names a file, however it is written, with the whole path.

    Raises:
        DataError: an address instead of a path, a path outside the folder, or no file there.
    """
    kind = MEDIA[part["type"]]
    keys = (part["type"], kind, "path", "url")
    name = next((part[key] for key in keys if part.get(key)), None)
    if isinstance(name, dict):
        name = name.get("url") or name.get("path")
    told = f"has the {kind} {name!r}"[:220]
    if not isinstance(name, str):
        raise row_error(told, "the path of a file")
    name = name.removeprefix("file://")
    if "://" in name or name.startswith("data:") or folder is None:
        wanted = "a path within the data folder; nothing is downloaded"
        raise row_error(told, wanted, "save the file beside the rows and name its path")
    path = folder / name
    try:
        within, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError):
        within, there = True, False
    if not (within or anywhere):
        wanted = "paths within the folder of the rows"
        do = "move the file there, or set media_anywhere if you trust these rows"
        raise row_error(f"{told}, outside of {folder}", wanted, do)
    if not there:
        raise row_error(f"{told}, and no such file is in {folder}", "the path of a file")
    return {"type": kind, kind: str(path.resolve())}
