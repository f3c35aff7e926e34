"""Rows -> encoded examples, in this process or in one per core.

The workers are Python processes of our own with pipes, not `multiprocessing`: that would run the
user's script again in each of them, and cannot start from every notebook.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import DataError
from .batches import Example
from .chat import encode_rows
from .formats import Manner, Row, column_map, row_of
from .records import Raw
from .store import Encoded, Facts

__all__ = ["Chunk", "Task", "Workers", "chunks", "cores", "encode_chunk"]

_ROWS, _BYTES = 1000, 1 << 20


@dataclass(frozen=True)
class Task:
    """What does not change from row to row.

    Attributes:
        tokenizer: the transformers tokenizer.
        vocab_size: ids at or above it are refused.
        config: how rows become examples.
    """

    tokenizer: Any
    vocab_size: int
    config: DataConfig


@dataclass(frozen=True)
class Chunk:
    """Some raw rows of one source.

    Attributes:
        place: what stands before a row's number in messages.
        folder: where paths of media begin.
        rows: (number, raw row).
    """

    place: str
    folder: Path | None
    rows: list[tuple[int, Raw]]


def chunks(place: str, folder: Path | None, records: Iterable[tuple[int, Raw]]) -> Iterator[Chunk]:
    """Raw rows in chunks of at most a thousand, or about a megabyte of lines."""
    rows, size = [], 0
    for number, raw in records:
        rows.append((number, raw))
        size += len(raw) if isinstance(raw, bytes) else 0
        if len(rows) == _ROWS or size > _BYTES:
            yield Chunk(place, folder, rows)
            rows, size = [], 0
    if rows:
        yield Chunk(place, folder, rows)


def encode_chunk(task: Task, chunk: Chunk) -> Encoded:
    """The examples of some rows.

    Raises:
        DataError: the first row that cannot be used, unless such rows are to be skipped.
    """
    config, facts = task.config, Facts()
    manner = Manner(column_map(config.columns), chunk.folder, config.media_anywhere)
    rows = [_row_or_error(raw, f"{chunk.place}{number}", manner) for number, raw in chunk.rows]
    good = [row for row in rows if isinstance(row, Row)]
    encoded = iter(encode_rows(good, task.tokenizer, config.train_on, config.thinking, facts.notes))
    examples, numbers = [], []
    for (number, _), row in zip(chunk.rows, rows):
        try:
            if isinstance(row, DataError):
                raise row
            example = _whole(next(encoded))
            _require_known(example, task.vocab_size)
            fitted = _fit(example, config)
        except DataError as error:
            if config.on_bad_row == "error":
                raise
            facts.add(Facts(bad=1, bad_rows=[error.found]))
            continue
        facts.shapes[row.shape] += 1
        if fitted is None:
            facts.skipped += 1
            continue
        facts.truncated += fitted is not example
        examples.append(fitted)
        numbers.append(number)
    return Encoded.of(examples, numbers, facts)


def _row_or_error(raw: Raw, origin: str, manner: Manner) -> Row | DataError:
    try:
        return row_of(raw, origin, manner)
    except DataError as error:
        return error


def _whole(example: Example | DataError) -> Example:
    if isinstance(example, DataError):
        raise example
    return example


def _fit(example: Example, config: DataConfig) -> Example | None:
    """The example within max_seq_length, or None to skip it."""
    length = config.max_seq_length
    if len(example) <= length:
        return example
    if config.overlong == "skip":
        return None
    if config.overlong == "error":
        raise DataError(
            f"{example.origin} has {len(example):,} tokens",
            wanted=f"at most max_seq_length, {length:,}",
            do="raise max_seq_length, or set overlong to skip or truncate",
        )
    kept = np.arange(length)
    if config.truncate_from == "start":
        kept = np.concatenate([[0], np.arange(len(example) - length + 1, len(example))])
    cut = replace(example, tokens=example.tokens[kept], mask=example.mask[kept])
    return cut if cut.num_targets else None


def _require_known(example: Example, vocab_size: int) -> None:
    highest = int(np.max(example.tokens))
    if highest >= vocab_size:
        raise DataError(
            f"{example.origin} has the token id {highest}",
            wanted=f"ids below {vocab_size}, the model's vocabulary",
            do="use the tokenizer of the checkpoint",
        )


class Workers:
    """Processes that encode chunks; results come in the order of the chunks.

    Args:
        task: sent to each process once.
        count: how many; by default one per core.
    """

    def __init__(self, task: Task, count: int | None = None):
        self._task = task
        self._count = count or cores()
        self._own = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def encode(self, jobs: Iterable[Chunk]) -> Iterator[Encoded]:
        """The encoded chunks, in order; a few are under way at any time."""
        self._threads = self._threads or ThreadPoolExecutor(self._count)
        pending: deque[Future[Encoded]] = deque()
        for chunk in jobs:
            pending.append(self._threads.submit(self._encode, chunk))
            if len(pending) > 2 * self._count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, chunk: Chunk) -> Encoded:
        """Runs in a thread that has a process of its own."""
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        try:
            if process is None:
                process = self._own.process = self._start()
            assert process.stdin and process.stdout
            pickle.dump(chunk, process.stdin)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = process.wait(10) if process else None
            raise DataError(
                f"a tokenizing process ended (exit code {code}): {error}",
                wanted="enough memory for one process per core",
                do="close other programs and run again; what was read so far is not kept",
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve()"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        self._processes.append(process)
        assert process.stdin
        pickle.dump(self._task, process.stdin)
        return process


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve() -> None:
    """A worker: chunks from standard input, results to standard output, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between answers
    questions = sys.stdin.buffer
    task = pickle.load(questions)
    while True:
        try:
            chunk = pickle.load(questions)
        except EOFError:
            return
        result: Any
        try:
            result = encode_chunk(task, chunk)
        except Exception as error:
            result = error
        pickle.dump(result, answers)
        answers.flush()
