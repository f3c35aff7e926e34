"""Examples -> batches: next-token targets, rows that several examples share, padding.

Shapes: B rows, T tokens, L layers, P width of per-layer embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from ..gemma import Gemma4
    from ..model.ple import GatheredRows

__all__ = ["Batch", "Example", "collate", "collate_alike", "longest_bound", "padded_length"]


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        tokens: token ids.
        mask: for every token, whether it is a target.
        origin: "file:line", for messages.
    """

    tokens: np.ndarray
    mask: np.ndarray
    origin: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Tokens that are learned; the first has nothing before it and never counts."""
        return int(self.mask[1:].sum())


@dataclass(frozen=True)
class Batch:
    """What one pass of the model reads.

    Attributes:
        tokens_BT: token ids.
        targets_BT: the token that follows each position.
        weights_BT: float32 weight of each target; 0 is no target.
        segments_BT: document number of each position in packed rows, or None.
        ple_BTLP: rows of the PLE table for the tokens, or None.
        rows_R: flat positions that have a target, the last one repeated to fill a bucket; the
            others never meet the head. None is all positions.
        longest: no document of a packed row is longer; None is no bound.
    """

    tokens_BT: mx.array
    targets_BT: mx.array
    weights_BT: mx.array
    segments_BT: mx.array | None = None
    ple_BTLP: mx.array | None = None
    rows_R: mx.array | None = None
    longest: int | None = None

    @classmethod
    def from_tokens(cls, tokens_BT: Any, weights_BT: Any = None, segments_BT: Any = None) -> Batch:
        """A batch of T - 1 next-token predictions from T tokens a row.

        Args:
            tokens_BT: token ids (B, T).
            weights_BT: (B, T), the weight of every token as a target; default 1. The first
                column has no effect, since nothing stands before it.
            segments_BT: (B, T), the document number of every token in packed rows. The first
                token of a document is never a target.

        >>> from mlx_gemma4 import Batch
        >>> batch = Batch.from_tokens([[2, 7, 8, 9]], [[0, 0, 1, 1]])
        >>> batch.tokens_BT.tolist(), batch.targets_BT.tolist(), batch.weights_BT.tolist()
        ([[2, 7, 8]], [[7, 8, 9]], [[0.0, 1.0, 1.0]])
        """
        tokens = mx.array(tokens_BT)
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise DataError(
                f"tokens of shape {tokens.shape}",
                wanted="(B, T) with T of 2 or more",
                do="stack rows of equal length",
            )
        weights = mx.ones(tokens.shape) if weights_BT is None else mx.array(weights_BT)
        if weights.shape != tokens.shape:
            raise DataError(
                f"weights of shape {weights.shape} for tokens of shape {tokens.shape}",
                wanted="one weight per token",
                do="pass weights_BT of the same shape as tokens_BT",
            )
        weights = weights[:, 1:].astype(mx.float32)
        segments = None
        if segments_BT is not None:
            segments_BT = mx.array(segments_BT)
            if segments_BT.shape != tokens.shape:
                raise DataError(
                    f"segments of shape {segments_BT.shape} for tokens of shape {tokens.shape}",
                    wanted="one document number per token",
                    do="pass segments_BT of the same shape as tokens_BT",
                )
            segments = segments_BT[:, :-1]
            weights = weights * (segments == segments_BT[:, 1:])
        return cls(tokens[:, :-1], tokens[:, 1:], weights, segments)

    def with_ple_rows(self, gemma: Gemma4, gathered: GatheredRows | None = None) -> Batch:
        """The batch with the PLE rows of its tokens, where this family member has any.

        `gathered` are the rows if they have been read already.
        """
        if self.ple_BTLP is not None or gemma.loaded.ple_rows is None:
            return self
        if gathered is None:
            gathered = gemma.loaded.ple_rows.gather(self.tokens_BT)
        return replace(self, ple_BTLP=gemma.loaded.ple_rows.unpack(gathered))

    def fields(self) -> dict[str, Any]:
        """What `Batch(**fields)` is made from: arrays, and the numbers that decide shapes."""
        return {k: v for k, v in vars(self).items() if v is not None}

    @property
    def num_targets(self) -> mx.array:
        """The sum of all weights: what the loss sum is divided by."""
        return self.weights_BT.sum()


def collate(rows: Sequence[Example | Sequence[Example]], pad_token: int = 0) -> Batch:
    """Examples as one batch, padded on the right.

    Args:
        rows: an example is a row of its own; a list of examples is one row, in which none sees
            another.
        pad_token: what fills the rest of a row.

    >>> import numpy as np
    >>> from mlx_gemma4.data.batches import Example, collate
    >>> one = Example(np.array([2, 7, 8]), np.array([False, True, True]), "rows.jsonl:1")
    >>> two = Example(np.array([2, 9]), np.array([False, True]), "rows.jsonl:2")
    >>> batch = collate([[one, two]])
    >>> batch.tokens_BT[0, :3].tolist(), batch.targets_BT[0, :3].tolist()
    ([2, 7, 2], [7, 8, 9])
    """
    return collate_alike([rows], pad_token)[0]


def collate_alike(
    batches: Sequence[Sequence[Example | Sequence[Example]]], pad_token: int = 0
) -> list[Batch]:
    """`collate` for each of the batches of a step, in shapes that they share."""
    parts = [[[row] if isinstance(row, Example) else list(row) for row in rows] for rows in batches]
    every = [row for rows in parts for row in rows]
    positions = [len(example) - 1 for row in every for example in row]
    length = padded_length(max(sum(len(example) - 1 for example in row) for row in every))
    packed = len(positions) > len(every)
    longest = longest_bound(max(positions), length) if packed else None
    targets = max(sum(example.num_targets for row in rows for example in row) for rows in parts)
    return [
        _collate(rows, pad_token, length, _bucket(targets, 64), longest, packed) for rows in parts
    ]


def _collate(
    rows: list[list[Example]],
    pad_token: int,
    length: int,
    targets: int,
    longest: int | None,
    packed: bool,
) -> Batch:
    """Shapes as given: `length` positions a row, `targets` positions that meet the head."""
    shape = (len(rows), length)
    tokens, following = np.full((2, *shape), pad_token, np.int32)
    weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            here = slice(start, start + len(example) - 1)
            tokens[r, here], following[r, here] = example.tokens[:-1], example.tokens[1:]
            weights[r, here], segments[r, here] = example.mask[1:], number
            start = here.stop
        segments[r, start:] = len(row)
    learned = np.flatnonzero(weights)
    return Batch(
        mx.array(tokens),
        mx.array(following),
        mx.array(weights),
        segments_BT=mx.array(segments) if packed else None,
        rows_R=mx.array(np.pad(learned, (0, targets - len(learned)), "edge").astype(np.int32)),
        longest=longest,
    )


def longest_bound(longest: int, length: int) -> int | None:
    """The bound on documents of packed rows: a power of two, so that few occur, or None for all."""
    bound = max(64, 1 << (longest - 1).bit_length())
    return bound if bound < length else None


def padded_length(positions: int) -> int:
    """The length of a batch whose longest row has so many positions."""
    return _bucket(positions, 32)


def _bucket(count: int, least: int) -> int:
    """The next multiple of a quarter of the power of two below, so that few shapes occur."""
    step = max(least, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step
