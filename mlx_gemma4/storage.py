"""Files: written whole or not at all, JSON read with one kind of error; where caches lie."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, listing


@contextmanager
def new_file(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block is done.

    It lies beside `path` under a hidden name with the same suffix. After an error the old file is
    as it was and the new one is gone. With `sync` it is on the disk before its name changes.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        if sync:
            _to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with new_file(path) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested too deep.
    """
    return parse_json(Path(path).read_bytes())


def parse_json(content: bytes) -> Any:
    """As `read_json`."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@contextmanager
def new_folder(folder: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block is done.

    It lies beside `folder` under a hidden name; a process that is killed leaves the old folder or
    the new one. After an error the old folder is as it was and the new one is gone. With `sync` its
    files are on the disk before its name changes.

    Raises:
        ConfigError: `folder` is a file, its parent cannot be written, or it is there already and
            the file system cannot exchange two names.
    """
    folder = Path(folder).expanduser().absolute()
    partial = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
    remedy = {"wanted": "a folder to write to", "do": "name another output folder"}
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file", **remedy)
    try:
        _remove_abandoned(folder)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error}", **remedy) from None
    try:
        yield partial
        if sync:
            for path in partial.iterdir():
                _to_disk(path)
            _to_disk(partial)
        if folder.exists():
            _exchange(partial, folder)
        else:
            partial.rename(folder)
        if sync:
            _to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_replaceable(folder: Path, names: set[str] | None) -> None:
    """Refuse to replace a folder that holds anything but an earlier export.

    Args:
        names: the files of one; None for a model, which has to have a config.json of Gemma 4.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names is None:
        kept = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")
        names = {name for name in found if name.endswith(kept)} if "config.json" in found else set()
    if others := sorted(found - names):
        raise ConfigError(
            f"{folder} holds other files:{listing(others)}",
            wanted="a new folder, or one with an earlier export, so that nothing is lost",
            do="name another output folder",
        )


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed left of earlier attempts at a folder."""
    for path in folder.parent.glob(f".partial-*-{folder.name}"):
        process = path.name.split("-")[1]
        try:
            if process.isdecimal() and int(process) != os.getpid():
                os.kill(int(process), 0)
                continue
        except PermissionError:
            continue
        except ProcessLookupError:
            pass
        shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Give two folders each other's name, at once: renameat2(2), or renamex_np(2) on macOS."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], 2)  # RENAME_EXCHANGE
    else:
        failed, _ = -1, ctypes.set_errno(38)
    if failed:
        raise ConfigError(
            f"{other} exists and cannot be replaced in one step: {os.strerror(ctypes.get_errno())}",
            wanted="a folder that is not there yet; nothing was changed",
            do="name another output folder, or remove this one first",
        )


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, whose fsync stops at the drive's own cache
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
        else:
            os.fsync(handle)
    finally:
        os.close(handle)


_HASHES = "hashes.json"


def write_hashes(folder: Path) -> None:
    """Write hashes.json, by which `damaged_files` knows the files that a folder holds now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _HASHES)
    found = {str(path.relative_to(folder)): hash_file(path) for path in files}
    write_json(folder / _HASHES, found)


def damaged_files(folder: Path) -> list[str]:
    """The files of a folder that are not as `write_hashes` saw them, or are gone."""
    try:
        hashes = dict(read_json(folder / _HASHES))
    except (OSError, ValueError, TypeError):
        hashes = {}

    def is_whole(name: str) -> bool:
        try:
            return hash_file(folder / name) == hashes[name]
        except (OSError, ValueError):
            return False

    return [name for name in hashes if not is_whole(name)] if hashes else [_HASHES]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content: gigabytes take seconds, and no change escapes it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def cache_folder(name: str = "") -> Path:
    """MLX_GEMMA4_CACHE, or ~/.cache/mlx_gemma4; `name` is a folder in it. Nothing is made."""
    root = os.environ.get("MLX_GEMMA4_CACHE", "~/.cache/mlx_gemma4")
    return Path(root).expanduser() / name


def size(nbytes: float) -> str:
    """Bytes for people.

    >>> size(12.34e9), size(45e6), size(1234)
    ('12.3 GB', '45 MB', '1 kB')
    """
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if abs(nbytes) >= power:
            return f"{nbytes / power:.{1 if unit == 'GB' or nbytes < 1e7 else 0}f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"
