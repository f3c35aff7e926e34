"""A conversation -> text, through the model's own chat template, and nothing lost on the way.

transformers runs the template in Jinja's immutable sandbox: it sees the row, changes nothing and
reaches nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

from ...model.tokenizer import END_OF_TURN, TEMPLATE_ERRORS
from ..read.records import row_error
from .formats import Row
from .spans import MARKER, MARKERS, TURN, find_marks, model_turns
from .thoughts import (
    Turn,
    has_tags,
    missing_thoughts,
    put_in,
    thoughts_of,
    with_reasoning,
    without_reasoning,
)

_CALLED = re.compile(r"<\|tool_(call|response)>.*?<tool_\1\|>", re.DOTALL)
_marks_generation = lru_cache(maxsize=8)(re.compile(r"{%-?\s*generation\s*-?%}").search)


class Generated(NamedTuple):
    """A template's own rendering, before anything is put in, and what it marks as generated.

    `mask` (T) is that of `{% generation %}`; `quoted` as in a Rendering.
    """

    text: str
    quoted: frozenset[int]
    mask: Sequence[int]


@dataclass(frozen=True)
class Rendering:
    """A row as text.

    Attributes:
        messages: what the template was given; empty for a text row.
        options: what it was told besides.
        quoted: where in the text markers stand that are the row's own, and open or end no turn.
        generated: the template's own rendering and its `{% generation %}`, if it has that.
        removed: texts of reasoning that the template was not given.
        tagged: answers that begin with `<think>`, which is read as their reasoning.
    """

    row: Row
    text: str
    messages: Sequence[dict[str, Any]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    quoted: frozenset[int] = frozenset()
    generated: Generated | None = None
    removed: int = 0
    tagged: int = 0


def render(row: Row, tokenizer: Any, thinking: str, ends: tuple[str, str]) -> Rendering:
    """The text of a row: `<bos> text <eos>`, or what `apply_chat_template` gives.

    Where the row has reasoning, the template is told `enable_thinking`; what it leaves out of it
    is put in.

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
    messages: Sequence[Turn] = [with_reasoning(turn) for turn in row.messages]
    _refuse_markers_in_answers(messages, ends)
    thoughts = [thought for turn in messages for thought in thoughts_of(turn)]
    keeps = bool(thoughts) and thinking != "drop"
    if thoughts:
        messages = [_for_template(turn) if keeps else without_reasoning(turn) for turn in messages]
    tools = list(row.tools) or None
    options: dict[str, Any] = {"tools": tools, "enable_thinking": keeps}
    text = apply_template(tokenizer, messages, options)
    quoted = _quoted_markers(tokenizer, messages, options, text)
    _require_all(row, text, quoted)
    generated = None
    if _marks_generation(tokenizer.get_chat_template(None, tools)):
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        mask = apply_template(tokenizer, messages, options | how)["assistant_masks"]
        generated = Generated(text, quoted, mask)
    if keeps and _shown(text, quoted) != thoughts:
        again = partial(apply_template, tokenizer, options=options)
        text, quoted = put_in(text, quoted, missing_thoughts(messages, text, again))
    removed, tagged = 0 if keeps else len(thoughts), sum(map(has_tags, row.messages))
    return Rendering(row, text, messages, options, quoted, generated, removed, tagged)


def apply_template(tokenizer: Any, messages: Any, options: dict[str, Any]) -> Any:
    """What the chat template makes of messages, by default a text; a DataError says why not."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **({"tokenize": False} | options))
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        found = f"is refused by the model's chat template: {error}"
        do = "mend the row, such as turns of one speaker that follow each other, or remove it"
        raise row_error(found, "roles and fields as the template allows them", do) from None


def _said(turn: Turn) -> list[str]:
    """The texts of a turn."""
    content = turn["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def _for_template(turn: Turn) -> Turn:
    """A message with its reasoning under both names that templates read."""
    return {**turn, "reasoning_content": turn["reasoning"]} if "reasoning" in turn else turn


def _shown(text: str, quoted: frozenset[int]) -> list[str]:
    """The thoughts that a rendering shows."""
    marks = [mark for mark in find_marks(text) if mark.char not in quoted]
    spans = chain(*model_turns(text, marks, 0, 0))
    return [span.text for span in spans if span.kind == "thought" and span.text]


def _refuse_markers_in_answers(messages: Sequence[Turn], ends: tuple[str, str]) -> None:
    """No answer can hold what ends or opens a turn: generation would stop there."""
    never = (TURN, END_OF_TURN, *ends)
    for number, turn in enumerate(messages, 1):
        kinds = {part["type"] for part in turn["content"] if isinstance(part, dict)}
        if kinds and turn["role"] != "user":
            what = f"turn {number} ({turn['role']}) holds {' and '.join(sorted(kinds))}"
            raise row_error(what, "images and audio in turns of the user")
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
    others = [turn for turn in others if len(turn) > 2 or any("|" in t for t in _said(turn))]
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
    """System text, questions and tools must be there, in order; answers are checked later."""
    lost, at = [], 0
    for number, turn in enumerate(row.messages, 1):
        if turn["role"] in ("system", "user"):
            for said in map(str.strip, _said(turn)):
                place = text.find(said, at)
                lost += [f"turn {number} ({turn['role']})"] * (place < 0)
                at = max(at, place + len(said))
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
