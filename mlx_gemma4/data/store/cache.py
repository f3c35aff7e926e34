"""The cache of tokens: a folder per source, made once, whole or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...storage import cache_folder, new_folder
from ..chat.encode import Task
from .arrays import FACTS_FILE

__all__ = ["CODE", "cached", "tokens_key"]

CODE = (
    *("example.py", "read/files.py", "read/records.py", "read/sources.py"),
    *("chat/encode.py", "chat/formats.py", "chat/media.py", "chat/render.py", "chat/spans.py"),
    *("store/arrays.py", "store/workers.py"),
)
"""The modules that decide what is stored: a change in one of them makes new entries."""

_DATA = Path(__file__).parent.parent
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "numpy")
_SETTINGS = (
    *("train_on", "thinking", "max_seq_length", "overlong", "truncate_from"),
    *("on_bad_row", "columns", "media_anywhere"),
)


def tokens_key(task: Task) -> str:
    """What examples depend on besides their rows: tokenizer, template, settings, and code."""
    tokenizer = task.tokenizer
    made_of = [
        tokenizer.backend_tokenizer.to_str(),
        repr(tokenizer.chat_template),
        repr(sorted(tokenizer.special_tokens_map.items(), key=repr)),
        str(task.vocab_size),
        repr([(name, getattr(task.config, name)) for name in _SETTINGS]),
        repr([importlib.metadata.version(name) for name in _LIBRARIES]),
        *((_DATA / name).read_text() for name in CODE),
    ]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()


def cached(key: str, build: Callable[[Path], Any]) -> Path:
    """The folder of a key in the cache, built if it is not there or not whole.

    A second process that wants the same key waits and then finds it. A build that ends early,
    killed or not, leaves nothing that is taken for whole. `build` writes into the folder it is
    given, with a FACTS_FILE that tells the size of every other file.

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
        raise DataError(
            f"cannot write the token cache {root}: {error}",
            wanted="room for four bytes a token",
            do="free some space, or set MLX_GEMMA4_CACHE to another folder",
        ) from None
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether every file has the size that was noted when it was written."""
    try:
        noted = json.loads((folder / FACTS_FILE).read_text())["sizes"]
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return sizes.pop(FACTS_FILE) > 0 and sizes == noted
