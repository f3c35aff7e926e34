"""Batches on their way to the model: the next step's are built while the device works."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from ..data.batch.collate import collate_alike
from ..data.batch.order import BatchOrder, Rows
from ..data.example import Example, Examples
from ..gemma import Gemma4
from ..media.file import MediaFile
from ..model.ple import GatheredRows
from ..nn.batch import Batch
from .soft_tokens import Found, SoftTokens

Tag = TypeVar("Tag")
Built = tuple[list[Batch], list[GatheredRows | None], list[list[MediaFile]], Found]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, and the number of the next batch."""

    step: int = 0
    next_batch: int = 0


@dataclass(frozen=True)
class Step:
    """What the trainer takes for one optimizer step.

    Attributes:
        batches: of the accumulation, with their PLE rows.
        num_tokens: of the examples in them, without padding.
        progress: of the run when the step is done.
        examples: those in the batches, for messages.
    """

    batches: Sequence[Batch]
    num_tokens: int
    progress: Progress
    examples: Sequence[Example] = ()


def training_steps(
    gemma: Gemma4,
    examples: Sequence[Example],
    order: BatchOrder,
    start: Progress,
    total: int,
    accumulation: int = 1,
    soft: SoftTokens | None = None,
) -> Iterator[Step]:
    """The steps of a run after `start`, up to step `total`, with `accumulation` batches each."""
    every = Examples.of(examples)

    def rows_of_steps() -> Iterator[tuple[tuple[np.ndarray, Progress], list[Rows]]]:
        stream = order.batches(start.next_batch)
        for number in range(start.step + 1, total + 1):
            numbered = list(islice(stream, accumulation))
            batches = [rows for _, rows in numbered]
            chosen = np.array([i for rows in batches for row in rows for i in row])
            yield (chosen, Progress(number, numbered[-1][0] + 1)), batches

    for (chosen, progress), batches in prepared(gemma, examples, rows_of_steps(), soft):
        tokens = int(every.lengths[chosen].sum())
        yield Step(batches, tokens, progress, Examples(every.stores, every.order[chosen]))


def prepared(
    gemma: Gemma4,
    examples: Sequence[Example],
    steps: Iterable[tuple[Tag, Sequence[Rows]]],
    soft: SoftTokens | None = None,
) -> Iterator[tuple[Tag, list[Batch]]]:
    """The batches of each step, ready for the model; the next step's are built meanwhile.

    Args:
        examples: what the rows are indices of.
        steps: for each step anything, which is handed on, and the rows of its batches.
        soft: gives soft tokens of media, instead of the encoders in the step.
    """

    source = gemma.loaded.ple_rows

    def build(batches: Sequence[Rows]) -> Built:
        """On the other thread: reads examples, media and PLE rows, and leaves the device alone."""
        chosen = [[[examples[i] for i in row] for row in rows] for rows in batches]
        flat = [[example for row in rows for example in row] for rows in chosen]
        found = soft.read(example for own in flat for example in own) if soft else {}
        built = collate_alike(chosen, media=gemma.media, encoded=soft is not None)
        tables = [
            source.gather(np.asarray(b.table_tokens(gemma.plan))) if source else None for b in built
        ]
        return built, tables, [[file for e in own for file in e.media] for own in flat], found

    with ThreadPoolExecutor(max_workers=1) as worker:
        submitted = ((tag, worker.submit(build, batches)) for tag, batches in steps)
        following = next(submitted, None)
        while following:
            (tag, building), following = following, next(submitted, None)
            built, tables, files, found = building.result()
            if soft and found:
                built = soft.put_into(built, files, found)
            yield tag, [b.with_ple_rows(gemma, rows) for b, rows in zip(built, tables)]
