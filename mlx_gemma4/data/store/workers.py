"""Processes that turn rows into examples, one per core.

They are our own, with pipes: `multiprocessing` would run the user's script again in each of them,
and cannot start from every notebook.
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
from typing import Any

from ...errors import DataError
from ..chat.encode import Chunk, Task, encode_chunk
from ..example import Store


class Workers(contextlib.AbstractContextManager):
    """Processes, by default one per core, that encode chunks; results come in their order."""

    def __init__(self, task: Task, count: int | None = None):
        self._task, self._count = task, count or _cores()
        self._threads, self._own = ThreadPoolExecutor(self._count), threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def encode(self, jobs: Iterable[Chunk]) -> Iterator[Store]:
        """The encoded chunks, in order; a few are under way at any time."""
        pending: deque[Future[Store]] = deque()
        for chunk in jobs:
            pending.append(self._threads.submit(self._encode, chunk))
            if len(pending) > 2 * self._count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, chunk: Chunk) -> Store:
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
            found = f"a tokenizing process ended (exit code {code}): {error}"
            do = "close other programs and run again; what was read so far is not kept"
            raise DataError(found, wanted="memory for a process per core", do=do) from None
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


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve() -> None:
    """A worker: chunks from standard input, results or errors to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between answers
    questions = sys.stdin.buffer
    task = pickle.load(questions)
    result: Any
    with contextlib.suppress(EOFError):
        while chunk := pickle.load(questions):
            try:
                result = encode_chunk(task, chunk)
            except Exception as error:
                result = error
            pickle.dump(result, answers)
            answers.flush()
