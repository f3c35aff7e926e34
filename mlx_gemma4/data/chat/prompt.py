"""How an answer begins: where training and the generation prompt must agree.

The larger members write an empty thought into the generation prompt, after `<|turn>model`, that the
rendering of a whole conversation does not have. What it is comes from the template itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from ...errors import DataError
from ..example import Example
from .render import Rendering, apply_template
from .spans import TURN, spans_of

_OPENER = TURN + "model\n"
_ANY = ({"role": "user", "content": "Hello"},)
_SHOWN = 80  # characters of a prompt's end, at most


def opening(tokenizer: Any, options: dict[str, Any]) -> str:
    """The empty thought that the generation prompt writes after `<|turn>model`, or "".

    Args:
        options: what the template is told.
    """
    prompt = _prompt(tokenizer, _ANY, options)
    text = prompt.rpartition(_OPENER)[2]
    parts = spans_of(text)
    empty = all(part.kind in ("thought", "text") and not part.text.strip() for part in parts)
    return text if empty else ""


def prompt_difference(
    rendering: Rendering,
    example: Example,
    tokenizer: Any,
    tokenize: Callable[[list[str]], list[np.ndarray]],
) -> str:
    """A line that says how an example's prompt and the generation prompt differ, or "".

    What stands before the first target must be what the model is given when it is asked for that
    answer: the template's generation prompt for the turns before it.
    """
    turns = rendering.messages
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    try:
        texts = [_prompt(tokenizer, turns[:i], rendering.options) for i in answers]
    except DataError:  # a template may refuse the beginning of a conversation
        return ""
    first, prompts = int(np.argmax(example.mask)), tokenize(texts)
    common = [_common(prompt, example.tokens) for prompt in prompts]
    if not prompts or any(first <= n == len(prompt) for n, prompt in zip(common, prompts)):
        return ""
    prompt = prompts[int(np.argmax(common))]
    texts = [tokenizer.decode(ids) for ids in (example.tokens[: first or len(prompt)], prompt)]
    learned, given = ("..." + text[text.rfind(TURN) :][-_SHOWN:] for text in texts)
    return (
        f"{example.origin}: an answer is learned after {learned!r}, "
        f"and the generation prompt ends in {given!r}"
    )


def _prompt(tokenizer: Any, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
    text: str = apply_template(tokenizer, messages, options | {"add_generation_prompt": True})
    return text


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
