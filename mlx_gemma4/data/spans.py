"""Where the model speaks in a rendered conversation, read from Gemma 4's own markers.

A turn of the model, as the released templates write it:

    <|turn>model
    <|channel>thought
    ...<channel|><|tool_call>...<tool_call|><|tool_response>...<tool_response|>text<turn|>

Its parts come in any order and number. What a tool answers stands within the turn and is not the
model's; the `<|tool_response>` after a call is: there generation stops and the tool runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..model.tokenizer import END_OF_TURN

__all__ = [
    "MARKER",
    "MARKERS",
    "TURN",
    "Mark",
    "Span",
    "find_marks",
    "model_turns",
    "spans_of",
    "stretches",
    "user_turns",
]

TURN = "<|turn>"
_CHANNEL, _CALL, _RESPONSE = "<|channel>", "<|tool_call>", "<|tool_response>"
_CLOSERS = {_CHANNEL: "<channel|>", _CALL: "<tool_call|>", _RESPONSE: "<tool_response|>"}
_KINDS = {_CHANNEL: "thought", _CALL: "call", _RESPONSE: "response"}

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


def stretches(turn: list[Span]) -> list[list[Span]]:
    """What the model says of a turn between two results of tools, or two ends."""
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
