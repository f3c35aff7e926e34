"""Answers in text, through mlx-lm's generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class TextOf(nn.Module):
    """The language model of mlx-vlm's model, which is called as mlx-lm calls its own."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.language_model = backbone.language_model

    def __call__(self, tokens_BT: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.language_model(tokens_BT, cache=cache).logits
        return logits

    def make_cache(self) -> list[Any]:
        caches: list[Any] = self.language_model.make_cache()
        return caches


def stream_tokens(
    model: nn.Module,
    tokenizer: Any,
    end_tokens: Collection[int],
    tokens: Sequence[int],
    *,
    caches: list[Any] | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """What a model writes after some tokens, in pieces, until it ends its turn.

    Args:
        model: mlx-lm's model, or `TextOf` mlx-vlm's.
        end_tokens: ids on which an answer ends.
        caches: with keys and values of what stands before the tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens of this total probability.
    """
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    mx.random.seed(seed)
    model.eval()
    for piece in stream_generate(
        model,
        TokenizerWrapper(tokenizer, eos_token_ids=sorted(end_tokens)),
        list(tokens),
        max_tokens=max_tokens,
        sampler=make_sampler(temperature, top_p),
        prompt_cache=caches,
    ):
        yield piece.text
