"""What the model says in a rendered conversation: read from Gemma 4's markers, and proved.

A turn of the model, as the released templates write it:

    <|turn>model
    <|channel>thought
    ...<channel|><|tool_call>...<tool_call|><|tool_response>...<tool_response|>text<turn|>

Its parts come in any order and number. What a tool answers stands within the turn and is not the
model's; the `<|tool_response>` after a call is: there generation stops and the tool runs.

Two ways must agree, or the row is refused: the markers of the rendering, and the texts, reasoning
and tool calls of the row's assistant turns. They are compared without white space, which templates
trim. Only reasoning may be missing, since templates leave out earlier ones; it is counted. Where a
template marks with `{% generation %}` what is generated, that is a third.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError
from ...model.tokenizer import END_OF_TURN
from ..read.records import row_error

__all__ = [
    "MARKER",
    "MARKERS",
    "TURN",
    "Mark",
    "Span",
    "between_tool_results",
    "check_against_generation",
    "check_against_row",
    "find_marks",
    "model_turns",
    "spans_of",
    "user_turns",
]

TURN = "<|turn>"
_CHANNEL, _CALL, _RESPONSE = "<|channel>", "<|tool_call>", "<|tool_response>"
_CLOSERS = {_CHANNEL: "<channel|>", _CALL: "<tool_call|>", _RESPONSE: "<tool_response|>"}
_KINDS = {_CHANNEL: "thought", _CALL: "call", _RESPONSE: "response"}
_BEFORE, _SHOWN = 20, 70  # characters of a picture: before the first difference, and in all

MARKERS = (TURN, END_OF_TURN, *_CLOSERS, *_CLOSERS.values())
"""The markers that decide who speaks."""

MARKER = re.compile("|".join(map(re.escape, MARKERS)))


class Mark(NamedTuple):
    """A marker in a text: which one, at which character, and which token it is."""

    marker: str
    char: int
    token: int = 0

    @property
    def end(self) -> int:
        return self.char + len(self.marker)


class Span(NamedTuple):
    """A part of a model turn: tokens[first:last].

    Attributes:
        kind: "text", "thought", "call", "response", or "end" for a token on which generation
            stops.
        text: what it holds, without its markers.
        first, last: its tokens, markers included.
    """

    kind: str
    text: str
    first: int
    last: int


def find_marks(text: str) -> list[Mark]:
    """All markers of a text, in order, without their tokens."""
    return [Mark(match.group(), match.start()) for match in MARKER.finditer(text)]


def spans_of(text: str) -> list[Span]:
    """The spans of what an assistant turn of a row says; they have no tokens."""
    if "|>" not in text:
        return [Span("text", text, 0, 0)]
    return list(_parse(text, find_marks(text), Mark("", 0), Mark("", len(text))))


def user_turns(text: str, marks: Iterable[Mark]) -> list[int]:
    """The tokens at which turns of the user open."""
    return [m.token for m in marks if m.marker == TURN and text.startswith("user\n", m.end)]


def model_turns(text: str, marks: list[Mark], num_tokens: int, header: int) -> list[list[Span]]:
    """The spans of every turn of the model.

    Args:
        text: a rendered conversation.
        marks: its markers with their tokens.
        num_tokens: tokens of the text.
        header: tokens of "model" and the line's end.
    """
    opens = [i for i, mark in enumerate(marks) if mark.marker == TURN]
    turns = []
    for i, following in zip(opens, [*opens[1:], len(marks)]):
        start = marks[i]
        if text.startswith("model\n", start.end):
            stop = marks[following] if following < len(marks) else Mark("", len(text), num_tokens)
            first = Mark("", start.end + len("model\n"), start.token + 1 + header)
            turns.append(list(_parse(text, marks[i + 1 : following], first, stop)))
    return turns


def between_tool_results(turn: list[Span]) -> list[list[Span]]:
    """The spans of a turn in runs: one up to each end or tool result, and one after the last."""
    runs: list[list[Span]] = [[]]
    for span in turn:
        if span.kind != "response":
            runs[-1].append(span)
        if span.kind in ("end", "response"):
            runs.append([])
    return [run for run in runs if run]


def _parse(text: str, marks: list[Mark], start: Mark, stop: Mark) -> Iterator[Span]:
    """The spans between two places of a text that no turn opens in.

    An opener without its closer is text, but for the last `<|tool_response>`: with it the model
    hands over to a tool that has not answered.
    """
    char, token, before = start.char, start.token, ""
    i = 0
    while i < len(marks):
        mark, j = marks[i], i
        closer = _CLOSERS.get(mark.marker)
        if closer:
            j = next((j for j in range(i, len(marks)) if marks[j].marker == closer), len(marks))
        closed = closer and j < len(marks)
        i = j + 1 if closed else i + 1
        if not closed and mark.marker not in (END_OF_TURN, _RESPONSE):
            continue
        if mark.token > token or mark.char > char:
            yield Span("text", text[char : mark.char], token, mark.token)
            before = "text"
        if not closed:
            yield Span("end", "", mark.token, mark.token + 1)
            char, token, before = mark.end, mark.token + 1, "end"
            if mark.marker == END_OF_TURN and text.startswith("\n", char):
                char, token = char + 1, token + 1
        else:
            kind, first, close = _KINDS[mark.marker], mark.token, marks[j]
            if kind == "response" and before == "call":
                yield Span("end", "", first, first + 1)
                first += 1
            inner = text[mark.end : close.char]
            if kind == "thought":
                inner = inner.removeprefix("thought").strip()
            yield Span(kind, inner, first, close.token + 1)
            char, token, before = close.end, close.token + 1, kind
    if text[char : stop.char].strip():
        yield Span("text", text[char : stop.char], token, stop.token)


# ---------------------------------------------------------------- the proof


@dataclass
class _Content:
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


def check_against_row(
    messages: Sequence[dict[str, Any]], turns: list[list[Span]], origin: str
) -> tuple[list[bool], int]:
    """Hold the model turns of a rendering against the assistant turns of its row.

    Returns:
        for every model turn whether it may be a target (`"train": False` forbids it), and how many
        texts of reasoning of the row are not in the rendering.

    Raises:
        DataError: they differ; with a picture of both.
    """
    groups = _groups(messages, len(turns))
    parts = turns if len(groups) == len(turns) else [list(chain(*turns))]
    may_train, dropped = [], 0
    for group, spans in zip(groups, parts):
        row, rendering = _content_of(group), _Content()
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
        may_train.append(_may_train(group, origin))
    return may_train if parts is turns else may_train * len(turns), dropped


def check_against_generation(
    tokens: np.ndarray,
    turns: list[list[Span]],
    generated: np.ndarray,
    thinking: str,
    origin: str,
    tokenizer: Any,
) -> None:
    """Hold the model turns against the tokens that the template marks with `{% generation %}`.

    Templates differ in whether the end of a turn and its line are marked, and may leave out
    reasoning that is no target; all else must be the same.

    Args:
        generated: the template's mask (T).

    Raises:
        DataError: they differ; with a picture of both.
    """
    ours, skipped, after = (np.zeros(len(tokens) + 1, bool) for _ in range(3))
    for span in chain(*turns):
        ours[span.first : span.last] = span.kind != "response"
        no_target = span.kind == "thought" and (thinking == "mask" or not span.text)
        skipped[span.first : span.last] = span.kind == "end" or no_target
        after[span.last] = span.kind == "end"
    ours, compared = ours[:-1], ~(skipped | (after & ~ours))[:-1]
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


def _content_of(messages: list[dict[str, Any]]) -> _Content:
    content = _Content()
    for turn in messages:
        if turn.get("reasoning", "").strip():
            content.thoughts.append(_squash(turn["reasoning"]))
        content.add(spans_of(turn["content"]))
        content.calls += [_squash(call["function"]["name"]) for call in turn.get("tool_calls", ())]
    return content


def _may_train(messages: list[dict[str, Any]], origin: str) -> bool:
    wishes = {turn.get("train", True) for turn in messages}
    if len(wishes) > 1:
        raise row_error(
            f"{origin}: one model turn holds answers with weight 0 and answers with weight 1",
            "one weight for all assistant turns between two questions",
            "split the row, or give them one weight",
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
    return row_error(
        f"{origin}: the rendering does not show what the model is to learn{lines[0]}{lines[1]}",
        "<|turn>model ... <turn|> around the text and the tool calls of every answer",
        "use Gemma 4's own template, or mend the row",
    )
