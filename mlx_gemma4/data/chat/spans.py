"""What the model says in a rendered conversation: read from Gemma 4's markers, and proved.

A turn of the model, as the released templates write it:

    <|turn>model
    <|channel>thought
    ...<channel|><|tool_call>...<tool_call|><|tool_response>...<tool_response|>text<turn|>

Its parts come in any order and number. What a tool answers stands within the turn and is not the
model's; the `<|tool_response>` after a call is: there generation stops and the tool runs.

The markers of the rendering and the row's assistant turns must agree, or the row is refused. They
are compared without white space, which templates trim. A template's `{% generation %}` marks must
agree too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError
from ...model.tokenizer import END_OF_TURN
from ..read.records import row_error

TURN, CALL = "<|turn>", "<|tool_call>"
_CHANNEL, _RESPONSE = "<|channel>", "<|tool_response>"
_CLOSERS = {_CHANNEL: "<channel|>", CALL: "<tool_call|>", _RESPONSE: "<tool_response|>"}
_KINDS = {_CHANNEL: "thought", CALL: "call", _RESPONSE: "response"}
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
    """A part of a model turn: tokens[first:last], markers included, and its text without them.

    `kind` is "text", "thought", "call", "response", or "end" for a token that stops generation.
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


def model_turns(text: str, marks: list[Mark], num_tokens: int, header: int) -> list[list[Span]]:
    """The spans of every turn of the model in a rendered conversation.

    Args:
        marks: its markers with their tokens; `header` tokens are "model" and the line's end.
    """
    ends = [*marks, Mark(TURN, len(text), num_tokens)]
    opens = [i for i, mark in enumerate(ends) if mark.marker == TURN]
    turns = []
    for i, following in pairwise(opens):
        start = ends[i]
        if text.startswith("model\n", start.end):
            first = Mark("", start.end + len("model\n"), start.token + 1 + header)
            turns.append(list(_parse(text, marks[i + 1 : following], first, ends[following])))
    return turns


def _parse(text: str, marks: list[Mark], start: Mark, stop: Mark) -> Iterator[Span]:
    """The spans between two places of a text that no turn opens in.

    An opener without its closer is text, but for the last `<|tool_response>`: with it the model
    hands over to a tool that has not answered.
    """
    char, token, before = start.char, start.token, ""
    i = 0
    while i < len(marks):
        mark, closer = marks[i], _CLOSERS.get(marks[i].marker)
        closed = next((j for j in range(i, len(marks)) if marks[j].marker == closer), None)
        i = 1 + (i if closed is None else closed)
        if closed is None and mark.marker not in (END_OF_TURN, _RESPONSE):
            continue
        if mark.token > token or mark.char > char:
            yield Span("text", text[char : mark.char], token, mark.token)
            before = "text"
        if closed is None:
            yield Span("end", "", mark.token, mark.token + 1)
            char, token, before = mark.end, mark.token + 1, "end"
            if mark.marker == END_OF_TURN and text.startswith("\n", char):
                char, token = char + 1, token + 1
        else:
            kind, first, close = _KINDS[mark.marker], mark.token, marks[closed]
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


def check_against_row(messages: Sequence[dict[str, Any]], turns: list[list[Span]]) -> list[bool]:
    """Hold the model turns of a rendering against the assistant turns of its row.

    Returns:
        for every model turn whether it may be a target (`"train": False` forbids it). Where they
        differ a DataError shows both.
    """
    groups = _groups(messages, len(turns))
    parts = turns if len(groups) == len(turns) else [list(chain(*turns))]
    may_train = []
    for group, spans in zip(groups, parts):
        said = _spans_of_row(group)
        thoughts, calls, texts = (
            (_texts(said, kind), _texts(spans, kind)) for kind in ("thought", "call", "text")
        )
        left = iter(thoughts[0])
        if not (
            all(thought in left for thought in thoughts[1])
            and len(calls[0]) == len(calls[1])
            and all(name in call for name, call in zip(*calls))
            and "".join(texts[0]) == "".join(texts[1])
        ):
            shown = {"the row says": _as_text(said), "the model turn is": _as_text(spans)}
            raise _disagreement(shown)
        if missing := len(thoughts[0]) - len(thoughts[1]):
            found = f"the chat template leaves out {missing} texts of reasoning within an answer"
            do = "set thinking to drop, or move them into reasoning, before the answer"
            raise row_error(found, "reasoning that can be kept", do)
        wishes = {turn.get("train", True) for turn in group}
        if len(wishes) > 1:
            found = "one model turn holds answers with weight 0 and answers with weight 1"
            raise row_error(found, "one weight for all assistant turns between two questions")
        may_train.append(wishes != {False})
    return may_train if parts is turns else may_train * len(turns)


def check_against_generation(
    tokens: np.ndarray,
    turns: list[list[Span]],
    silent: list[Span],
    generated: Sequence[int],
    tokenizer: Any,
) -> None:
    """Hold the model turns against `generated`, the template's mask (T) of `{% generation %}`.

    Templates differ in whether the end of a turn and its line are marked, and may leave out
    `silent` spans, reasoning that is no target. Where else they differ a DataError shows both.
    """
    ours, compared = np.zeros(len(tokens), bool), np.ones(len(tokens), bool)
    for span in chain(*turns):
        ours[span.first : span.last] = span.kind != "response"
    for span in chain(*turns):
        if span.kind == "end":
            compared[span.first : span.last] = False
            compared[span.last : span.last + 1] &= ours[span.last : span.last + 1]
    for span in silent:
        compared[span.first : span.last] = False
    ours, theirs = ours & compared, np.array(generated, bool) & compared
    if (ours != theirs).any():
        marked = {"by markers": ours, "by {% generation %}": theirs}
        raise _disagreement({name: tokenizer.decode(tokens[m]) for name, m in marked.items()})


def _groups(messages: Sequence[dict[str, Any]], num_turns: int) -> list[list[dict[str, Any]]]:
    """The assistant messages of each model turn, or all together where that cannot be told.

    A template makes a turn of each message, or of all between two questions.
    """
    ours = [turn for turn in messages if turn["role"] == "assistant"]
    runs = groupby(messages, lambda turn: turn["role"] in ("assistant", "tool"))
    joined = [
        [turn for turn in run if turn["role"] == "assistant"] for is_ours, run in runs if is_ours
    ]
    if len(ours) == num_turns:
        return [[turn] for turn in ours]
    return joined if len(joined) == num_turns else [ours]


def _spans_of_row(messages: list[dict[str, Any]]) -> list[Span]:
    spans = []
    for turn in messages:
        spans += [Span("thought", turn.get("reasoning", ""), 0, 0), *spans_of(turn["content"])]
        calls = turn.get("tool_calls", ())
        spans += [Span("call", call["function"]["name"], 0, 0) for call in calls]
    return spans


def _texts(spans: list[Span], kind: str) -> list[str]:
    """What spans of a kind hold, without white space."""
    texts = ["".join(span.text.split()) for span in spans if span.kind == kind]
    return [text for text in texts if text]


def _as_text(spans: list[Span]) -> str:
    thoughts = [f"(thinks {thought})" for thought in _texts(spans, "thought")]
    calls = [f"(calls {call})" for call in _texts(spans, "call")]
    words = " ".join(span.text for span in spans if span.kind == "text").split()
    return " ".join([*thoughts, *calls, *words])


def _disagreement(shown: dict[str, str]) -> DataError:
    """The error for two texts that should be equal: both, from shortly before they part."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(*shown.values()))
    start = max(0, len(list(equal)) - _BEFORE)
    width = max(map(len, shown))
    lines = [
        f"\n    {name:{width}}  {'...' * (start > 0)}{text[start : start + _SHOWN]!r}"
        for name, text in shown.items()
    ]
    return row_error(
        f"the rendering does not show what the model is to learn{''.join(lines)}",
        "<|turn>model ... <turn|> around the text and the tool calls of every answer",
        "use Gemma 4's own template, or mend the row",
    )
