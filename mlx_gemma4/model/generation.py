"""Answers in text, through mlx-lm's generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import GenerateConfig
from .conversation import Prompt
from .tokenizer import prompt_tokens


def stream_answer(
    backbone: nn.Module,
    tokenizer: Any,
    end_tokens: Collection[int],
    prompt: Prompt,
    *,
    system: str | None = None,
    tools: Any = None,
    thinking: bool = False,
    **sampling: Any,
) -> Iterator[str]:
    """The answer to a prompt in pieces, until the model ends its turn.

    Args:
        backbone: mlx-lm's model.
        end_tokens: ids on which an answer ends.
        prompt, system, tools, thinking: as in `prompt_tokens`.
        sampling: max_tokens, temperature, top_p and seed, as in `stream_tokens`.

    Raises:
        ConfigError: a prompt that asks nothing, or a number out of bounds.
        ModelError: no chat template, or one that refuses the prompt.
    """
    tokens = prompt_tokens(tokenizer, prompt, system=system, tools=tools, thinking=thinking)
    return stream_tokens(backbone, tokenizer, end_tokens, tokens, **sampling)


def stream_tokens(
    backbone: nn.Module,
    tokenizer: Any,
    end_tokens: Collection[int],
    tokens: Sequence[int],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """What follows token ids, in pieces, until the model ends its turn.

    Args:
        backbone: mlx-lm's model.
        end_tokens: ids on which an answer ends.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens of this total probability.

    Raises:
        ConfigError: a number out of bounds.
    """
    GenerateConfig(max_tokens=max_tokens, temperature=temperature, top_p=top_p)

    def pieces() -> Iterator[str]:
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        mx.random.seed(seed)
        backbone.eval()
        for piece in stream_generate(
            backbone,
            TokenizerWrapper(tokenizer, eos_token_ids=sorted(end_tokens)),
            list(tokens),
            max_tokens=max_tokens,
            sampler=make_sampler(temperature, top_p),
        ):
            yield piece.text

    return pieces()
