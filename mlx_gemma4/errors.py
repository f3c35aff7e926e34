"""Every error says three things: what was found, what was wanted, what to do."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial


class Gemma4Error(Exception):
    """The root: what was found, what was wanted, and what the reader should do."""

    def __init__(self, found: str, *, wanted: str, do: str):
        super().__init__(f"{found}\n  wanted: {wanted}\n  do:     {do}")
        self.found, self.wanted, self.do = found, wanted, do

    def __reduce__(self):
        return partial(type(self), self.found, wanted=self.wanted, do=self.do), ()


class ConfigError(Gemma4Error):
    """A setting: unknown key, wrong type, two that exclude each other."""


class ModelError(Gemma4Error):
    """A checkpoint: missing, wrong kind, incomplete weights."""


class CapabilityError(ModelError):
    """A backbone that cannot do what was asked of it."""


class DataError(Gemma4Error):
    """A data file or a row that cannot be used."""


class AdapterError(Gemma4Error):
    """An adapter or a LoRA target that does not fit the model."""


class ExportError(Gemma4Error):
    """An export that does not do what the trained model does."""


class TrainingError(Gemma4Error):
    """A run that must not go on, such as a non-finite loss."""


def damaged(found: str, wanted: str, do: str = "download it again") -> ModelError:
    """The error for a file of a checkpoint that is not as it was published."""
    return ModelError(found, wanted=wanted, do=do)


def listing(names: Iterable[object], limit: int = 20) -> str:
    """Names for a message: indented, a line each, the count of what is left out last."""
    rows = [str(name) for name in names]
    shown = "".join(f"\n    {row}" for row in rows[:limit])
    return shown + (f"\n    ... and {len(rows) - limit} more" if len(rows) > limit else "")


def row_error(found: str, wanted: str, do: str = "mend or remove the line") -> DataError:
    """The error for a row that cannot be used."""
    return DataError(found, wanted=wanted, do=do)


def run_command(main: Callable[[], None]) -> None:
    """Run a command: what a user may meet ends it with one message at most, and no traceback.

    An error of ours and a full disk end with exit code 2, Ctrl-C with 130; a reader of the output
    that has gone, such as `| head`, with 141. Terminals without Unicode get escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "a file"
        print(
            f"error: cannot write {where}: {error.strerror}\n"
            "  wanted: a disk with room for it\n  do:     free some space",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except Gemma4Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, ImportError) as error:
        # Ctrl-C while MLX's extension is loading comes as an ImportError.
        if not isinstance(error.__cause__ or error, KeyboardInterrupt):
            raise
        print("stopped: what was saved is kept", file=sys.stderr)
        raise SystemExit(130) from None
