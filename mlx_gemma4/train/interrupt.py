"""Ctrl-C and SIGTERM: the first ends a run after its step, with all saved; a second at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .run import Run

_USUAL: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """While the block lasts, they set `run.interrupted`. Handlers of others are left alone."""
    is_main = threading.current_thread() is threading.main_thread()
    ours = [s for s, usual in _USUAL.items() if is_main and signal.getsignal(s) is usual]

    def stop(number: int, _: object) -> None:
        signal.signal(number, _USUAL[signal.Signals(number)])
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        run.interrupted = True
        run.stop(name)
        with suppress(RuntimeError):  # a line is being printed at this moment
            print(f"\n{name}: saving after this step; once more stops at once", file=sys.stderr)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _USUAL[number])
