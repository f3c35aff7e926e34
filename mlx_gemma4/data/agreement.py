"""Two ways must agree on what the model says in a rendered conversation, or the row is refused.

One way is the rendering's: the markers around the model's turns (spans.py). The other is the
row's: the text, thoughts and tool calls of its assistant turns. They are compared without white
space, which templates trim. Only thoughts may be missing, since templates leave out earlier ones;
they are counted. Where a template marks with `{% generation %}` what is generated, that is a third.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import numpy as np

from ..errors import DataError
from .spans import Span, spans_of

__all__ = ["agree", "agree_with_generation"]

_BEFORE, _SHOWN = 20, 70
"""Characters of a picture: before the first difference, and in all."""


@dataclass
class _Said:
    """What the model says, by the row or by the rendering."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def add(self, spans: Iterable[Span]) -> None:
        for span in spans:
            if span.kind == "text":
                self.texts.append(span.text)
            elif span.kind == "call":
                self.calls.append(_squash(span.text))
            elif span.kind == "thought" and span.text:
                self.thoughts.append(_squash(span.text))

    def __str__(self) -> str:
        calls = [f"(calls {call})" for call in self.calls]
        thoughts = [f"(thinks {thought})" for thought in self.thoughts]
        return " ".join([*thoughts, *calls, *" ".join(self.texts).split()])


def agree(
    messages: Sequence[dict[str, Any]], turns: list[list[Span]], origin: str
) -> tuple[list[bool], int]:
    """Hold the model turns of a rendering against the assistant turns of its row.

    Returns:
        for every model turn whether it may be learned (`"train": False` forbids it), and how many
        thoughts of the row are not in the rendering.

    Raises:
        DataError: they differ; with a picture of both.
    """
    groups = _groups(messages, len(turns))
    parts = turns if len(groups) == len(turns) else [list(chain(*turns))]
    learned, dropped = [], 0
    for group, spans in zip(groups, parts):
        row, rendering = _row_says(group), _Said()
        rendering.add(spans)
        missing = _missing(row.thoughts, rendering.thoughts)
        if (
            missing is None
            or _squash("".join(row.texts)) != _squash("".join(rendering.texts))
            or len(row.calls) != len(rendering.calls)
            or not all(name in call for name, call in zip(row.calls, rendering.calls))
        ):
            raise _disagreement(
                origin, "the row says", str(row), "the model turn is", str(rendering)
            )
        dropped += missing
        learned.append(_learned(group, origin))
    return learned if parts is turns else learned * len(turns), dropped


def agree_with_generation(
    tokens: np.ndarray,
    turns: list[list[Span]],
    generated: np.ndarray,
    thinking: str,
    origin: str,
    tokenizer: Any,
) -> None:
    """Hold the model turns against the tokens that the template marks with `{% generation %}`.

    Templates differ in whether the end of a turn and its line are marked, and may leave out
    thoughts that are not learned; all else must be the same.

    Args:
        generated: the template's mask (T).

    Raises:
        DataError: they differ; with a picture of both.
    """
    ours, silent, after = (np.zeros(len(tokens) + 1, bool) for _ in range(3))
    for span in chain(*turns):
        ours[span.first : span.last] = span.kind != "response"
        unlearned = span.kind == "thought" and (thinking == "mask" or not span.text)
        silent[span.first : span.last] = span.kind == "end" or unlearned
        after[span.last] = span.kind == "end"
    ours, compared = ours[:-1], ~(silent | (after & ~ours))[:-1]
    if ((ours != generated) & compared).any():
        shown = [tokenizer.decode(tokens[mask & compared]) for mask in (ours, generated)]
        raise _disagreement(origin, "by markers", shown[0], "by {% generation %}", shown[1])


def _groups(messages: Sequence[dict[str, Any]], num_turns: int) -> list[list[dict[str, Any]]]:
    """The assistant messages of each model turn, or all together where that cannot be told.

    A template makes a turn of each message, or one of all messages between two questions, tool
    results included.
    """
    singles = [[turn] for turn in messages if turn["role"] == "assistant"]
    runs = groupby(messages, lambda turn: turn["role"] in ("assistant", "tool"))
    joined = [[turn for turn in run if turn["role"] == "assistant"] for ours, run in runs if ours]
    for groups in (singles, joined):
        if len(groups) == num_turns:
            return groups
    return [list(chain(*singles))]


def _row_says(messages: list[dict[str, Any]]) -> _Said:
    said = _Said()
    for turn in messages:
        if turn.get("reasoning", "").strip():
            said.thoughts.append(_squash(turn["reasoning"]))
        said.add(spans_of(turn["content"]))
        said.calls += [_squash(call["function"]["name"]) for call in turn.get("tool_calls", ())]
    return said


def _learned(messages: list[dict[str, Any]], origin: str) -> bool:
    wishes = {turn.get("train", True) for turn in messages}
    if len(wishes) > 1:
        raise DataError(
            f"{origin}: one model turn holds answers with weight 0 and answers with weight 1",
            wanted="one weight for all assistant turns between two questions",
            do="split the row, or give them one weight",
        )
    return wishes != {False}


def _missing(wanted: list[str], found: list[str]) -> int | None:
    """How many of the wanted are not found; None where others are found, or out of order."""
    left = iter(wanted)
    return len(wanted) - len(found) if all(thought in left for thought in found) else None


def _squash(text: str) -> str:
    return "".join(text.split())


def _disagreement(origin: str, left: str, ours: str, right: str, theirs: str) -> DataError:
    pairs = enumerate(zip(ours, theirs))
    differ = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    start = max(0, differ - _BEFORE)
    width = max(len(left), len(right))
    lines = [
        f"\n    {name:{width}}  {'...' * (start > 0)}{text[start : start + _SHOWN]!r}"
        for name, text in ((left, ours), (right, theirs))
    ]
    return DataError(
        f"{origin}: the rendering does not show what the model is to learn{lines[0]}{lines[1]}",
        wanted="<|turn>model ... <turn|> around the text and the tool calls of every answer",
        do="use Gemma 4's own template, or mend the row",
    )
