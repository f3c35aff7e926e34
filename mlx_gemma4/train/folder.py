"""The folder of a run: claimed before anything is read, and locked while the run lives."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml

from ..errors import TrainingError
from ..storage import write_text
from .checkpoint import Checkpoints, writing

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
REPORT, EVALUATION = "report.html", "evaluation.json"
_LOCK = "lock"
_FILES = ("model", "data", "init_from", "sample_prompts")


@dataclass(frozen=True)
class RunFolder:
    """A folder that is claimed; `resumed` if it is that of an earlier run."""

    path: Path
    resumed: bool

    def note(self, settings: Mapping[str, Any]) -> None:
        """Write config.yaml: what `--resume` and `--config` need to know, from any folder."""
        given = {key: settings[key] for key in _FILES if settings.get(key)}
        paths = {key: os.path.abspath(path) for key, path in given.items() if os.path.exists(path)}
        with writing(self.path / CONFIG):
            write_text(self.path / CONFIG, yaml.safe_dump({**settings, **paths}))


@contextmanager
def claim(output: str | Path | None, resume: bool | str = False) -> Iterator[RunFolder]:
    """Make the folder of a run, or find that of an earlier one, and hold its lock.

    A run that fails before its first report leaves nothing there; one that is interrupted leaves
    its settings, so that it can be resumed.

    Args:
        output: None takes the first of runs/1, runs/2, ... that is free.
        resume: the folder is that of an earlier run; "auto": if it is one.

    Raises:
        TrainingError: a folder that cannot be written, holds a run or none, or is in use.
    """
    path = Path(output) if output is not None else None
    if resume == "auto":
        resume = path is not None and is_run(path)
    if resume and (path is None or not is_run(path)):
        raise TrainingError(
            f"{path} has no checkpoint to resume from",
            wanted="the output folder of an earlier run",
            do="check the output folder, or start without resume",
        )
    found = set(path.iterdir()) if path and path.is_dir() else None
    try:
        path = _make(path)
        lock = _lock(path)
    except OSError as error:
        is_file = path is not None and path.exists() and not path.is_dir()
        raise TrainingError(
            f"{path} is a file" if is_file else f"cannot write to the folder {path}: {error}",
            wanted="a folder to write to",
            do="name another output folder",
        ) from None
    try:
        if not resume and (Checkpoints(path, 1, {}).newest() or (path / METRICS).exists()):
            raise TrainingError(
                f"{path} holds a run",
                wanted="a new output folder, so that nothing is lost",
                do="name another output folder, or resume",
            )
        yield RunFolder(path, bool(resume))
    except Exception:
        if not resume and not (path / METRICS).exists():
            _leave(path, found)
        raise
    finally:
        lock.close()


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, however far it came."""
    return (path / CONFIG).is_file() or Checkpoints(path, 1, {}).newest() is not None


def run_of(adapter: str | Path) -> Path | None:
    """The run that an adapter is of: its folder, adapter/ or one of its checkpoints is named."""
    path = Path(adapter).expanduser()
    return next((place for place in [path, *path.parents[:2]] if is_run(place)), None)


def newest_run() -> Path | None:
    """The run of the highest number in runs/."""
    found = [path for path in Path("runs").glob("*") if path.name.isdecimal() and is_run(path)]
    return max(found, key=lambda path: int(path.name), default=None)


def is_running(path: Path) -> bool:
    """Whether a run holds the lock of its folder now."""
    try:
        with (path / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _make(path: Path | None) -> Path:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        return path
    for path in map(Path, map("runs/{}".format, count(1))):
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("numbers do not end")


def _lock(path: Path) -> IO[str]:
    """The system releases the lock when the file is closed or the process ends, however it ends."""
    file = (path / _LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise TrainingError(
            f"{path} is in use by a run that has not ended",
            wanted="an output folder of its own for every run",
            do="name another output folder, or wait for that run",
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise
    return file


def _leave(path: Path, found: set[Path] | None) -> None:
    """Take away what a run brought that did not begin; `found` was there before."""
    if found is None:
        shutil.rmtree(path, ignore_errors=True)
    else:
        for name in (CONFIG, _LOCK):
            if path / name not in found:
                (path / name).unlink(missing_ok=True)
