"""Batches on their way to the model: built, with PLE rows from disk, while the device works."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ..data.batches import Batch, Example, collate_alike
from ..data.order import Rows
from ..gemma import Gemma4
from ..model.ple import GatheredRows

__all__ = ["prepared"]

Tag = TypeVar("Tag")
_Built = list[tuple[Batch, GatheredRows | None]]


def prepared(
    gemma: Gemma4, examples: Sequence[Example], steps: Iterable[tuple[Tag, Sequence[Rows]]]
) -> Iterator[tuple[Tag, list[Batch]]]:
    """The batches of each step, ready for the model; the next step's are built meanwhile.

    Args:
        examples: what the rows are indices of.
        steps: for each step anything, which is handed on, and the rows of its batches.
    """

    def build(batches: Sequence[Rows]) -> _Built:
        """On the other thread: reads examples and rows, and leaves the device alone."""
        built = collate_alike([[[examples[i] for i in row] for row in rows] for rows in batches])
        source = gemma.loaded.ple_rows
        return [
            (batch, source.gather(np.asarray(batch.tokens_BT)) if source else None)
            for batch in built
        ]

    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting = None
        for tag, batches in steps:
            ahead = tag, worker.submit(build, batches)
            if waiting is not None:
                yield waiting[0], _finish(gemma, waiting[1].result())
            waiting = ahead
        if waiting is not None:
            yield waiting[0], _finish(gemma, waiting[1].result())


def _finish(gemma: Gemma4, built: _Built) -> list[Batch]:
    return [batch.with_ple_rows(gemma, gathered) for batch, gathered in built]
