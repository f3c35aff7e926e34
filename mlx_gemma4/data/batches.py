"""Examples -> batches: next-token targets, padding, and a seeded order that can be resumed.

Shapes: B rows, T tokens, L layers, P width of per-layer embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from ..gemma import Gemma4

__all__ = ["Batch", "Example", "batch_order", "collate"]

_BUCKET = 32
"""Padded lengths are multiples of this, so that few shapes occur."""

_ROW_BUCKET = 64
"""So are the numbers of positions that meet the head."""


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

    def with_ple_rows(self, gemma: Gemma4) -> Batch:
        """The batch with the PLE rows of its tokens, where this family member has any."""
        if self.ple_BTLP is not None or gemma.plan.ple is None:
            return self
        return replace(self, ple_BTLP=gemma.ple_rows(self.tokens_BT))

    @property
    def num_targets(self) -> mx.array:
        """The sum of all weights: what the loss sum is divided by."""
        return self.weights_BT.sum()


def collate(examples: Sequence[Example], pad_token: int = 0) -> Batch:
    """Examples as one batch, padded on the right to a common length."""
    longest = max(len(example) for example in examples)
    length = 1 + -(-(longest - 1) // _BUCKET) * _BUCKET
    tokens = np.full((len(examples), length), pad_token, np.int32)
    weights = np.zeros((len(examples), length), np.float32)
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = example.tokens
        weights[row, : len(example)] = example.mask
    return replace(Batch.from_tokens(tokens, weights), rows_R=_rows(weights[:, 1:]))


def _rows(weights_BT: np.ndarray) -> mx.array:
    rows = np.flatnonzero(weights_BT)
    return mx.array(np.pad(rows, (0, -len(rows) % _ROW_BUCKET), "edge"))


def batch_order(
    count: int, batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Indices of the examples of batch `start`, `start + 1`, ... without end.

    Every epoch is a permutation of its own, which depends only on seed and epoch; its last batch
    is smaller where the count does not divide. Batches are numbered across epochs, so a run
    resumes at any of them.

    Yields:
        (batch number, indices).
    """
    per_epoch = -(-count // batch_size)
    number = start
    while True:
        epoch, within = divmod(number, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for within_epoch in range(within, per_epoch):
            first = within_epoch * batch_size
            yield number, order[first : first + batch_size]
            number += 1
