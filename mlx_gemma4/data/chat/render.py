"""A conversation -> text, through the model's own chat template, and nothing lost on the way.

transformers runs the template in Jinja's immutable sandbox: it sees the row, changes nothing and
reaches nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

from ...model.tokenizer import END_OF_TURN
from ..read.records import row_error
from .formats import Row
from .spans import MARKER, MARKERS, TURN, find_marks, model_turns, spans_of

_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_THOUGHT = re.compile(r"<\|channel>.*?<channel\|>", re.DOTALL)
_CALLED = re.compile(r"<\|tool_(call|response)>.*?<tool_\1\|>", re.DOTALL)
_marks_generation = lru_cache(maxsize=8)(re.compile(r"{%-?\s*generation\s*-?%}").search)


@dataclass(frozen=True)
class Rendering:
    """A row as text.

    Attributes:
        messages: what the template was given; empty for a text row.
        options: what it was told besides.
        quoted: where in the text markers stand that are the row's own, and open or end no turn.
        generated: the template's mask (T) of `{% generation %}`, if it has that.
        removed: texts of reasoning that the template was not given.
    """

    row: Row
    text: str
    messages: Sequence[dict[str, Any]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    quoted: frozenset[int] = frozenset()
    generated: Sequence[int] | None = None
    removed: int = 0


def render(row: Row, tokenizer: Any, thinking: str, ends: tuple[str, str]) -> Rendering:
    """The text of a row: `<bos> text <eos>`, or what `apply_chat_template` gives.

    Where reasoning of the row is in the rendering, the template is told `enable_thinking`.

    Args:
        thinking: as in DataConfig.
        ends: the tokenizer's `<bos>` and `<eos>`.

    Raises:
        DataError: the template refuses the row or leaves out a part; an answer no model writes.
    """
    if row.shape == "text":
        bos, eos = ends
        return Rendering(row, bos + row.text.removeprefix(bos).removesuffix(eos) + eos)
    if not tokenizer.chat_template:
        found = "is a conversation and the tokenizer has no chat template"
        wanted = "chat_template.jinja, as the instruction-tuned (-it) checkpoints have it"
        raise row_error(found, wanted, "train an -it checkpoint, or use text rows")
    _refuse_markers_in_answers(row, ends)
    thoughts = [thought for turn in row.messages for thought in _thoughts(turn)]
    messages: Sequence[dict[str, Any]] = row.messages
    if thoughts:
        messages = [_with_thoughts(turn, thinking) for turn in messages]
    kept = [] if thinking == "drop" else thoughts
    tools = list(row.tools) or None
    for thinks in ({"enable_thinking": True}, {}) if kept else ({},):
        options: dict[str, Any] = {"tools": tools, **thinks}
        text = apply_template(tokenizer, messages, options)
        quoted = _quoted_markers(tokenizer, messages, options, text)
        if kept and _shows(text, quoted, kept):
            break
    _require_all(row, text, quoted)
    generated = None
    if _marks_generation(tokenizer.get_chat_template(None, tools)):
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        generated = apply_template(tokenizer, messages, options | how)["assistant_masks"]
    removed = len(thoughts) - len(kept)
    return Rendering(row, text, messages, options, quoted, generated, removed)


def apply_template(tokenizer: Any, messages: Any, options: dict[str, Any]) -> Any:
    """What the chat template makes of messages, by default a text; a DataError says why not."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **({"tokenize": False} | options))
    except (TemplateError, *_ERRORS) as error:  # of Jinja, and of Python within the template
        found = f"is refused by the model's chat template: {error}"
        raise row_error(found, "roles and fields as the template allows them") from None


def _with_thoughts(turn: dict[str, Any], thinking: str) -> dict[str, Any]:
    """A message with its reasoning under the names that templates read, or without any."""
    if turn["role"] == "assistant" and thinking == "drop":
        turn = {**turn, "content": _THOUGHT.sub("", turn["content"])}
        turn.pop("reasoning", None)
    return {**turn, "reasoning_content": turn["reasoning"]} if "reasoning" in turn else turn


def _thoughts(turn: dict[str, Any]) -> list[str]:
    """The reasoning of an assistant turn: its field, and channels within its text."""
    if turn["role"] != "assistant":
        return []
    within = [span.text for span in spans_of(turn["content"]) if span.kind == "thought"]
    return [thought for thought in (turn.get("reasoning", "").strip(), *within) if thought]


def _shows(text: str, quoted: frozenset[int], thoughts: list[str]) -> bool:
    marks = [mark for mark in find_marks(text) if mark.char not in quoted]
    spans = chain(*model_turns(text, marks, 0, 0))
    return any(span.kind == "thought" and span.text in thoughts for span in spans)


def _refuse_markers_in_answers(row: Row, ends: tuple[str, str]) -> None:
    """No answer can hold what ends or opens a turn: generation would stop there."""
    never = (TURN, END_OF_TURN, *ends)
    for number, turn in enumerate(row.messages, 1):
        if not isinstance(turn["content"], str):
            what = f"turn {number} ({turn['role']}) holds images or audio"
            raise row_error(what, "text, which alone can be trained on so far")
        if turn["role"] != "assistant":
            continue
        found = [marker for marker in never if marker in turn["content"]]
        for inner in _strings((turn.get("reasoning"), turn.get("tool_calls"))):
            found += [marker for marker in (*ends, *MARKERS) if marker in inner]
        if found:
            what = f"turn {number}, an answer, holds {' and '.join(dict.fromkeys(found))}"
            wanted = "answers without the markers that the chat template sets"
            raise row_error(what, wanted, "remove the markers from the answer")


def _quoted_markers(
    tokenizer: Any, messages: Sequence[dict[str, Any]], options: dict[str, Any], text: str
) -> frozenset[int]:
    """Where markers stand in the rendering that come from the text of the row.

    The row is rendered once more with each of them replaced by as many letters: the markers that
    are then missing are the row's own. Those of answers are not looked for: they are the model's.
    """
    others = [turn for turn in messages if turn["role"] != "assistant"]
    others = [turn for turn in others if "|" in turn["content"] or len(turn) > 2]
    if not any(MARKER.search(string) for string in _strings([others, options["tools"]])):
        return frozenset()
    letters = [turn if turn["role"] == "assistant" else _neutralised(turn) for turn in messages]
    plain = apply_template(tokenizer, letters, options | {"tools": _neutralised(options["tools"])})
    left = {mark.char for mark in find_marks(plain)}
    marks = find_marks(text)
    if len(plain) != len(text) or not left <= {mark.char for mark in marks}:
        found = "the chat template changes with the markers in the row's text"
        raise row_error(found, "text without the markers that the chat template sets")
    return frozenset(mark.char for mark in marks if mark.char not in left)


def _neutralised(value: Any) -> Any:
    return json.loads(MARKER.sub(lambda match: "x" * len(match.group()), json.dumps(value)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _require_all(row: Row, text: str, quoted: frozenset[int]) -> None:
    """System text, questions and tools must be there; answers are held against the text later."""
    lost = [
        f"turn {number} ({turn['role']})"
        for number, turn in enumerate(row.messages, 1)
        if turn["role"] in ("system", "user") and turn["content"].strip() not in text
    ]
    if row.tools:
        for char in quoted:
            text = text[:char] + " " + text[char + 1 :]
        text = _CALLED.sub("", text)
    names = [tool["function"]["name"] for tool in row.tools]
    lost += [f"the tool {name}" for name in names if name not in text]
    if lost:
        found = f"the chat template leaves out {', '.join(lost)}"
        do = "use Gemma 4's own template, or remove that part of the row"
        raise row_error(found, "a template that renders the whole row", do)
