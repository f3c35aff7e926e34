"""The reasoning of a row: where it may be written, and how it gets into a rendering.

Templates leave out some of it: the released ones keep what follows the last question, and some of
them only beside a tool call. What is left out is put in as the model itself writes it:

    <|turn>model
    <|channel>thought
    ...
    <channel|>answer<turn|>

Its place is found by rendering once more with placeholders, characters of the private-use planes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from ..read.records import row_error
from .spans import CALL, spans_of

_TAGS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_CHANNEL = re.compile(r"\s*<\|channel>thought(.*?)<channel\|>", re.DOTALL)
_CHANNELS = re.compile(r"<\|channel>.*?<channel\|>", re.DOTALL)
_PRIVATE = range(0xF0000, 0xFFFFE)

Turn = dict[str, Any]


def has_tags(turn: Turn) -> bool:
    """Whether an answer begins with `<think>...</think>`."""
    is_text = turn["role"] == "assistant" and isinstance(turn["content"], str)
    return is_text and _TAGS.match(turn["content"]) is not None


def with_reasoning(turn: Turn) -> Turn:
    """The turn with the thought that its text begins with, in tags or a channel, as `reasoning`."""
    if turn["role"] != "assistant" or not isinstance(turn["content"], str):
        return turn
    match = _TAGS.match(turn["content"]) or _CHANNEL.match(turn["content"])
    if not match:
        return turn
    thought, own = match[1].strip(), turn.get("reasoning", "").strip()
    if thought and own and thought != own:
        found = f"an answer has a field of reasoning and begins with another: {thought[:40]!r}"
        raise row_error(found, "one text of reasoning before an answer")
    return {**turn, "content": turn["content"][match.end() :], "reasoning": thought or own}


def without_reasoning(turn: Turn) -> Turn:
    """The turn without its thoughts."""
    if turn["role"] != "assistant":
        return turn
    rest = {key: value for key, value in turn.items() if key != "reasoning"}
    return rest | {"content": _CHANNELS.sub("", turn["content"])}


def thoughts_of(turn: Turn) -> list[str]:
    """The thoughts of an assistant turn: its reasoning, and channels within its text."""
    if turn["role"] != "assistant":
        return []
    within = [span.text for span in spans_of(turn["content"]) if span.kind == "thought"]
    return [thought for thought in (turn.get("reasoning", "").strip(), *within) if thought]


def missing_thoughts(
    messages: Sequence[Turn], text: str, rendered: Callable[[Sequence[Turn]], str]
) -> dict[int, str]:
    """What to put into a rendering, by place: the reasoning of turns that it does not show.

    Every turn with reasoning gets placeholders before its reasoning, its text and the name of its
    first call. Without them, the rendering must be the same text.

    Args:
        rendered: gives the text of messages.

    Raises:
        DataError: the template changes with the placeholders.
    """
    free = (chr(code) for code in _PRIVATE if chr(code) not in text)
    marked, kept = [], []
    for turn in messages:
        if thought := turn.get("reasoning", "").strip():
            marks = tuple(islice(free, 3))
            kept.append((marks, thought))
            turn = _marked(turn, *marks)
        marked.append(turn)
    if not kept:
        return {}
    places = _places(text, rendered(marked), [mark for marks, _ in kept for mark in marks])
    missing: dict[int, str] = {}
    for (shown, said, called), thought in kept:
        if shown in places:
            continue
        starts = [places[said]] if said in places else []
        if called in places:
            starts.append(text.rfind(CALL, 0, places[called]))
        if starts and min(starts) >= 0:  # else the turn is not there: the check by the row says so
            missing[min(starts)] = f"<|channel>thought\n{thought}\n<channel|>"
    return missing


def put_in(
    text: str, quoted: frozenset[int], pieces: Mapping[int, str]
) -> tuple[str, frozenset[int]]:
    """The text with pieces at some of its places, and where its quoted markers then stand."""
    for place in sorted(pieces, reverse=True):
        text = text[:place] + pieces[place] + text[place:]
        quoted = frozenset(q + len(pieces[place]) * (q >= place) for q in quoted)
    return text, quoted


def _marked(turn: Turn, shown: str, said: str, called: str) -> Turn:
    """A turn with placeholders; an empty text beside calls stays, since templates ask for it."""
    thought, calls = shown + turn["reasoning"], turn.get("tool_calls")
    turn = {**turn, "reasoning": thought, "reasoning_content": thought}
    if turn["content"].strip() or not calls:
        turn["content"] = said + turn["content"]
    if calls:
        function = {**calls[0]["function"], "name": called + calls[0]["function"]["name"]}
        turn["tool_calls"] = [{**calls[0], "function": function}, *calls[1:]]
    return turn


def _places(text: str, marked: str, marks: list[str]) -> dict[str, int]:
    """Where in a text the placeholders of its marked rendering stand, each for the first time.

    Behind a placeholder a template does not trim what it trims without.
    """
    places: dict[str, int] = {}
    at = 0
    for piece in re.split(f"([{''.join(marks)}])", marked):
        if piece in marks:
            places.setdefault(piece, at)
            continue
        piece = piece if text.startswith(piece, at) else piece.lstrip()
        if not text.startswith(piece, at):
            break
        at += len(piece)
    else:
        if at == len(text):
            return places
    found = "the chat template leaves out reasoning, and changes with a mark in its place"
    do = "set thinking to drop, or use Gemma 4's own template"
    raise row_error(found, "a template that renders answers as they are", do)
