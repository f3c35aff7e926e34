"""A row -> token ids and loss mask, through the model's own chat template.

The tokens are those of `apply_chat_template` (rendering.py). What the model says in them is read
from the markers around its turns (spans.py) and held against what the row says (agreement.py).
Nothing is derived from a prompt's length: the larger members' templates put an empty thought into
the generation prompt, which the full rendering does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ..errors import DataError
from .agreement import agree, agree_with_generation
from .batches import Example
from .formats import Row
from .rendering import Rendering, render
from .spans import Span, model_turns, stretches, user_turns
from .vocabulary import Vocabulary

__all__ = ["encode", "encode_rows"]


def encode(
    row: Row,
    tokenizer: Any,
    train_on: str,
    thinking: str = "keep",
    notes: Counter[str] | None = None,
) -> Example:
    """Tokens of a row, and which of them are targets.

    A text row is `<bos> text <eos>`, and every token is a target. Of a conversation the targets
    are what the model says: text, thoughts and tool calls, with the tokens that end a turn or hand
    over to a tool. `train_on` says which of it: all ("assistant"), what follows the last question
    ("completion"), or what follows the last question or tool result ("last"); "all" is every token
    of the row. An assistant turn with `"train": False` never is a target.

    Args:
        row: a conversation or a text.
        tokenizer: with the model's chat template.
        train_on: "assistant", "last", "completion" or "all".
        thinking: "keep" learns thoughts, "mask" shows them without learning them, "drop" takes
            them out before rendering.
        notes: counts what a person should know, such as thoughts that the template leaves out.

    Raises:
        DataError: no target token, or a template that does not render what the row says.

    >>> from mlx_gemma4.data.formats import Row
    >>> from mlx_gemma4.model.tokenizer import load_tokenizer
    >>> turns = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
    >>> tokenizer = load_tokenizer(tiny)
    >>> example = encode(Row("chat", turns, "", "rows.jsonl:1"), tokenizer, "assistant")
    >>> tokenizer.decode(example.tokens[example.mask])
    'Hi<turn|>'
    """
    [result] = encode_rows([row], tokenizer, train_on, thinking, notes)
    if isinstance(result, DataError):
        raise result
    return result


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    train_on: str,
    thinking: str = "keep",
    notes: Counter[str] | None = None,
) -> list[Example | DataError]:
    """`encode` for many rows in one call of the tokenizer; an error stands in its row's place."""
    vocabulary = Vocabulary(tokenizer)
    results: list[Any] = []
    for row in rows:
        try:
            results.append(render(row, vocabulary, thinking))
        except DataError as error:
            results.append(error)
    rendered = [i for i, result in enumerate(results) if isinstance(result, Rendering)]
    for i, tokens in zip(rendered, vocabulary.tokenize([results[i].text for i in rendered])):
        try:
            mask, dropped = _targets(results[i], tokens, vocabulary, train_on, thinking)
            if notes is not None:
                _note(results[i], dropped, notes)
            results[i] = Example(tokens, mask, results[i].row.origin)
        except DataError as error:
            results[i] = error
    return results


def _note(rendering: Rendering, dropped: int, notes: Counter[str]) -> None:
    for count, what in (
        (dropped, "thoughts of rows left out by the chat template"),
        (rendering.removed, "thoughts of rows left out, as thinking is drop"),
        (bool(rendering.forged), "rows with markers of the chat template in their own text"),
    ):
        if count:
            notes[what] += int(count)


# ---------------------------------------------------------------- text -> targets


def _targets(
    rendering: Rendering, tokens: np.ndarray, vocabulary: Vocabulary, train_on: str, thinking: str
) -> tuple[np.ndarray, int]:
    """The mask of a rendering, and how many thoughts of its row the template left out."""
    origin = rendering.row.origin
    vocabulary.require_one_bos(tokens, origin)
    if not rendering.messages:
        return np.ones(len(tokens), bool), 0
    marks = vocabulary.locate(rendering.text, tokens, origin)
    marks = [mark for mark in marks if mark.char not in rendering.forged]
    turns = model_turns(rendering.text, marks, len(tokens), len(vocabulary.header))
    learned, dropped = agree(rendering.messages, turns, origin)
    if rendering.generated is not None:
        generated = np.array(rendering.generated, bool)
        agree_with_generation(tokens, turns, generated, thinking, origin, vocabulary.tokenizer)
    if train_on == "all":
        mask = np.ones(len(tokens), bool)
    else:
        questions = user_turns(rendering.text, marks)
        mask = _mask(tokens, _chosen(turns, train_on, questions))
    for turn, is_learned in zip(turns, learned):
        for span in turn:
            if not is_learned or (span.kind == "thought" and (thinking == "mask" or not span.text)):
                mask[span.first : span.last] = False
    if not mask[1:].any():
        raise DataError(
            f"{origin} has no target token",
            wanted="an assistant turn to learn",
            do="add the answer, or remove the line",
        )
    return mask, dropped


def _chosen(turns: list[list[Span]], train_on: str, questions: list[int]) -> Iterable[Span]:
    """The spans of the model turns that `train_on` names."""
    turns = [turn for turn in turns if turn]
    if train_on == "assistant" or not turns:
        return chain(*turns)
    if train_on == "last":
        return stretches(turns[-1])[-1]
    asked = max((place for place in questions if place < turns[-1][0].first), default=-1)
    return chain(*(turn for turn in turns if turn[0].first > asked))


def _mask(tokens: np.ndarray, spans: Iterable[Span]) -> np.ndarray:
    mask = np.zeros(len(tokens), bool)
    for span in spans:
        mask[span.first : span.last] |= span.kind != "response"
    return mask
