"""A folder that appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError

__all__ = ["whole_folder"]


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block is done.

    It lies beside `folder` under a hidden name. The change of names is one step of the file
    system, so a process that is killed leaves the old folder or the new one. After an error the
    old folder is as it was and the new one is gone.

    Raises:
        ConfigError: `folder` is a file, its parent cannot be written, or it is there already and
            the file system cannot exchange two names.
    """
    folder = Path(folder).expanduser().absolute()
    partial = folder.with_name(f".partial-{folder.name}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"{folder} is a file", wanted="a folder to write to", do="name another output folder"
        )
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder}: {error}",
            wanted="a folder to write to",
            do="name another output folder",
        ) from None
    try:
        yield partial
        if folder.exists():
            _exchange(partial, folder)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
