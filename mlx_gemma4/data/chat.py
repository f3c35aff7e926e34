"""A row -> token ids and loss mask, through the model's own chat template.

The answers are found in the rendered text by Gemma 4's turn markers, and in the tokens by their
character offsets. Nothing is derived from a prompt's length: the larger members' templates put an
empty thought into the generation prompt, which the full rendering does not have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from ..model.tokenizer import END_OF_TURN
from .batches import Example
from .formats import Row

__all__ = ["encode", "encode_rows"]

_ANSWER = re.compile(r"<\|turn>model\n(.*?<turn\|>)", re.DOTALL)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    train_on: str,
    thinking: str = "keep",
    notes: Counter[str] | None = None,
) -> list[Example | DataError]:
    """`encode` for many rows; an error stands in its row's place."""
    results: list[Example | DataError] = []
    for row in rows:
        try:
            results.append(encode(row, tokenizer, train_on, thinking, notes))
        except DataError as error:
            results.append(error)
    return results


def encode(
    row: Row,
    tokenizer: Any,
    train_on: str,
    thinking: str = "keep",
    notes: Counter[str] | None = None,
) -> Example:
    """Tokens of a row, and which of them are targets.

    A conversation's targets are the text of its assistant turns and the `<turn|>` that ends each:
    of all turns ("assistant"), or of the last ("last"). With "all", and for a text row, every
    token is a target. A text row is `<bos> text <eos>`.

    Raises:
        DataError: no target token, a turn marker within the text, or a template without turns.
    """
    if row.shape == "text":
        ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
        tokens = np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], np.int32)
        return Example(tokens, np.ones(len(tokens), bool), row.origin)
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.origin} is a conversation and the tokenizer has no chat template",
            wanted="chat_template.jinja, as the instruction-tuned (-it) checkpoints have it",
            do="train an -it checkpoint, or use text rows",
        )
    _refuse_markers(row)
    text = _render(row, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = np.array(encoded["input_ids"], np.int32)
    spans = [match.span(1) for match in _ANSWER.finditer(text)]
    answers = sum(turn["role"] == "assistant" for turn in row.messages)
    if len(spans) != answers:
        raise DataError(
            f"{row.origin} has {answers} assistant turns and its rendering {len(spans)}",
            wanted="one <|turn>model ... <turn|> for each",
            do="use Gemma 4's own template",
        )
    mask = np.zeros(len(tokens), bool)
    if train_on == "all":
        mask[:] = True
    starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
    for start, end in spans[-1:] if train_on == "last" else spans:
        mask |= (starts >= start) & (ends <= end) & (starts < ends)
    if not mask[1:].any():
        raise DataError(
            f"{row.origin} has no target token",
            wanted="an assistant turn to learn",
            do="add the answer, or remove the line",
        )
    return Example(tokens, mask, row.origin)


def _refuse_markers(row: Row) -> None:
    """Text that speaks the template's language would open or close turns of its own."""
    for number, turn in enumerate(row.messages, 1):
        found = [marker for marker in ("<|turn>", END_OF_TURN) if marker in turn["content"]]
        if found:
            raise DataError(
                f"{row.origin}: the text of turn {number} holds {' and '.join(found)}",
                wanted="text without the markers that the chat template sets",
                do="remove turn markers from the text of the row",
            )


def _render(row: Row, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(row.messages), tokenize=False)
    except TemplateError as error:
        raise DataError(
            f"{row.origin} is refused by the model's chat template: {error}",
            wanted="roles in the order that the template allows",
            do="mend or remove the line",
        ) from None
