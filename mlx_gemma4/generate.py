"""Answer a prompt with a model and, if one is named, its trained adapter.

    python -m mlx_gemma4.generate --model google/gemma-4-E2B-it --adapter runs/1/adapter \\
        --prompt "What is a list comprehension?"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

import mlx.core as mx

from .errors import CapabilityError, ConfigError, run_command

if TYPE_CHECKING:
    from .gemma import Gemma4

__all__ = ["generate", "stream"]


def generate(gemma: Gemma4, prompt: str, **options) -> str:
    """The whole answer as text; options as in `stream`."""
    return "".join(stream(gemma, prompt, **options))


def stream(
    gemma: Gemma4,
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The answer in pieces, until the model ends its turn.

    Args:
        prompt: what the user says; rendered through the model's chat template.
        system: what the system turn says, if any.
        max_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens of this total probability.
        seed: for sampling.

    Raises:
        ConfigError: the tokenizer has no chat template.
        CapabilityError: a legacy backbone with towers, which generates wrongly.
    """
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    if gemma.processor is not None:
        raise CapabilityError(
            "the model was loaded with towers, for training",
            wanted="a text model: answers come from mlx-lm",
            do="load it without towers, or use the adapter in mlx-vlm",
        )
    if not gemma.tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {gemma.name} has no chat template",
            wanted="chat_template.jinja, as the instruction-tuned (-it) checkpoints have it",
            do="name an instruction-tuned checkpoint, or copy its chat_template.jinja",
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    tokens = gemma.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    mx.random.seed(seed)
    gemma.backbone.eval()
    for piece in stream_generate(
        gemma.backbone,
        TokenizerWrapper(gemma.tokenizer, eos_token_ids=sorted(gemma.end_tokens)),
        tokens,
        max_tokens=max_tokens,
        sampler=make_sampler(temperature, top_p),
    ):
        yield piece.text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_gemma4.generate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="a model folder or a Hugging Face id")
    parser.add_argument("--adapter", help="an adapter folder, such as runs/1/adapter")
    parser.add_argument("--prompt", required=True, help="what the user says")
    parser.add_argument("--system", help="what the system turn says")
    parser.add_argument("--max-tokens", type=int, default=256, help="(default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    options = vars(parser.parse_args(arguments))

    from .gemma import load

    gemma = load(options.pop("model"), options.pop("adapter"))
    for piece in stream(gemma, options.pop("prompt"), **options):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main)
