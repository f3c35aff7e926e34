"""What is trained on: dense rows, or short samples. The same tokens for every contestant.

Numpy alone, so that it runs in every contestant's environment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Load", "Sample", "dense", "short"]

FIRST_TOKEN = 120
"""Random tokens begin above the special ones of the small checkpoints."""

LAST_TOKEN = 200_000
"""And end below the image and audio tokens of the released ones."""


@dataclass(frozen=True)
class Sample:
    """Token ids, and the position from which on they are targets; the first token never is one."""

    tokens: np.ndarray
    first_target: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Tokens that are learned."""
        return len(self.tokens) - self.first_target


@dataclass(frozen=True)
class Load:
    """Samples that are taken `epochs` times over; the first epoch is the warm-up.

    A dense load is one batch, repeated: whatever order a trainer draws, its first step is the same.
    """

    name: str
    samples: list[Sample]
    batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches of samples that are not packed."""
        return -(-len(self.samples) // self.batch_size)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.samples))

    @property
    def real_tokens(self) -> int:
        """Positions of an epoch that are not padding and have a token after them."""
        return sum(len(sample) - 1 for sample in self.samples)

    @property
    def target_tokens(self) -> int:
        """Targets of an epoch."""
        return sum(sample.num_targets for sample in self.samples)


def dense(vocab_size: int, B: int, T: int, steps: int) -> Load:
    """B rows of T next-token predictions, all of them targets; one warm-up step."""
    rng = np.random.default_rng(0)
    rows = rng.integers(FIRST_TOKEN, min(vocab_size, LAST_TOKEN), (B, T + 1)).astype(np.int32)
    return Load(f"B {B}, T {T}", [Sample(row, 1) for row in rows], B, 1 + steps)


def short(vocab_size: int, count: int = 64, batch_size: int = 4, epochs: int = 2) -> Load:
    """Samples like instructions: log-normal lengths around 120, the last 40% are targets."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(120), 0.6, count)), 16, 512).astype(int).tolist()
    samples = [
        Sample(
            rng.integers(FIRST_TOKEN, min(vocab_size, LAST_TOKEN), n).astype(np.int32),
            n - round(0.4 * n),
        )
        for n in lengths
    ]
    return Load(f"{count} short samples, batches of {batch_size}", samples, batch_size, epochs)
