"""Answers of a model to the prompts of examples, and a judge of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.example import Example
from ..errors import DataError
from ..gemma import Gemma4
from ..model.conversation import split_thought

Judge = Callable[[str, str, str], float]
"""(prompt, answer, reference) -> a score, larger is better."""


@dataclass(frozen=True)
class Answer:
    """What a model said where an example has its last learned answer, the reference."""

    prompt: str
    reference: str
    answer: str
    score: float


def exact_match(prompt: str, answer: str, reference: str) -> float:
    """1.0 where the answer is the reference, apart from thoughts and space around.

    >>> exact_match("2 + 2?", " 4\\n", "4"), exact_match("2 + 2?", "four", "4")
    (1.0, 0.0)
    """
    return float(split_thought(answer)[1] == split_thought(reference)[1])


def answer(
    gemma: Gemma4, examples: Sequence[Example], judge: Judge, max_tokens: int
) -> list[Answer]:
    """The likeliest answer to each example up to its last run of targets; text rows have none.

    Raises:
        DataError: no example has a prompt.
        CapabilityError: the model was loaded with encoders.
    """
    said = []
    for example in examples:
        ends = np.flatnonzero(np.diff(example.mask.astype(np.int8), append=0) == -1)
        starts = np.flatnonzero(np.diff(example.mask.astype(np.int8)) == 1) + 1
        if not len(starts) or not len(ends):
            continue
        tokens, start = example.tokens.tolist(), int(starts[-1])
        prompt = gemma.tokenizer.decode(tokens[:start])
        learned = tokens[start : int(ends[-1]) + 1]
        while learned and learned[-1] in gemma.end_tokens:
            learned.pop()
        reference = gemma.tokenizer.decode(learned)
        pieces = gemma.stream_tokens(tokens[:start], max_tokens=max_tokens)
        text = "".join(pieces)
        said.append(Answer(prompt, reference, text, float(judge(prompt, text, reference))))
    if not said:
        found = "no example has a prompt to answer"
        raise DataError(found, wanted="chats or prompts", do="leave out the answers")
    return said
