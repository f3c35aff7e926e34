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
from ..data.batch.shapes import NO_SHAPES, Shapes
from ..data.example import Example, Examples
from ..gemma import Gemma4
from ..media.file import MediaFile
from ..model.ple import GatheredRows
from ..nn.batch import Batch
from .parallel import Ranks
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
    ranks: Ranks = Ranks(),
    soft: SoftTokens | None = None,
) -> Iterator[Step]:
    """The steps of a run after `start`, up to step `total`, with `accumulation` batches each.

    Of several ranks each has its rows of every batch; one without a row gets one that weighs
    nothing. Tokens are counted of all, `examples` are those of this rank.
    """
    every = Examples.of(examples)
    shapes = Shapes.of_run(order, every.targets)

    def rows_of_steps() -> Iterator[tuple[tuple[int, list[Rows], Progress], list[Rows]]]:
        stream = order.batches(start.next_batch)
        for number in range(start.step + 1, total + 1):
            numbered = list(islice(stream, accumulation))
            tokens = int(every.lengths[_examples_of([rows for _, rows in numbered])].sum())
            own = [ranks.share(rows) for _, rows in numbered]
            taken = [mine or rows[:1] for mine, (_, rows) in zip(own, numbered)]
            yield (tokens, own, Progress(number, numbered[-1][0] + 1)), taken

    made = prepared(gemma, examples, rows_of_steps(), shapes, soft)
    for (tokens, own, progress), batches in made:
        batches = [batch if mine else batch.weighing_nothing() for batch, mine in zip(batches, own)]
        chosen = every.order[_examples_of(own)]
        yield Step(batches, tokens, progress, Examples(every.stores, chosen))


def _examples_of(batches: Sequence[Rows]) -> np.ndarray:
    return np.array([i for rows in batches for row in rows for i in row], np.int64)


def prepared(
    gemma: Gemma4,
    examples: Sequence[Example],
    steps: Iterable[tuple[Tag, Sequence[Rows]]],
    shapes: Shapes = NO_SHAPES,
    soft: SoftTokens | None = None,
) -> Iterator[tuple[Tag, list[Batch]]]:
    """The batches of each step, ready for the model; the next step's are built meanwhile.

    Args:
        examples: what the rows are indices of.
        steps: for each step anything, which is handed on, and the rows of its batches.
        shapes: those that the batches of a run have.
        soft: gives soft tokens of media, instead of the encoders in the step.
    """

    source = gemma.loaded.ple_rows

    def build(batches: Sequence[Rows]) -> Built:
        """On the other thread: reads examples, media and PLE rows, and leaves the device alone."""
        chosen = [[[examples[i] for i in row] for row in rows] for rows in batches]
        flat = [[example for row in rows for example in row] for rows in chosen]
        found = soft.read(example for own in flat for example in own) if soft else {}
        encoded = soft is not None
        built = collate_alike(chosen, media=gemma.media, encoded=encoded, shapes=shapes)
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
