"""The cache of tokens: a folder per source, made once, whole or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...media.file import MediaFile, is_unchanged
from ...storage import cache_folder, new_folder
from ..chat.encode import Task
from ..example import Facts, Store

_PACKAGE = Path(__file__).parents[2]
_FACTS, _MEDIA = "facts.json", "media.json"
_COLUMNS = ("lengths", "targets", "numbers", "digests")

CODE = (
    *("data/example.py", "data/read/files.py", "data/read/records.py", "data/read/sources.py"),
    *("data/chat/encode.py", "data/chat/formats.py", "data/chat/media.py", "data/chat/prompt.py"),
    *("data/chat/render.py", "data/chat/spans.py", "data/chat/thoughts.py"),
    *("data/store/cache.py", "data/store/workers.py", "media/audio.py", "media/file.py"),
    *("media/image.py", "media/kinds.py", "media/placeholders.py"),
)
"""The modules that decide what is stored: a change in one of them makes new entries."""

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "numpy", "soxr")
_OF_SOURCES = ("dataset_config", "dataset_split", "valid_fraction")
"""Settings that decide which rows are read, not what becomes of them."""


def tokens_key(task: Task) -> str:
    """What examples depend on besides their rows: tokenizer, template, settings, and code."""
    tokenizer = task.tokenizer
    made_of = [
        tokenizer.backend_tokenizer.to_str(),
        repr(tokenizer.chat_template),
        repr(sorted(tokenizer.special_tokens_map.items(), key=repr)),
        str(task.vocab_size),
        repr(task.media),
        repr([pair for pair in vars(task.config).items() if pair[0] not in _OF_SOURCES]),
        repr([_version(name) for name in _LIBRARIES]),
        *((_PACKAGE / name).read_text() for name in CODE),
    ]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an extra
        return None


def cached(key: str, build: Callable[[Path], Any]) -> Path:
    """The folder of a key in the cache, built if it is not there or not whole.

    A second process that wants the same key waits and then finds it; a build that ends early leaves
    nothing that is taken for whole. `build` writes a _FACTS with the size of every other file.

    Raises:
        DataError: the cache cannot be written.
    """
    root = cache_folder("tokens")
    folder = root / key
    if _is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f"{key}.lock").open("w") as lock:
            # The system releases the lock when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                with new_folder(folder, sync=True) as partial:
                    build(partial)
    except OSError as error:
        found = f"cannot write the token cache {root}: {error}"
        do = "free some space, or set MLX_GEMMA4_CACHE to another folder"
        raise DataError(found, wanted="room for four bytes a token", do=do) from None
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether every file has the size that was noted, and every medium is as it was."""
    try:
        noted = json.loads((folder / _FACTS).read_text())["sizes"]
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not (sizes.pop(_FACTS) > 0 and sizes == noted):
        return False
    return all(is_unchanged(file) for files in _media(folder).values() for file in files)


def _media(folder: Path) -> dict[int, tuple[MediaFile, ...]]:
    """The media of the examples in an entry, which has a file of them if there are any."""
    path = folder / _MEDIA
    stored = json.loads(path.read_text()) if path.is_file() else {}
    return {int(i): tuple(MediaFile(*file) for file in files) for i, files in stored.items()}


def write_store(parts: Iterable[Store], folder: Path) -> None:
    """Write stores as one; tokens go to the disk as they come."""
    facts = Facts()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    media: dict[int, tuple[MediaFile, ...]] = {}
    count = 0
    with (folder / "tokens.bin").open("wb") as file:
        for part in parts:
            part.tokens.tofile(file)
            facts.add(part.facts)
            media |= {count + i: files for i, files in part.media.items()}
            count += len(part)
            for name, arrays in columns.items():
                arrays.append(getattr(part, name))
    for name, arrays in columns.items():
        np.save(folder / f"{name}.npy", np.concatenate(arrays))
    if media:
        (folder / _MEDIA).write_text(json.dumps(media))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / _FACTS).write_text(json.dumps({"facts": vars(facts), "sizes": sizes}))


def open_store(folder: Path, place: str) -> Store:
    """What `write_store` wrote, memory-mapped."""
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
    facts = json.loads((folder / _FACTS).read_text())["facts"]
    facts |= {name: Counter(facts[name]) for name in ("shapes", "notes")}
    tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
    media = _media(folder)
    return Store(tokens=tokens, facts=Facts(**facts), place=place, media=media, **columns)
