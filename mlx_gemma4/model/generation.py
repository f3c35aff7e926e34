"""Answers in text, through mlx-lm's generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .tokenizer import prompt_tokens


def stream_answer(
    backbone: nn.Module,
    tokenizer: Any,
    end_tokens: Collection[int],
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The answer to a prompt in pieces, until the model ends its turn.

    Args:
        backbone: mlx-lm's model.
        end_tokens: ids on which an answer ends.
        prompt, system: what the user and the system turn say; rendered through the chat template.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens of this total probability.

    Raises:
        ModelError: no chat template, or one that refuses the prompt.
    """
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    tokens = prompt_tokens(tokenizer, messages)
    mx.random.seed(seed)
    backbone.eval()
    for piece in stream_generate(
        backbone,
        TokenizerWrapper(tokenizer, eos_token_ids=sorted(end_tokens)),
        tokens,
        max_tokens=max_tokens,
        sampler=make_sampler(temperature, top_p),
    ):
        yield piece.text
