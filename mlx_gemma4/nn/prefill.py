"""A prompt through the training forward into the library's cache, from which it then answers.

mlx-vlm's own pass masks some members' images otherwise than transformers; one token at a time, text
after the prompt, it is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .batch import Batch
from .forward import KV, forward


def prefill(gemma: Any, batch: Batch, caches: Sequence[Any]) -> None:
    """Put the keys and values of a batch of one row into caches.

    Args:
        gemma: a `Gemma4`.
        caches: mlx-lm's, empty, one for each layer that has keys and values of its own.
    """
    kept: dict[int, KV] = {}
    forward(gemma, batch.with_ple_rows(gemma), kept=kept)
    for index, cache in zip(sorted(kept), caches, strict=True):
        cache.update_and_fetch(*kept[index])
    mx.eval([cache.state for cache in caches])
