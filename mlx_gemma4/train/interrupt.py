"""Ctrl-C: the first one ends a run after its step, with all saved; a second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .run import Run


@contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """While the block lasts, Ctrl-C sets `run.interrupted`. Handlers of others are left alone."""
    usual = signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, usual)
        run.interrupted = True
        run.stop("Ctrl-C")
        with suppress(RuntimeError):  # a line is being printed at this moment
            print("\nCtrl-C: saving after this step; once more stops at once", file=sys.stderr)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
