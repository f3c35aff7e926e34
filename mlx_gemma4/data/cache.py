"""The cache of tokens: a folder per source, made once, whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["cache_root", "cached", "seal", "sealed_facts"]

_SEAL = "facts.json"


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _SEAL
    }


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Bring a folder to the disk, and write last what says that it is whole."""
    for path in folder.iterdir():
        _to_disk(path)
    (folder / _SEAL).write_text(json.dumps({"facts": facts, "sizes": _sizes(folder)}))
    _to_disk(folder / _SEAL)


def sealed_facts(folder: Path) -> dict[str, Any]:
    """The facts that a folder was sealed with."""
    return json.loads((folder / _SEAL).read_text())["facts"]


def _is_whole(folder: Path) -> bool:
    try:
        facts: dict[str, Any] = json.loads((folder / _SEAL).read_text())
        return facts["sizes"] == _sizes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def cache_root() -> Path:
    """MLX_GEMMA4_CACHE, or ~/.cache/mlx_gemma4; tokens lie in `tokens` there."""
    return Path(os.environ.get("MLX_GEMMA4_CACHE", "~/.cache/mlx_gemma4")).expanduser() / "tokens"


def cached(key: str, build: Callable[[Path], Any]) -> Path:
    """The folder of a key in the cache, built if it is not there or not whole.

    A second process that wants the same key waits and then finds it. A build that ends early,
    killed or not, leaves nothing that is taken for whole; the next one clears it away.

    Args:
        key: what the content depends on.
        build: writes the content into the folder it is given.

    Raises:
        DataError: the cache cannot be written.
    """
    root = cache_root()
    folder, partial = root / key, root / f"{key}.partial"
    if _is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock"):
            if not _is_whole(folder):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    build(partial)
                    shutil.rmtree(folder, ignore_errors=True)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {root}: {error}",
            wanted="room for four bytes a token",
            do="free some space, or set MLX_GEMMA4_CACHE to another folder",
        ) from None
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
