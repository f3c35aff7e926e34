"""What a model may be asked, a text or messages, as a chat template reads it; and its answer.

Messages are OpenAI's: role and content, and where there are any tool_calls, name, tool_call_id and
reasoning. They come out as training renders them: calls with arguments as objects, content as text,
or with images or audio as parts: {"type": "image", "image": a path or what `media` reads}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import ConfigError

Prompt = str | Sequence[Mapping[str, Any]]
"""What the user says, or a conversation up to where the model answers."""

_OPEN, _CLOSE = "<|channel>", "<channel|>"
_CHANNEL = re.compile(r"(<\|channel>|<channel\|>)")
MEDIA_KINDS = ("image", "audio")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLES = ("system", "developer", "user", "assistant", "tool")


def conversation(prompt: Prompt, system: str | None = None) -> list[dict[str, Any]]:
    """The messages of a prompt.

    Args:
        system: what a system turn before them says.

    Raises:
        ConfigError: nothing is asked, or a message that is none.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not prompt:
        raise _refusal(f"the prompt is {prompt!r}"[:100], "text, or a list of messages")
    messages = [_message(message, number) for number, message in enumerate(prompt, 1)]
    if system and messages[0]["role"] in ("system", "developer"):
        raise _refusal("system is given, and the messages begin with a system turn", "one of them")
    return [{"role": "system", "content": system}, *messages] if system else messages


def with_media(prompt: Prompt, images: Sequence[Any], audio: Sequence[Any]) -> Prompt:
    """A prompt that shows media first in its first user turn."""
    parts = [{"type": "image", "image": value} for value in images]
    parts += [{"type": "audio", "audio": value} for value in audio]
    if not parts:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    for i, turn in enumerate(turns):
        if isinstance(turn, Mapping) and turn.get("role") == "user":
            said = turn.get("content")
            rest = said if isinstance(said, list) else [{"type": "text", "text": said}]
            return [*turns[:i], {**turn, "content": [*parts, *rest]}, *turns[i + 1 :]]
    raise _refusal("images or audio, and a prompt without a user turn", "a user turn")


def media_of(messages: Iterable[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """(kind, what it is) of the parts of a conversation that are media, in order."""
    lists = (turn["content"] for turn in messages if isinstance(turn["content"], list))
    parts = (part for parts in lists for part in parts if part["type"] in MEDIA_KINDS)
    return [(part["type"], part[part["type"]]) for part in parts]


def functions(tools: Any) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form, with or without the "function" around each; None for no tools.

    Raises:
        ConfigError: no list, or an entry without a name.
    """
    if not tools:
        return None
    entries = tools if isinstance(tools, Sequence) else [None]
    found = []
    for tool in entries:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            wanted = 'a list such as [{"type": "function", "function": {"name": "...", ...}}]'
            raise _refusal("tools has an entry without the name of a function", wanted)
        found.append({"type": "function", "function": dict(function)})
    return found


def split_thought(answer: str) -> tuple[str, str]:
    """(what the model thought, what it said) of an answer; the thought is empty without one.

    >>> split_thought("<|channel>thought\\nA list? Easy.\\n<channel|>It holds values.")
    ('A list? Easy.', 'It holds values.')
    """
    texts: dict[bool, str] = {True: "", False: ""}
    for is_thought, text in mark_thoughts([answer]):
        texts[is_thought] += text
    return texts[True].strip(), texts[False].strip()


def mark_thoughts(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """(whether it is thought, text) of an answer's pieces, without the markers of thoughts."""
    is_thought = in_name = False  # a channel begins with a line that names it
    for piece in pieces:
        for part in _CHANNEL.split(piece):
            if part in (_OPEN, _CLOSE):
                is_thought = in_name = part == _OPEN
                continue
            if in_name:
                _, end, part = part.partition("\n")
                in_name = not end
            if part:
                yield is_thought, part


def _message(given: Any, number: int) -> dict[str, Any]:
    role = given.get("role") if isinstance(given, Mapping) else None
    if role not in _ROLES:
        found = f"message {number} has {f'the role {role!r}' if role else 'no role'}"
        raise _refusal(found, "a role of " + ", ".join(_ROLES))
    message = {key: value for key, value in given.items() if value is not None}
    message["content"] = _content(message.get("content", ""), number, role)
    if role == "user" and isinstance(message["content"], str) and not message["content"].strip():
        raise _refusal(f"message {number} (user) is empty", "a question")
    if "reasoning" in message:
        message.setdefault("reasoning_content", message["reasoning"])
    if calls := message.get("tool_calls"):
        calls = calls if isinstance(calls, Sequence) else [calls]
        message["tool_calls"] = [_call(call, number) for call in calls]
    return message


def _content(content: Any, number: int, role: str) -> str | list[dict[str, Any]]:
    """Text, or in a turn of the user with images or audio parts."""
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = []
    for part in given if isinstance(given, Sequence) else [{"type": None}]:
        part = part if isinstance(part, Mapping) else {"type": None}
        kind = part.get("type", "text")
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in MEDIA_KINDS and part.get(kind) is not None and role == "user":
            parts.append({"type": kind, kind: part[kind]})
        else:
            wanted = 'text, or in user turns {"type": "image", "image": "a.png"}'
            raise _refusal(f"message {number} has content other than text and media", wanted)
    if media_of([{"content": parts}]):
        return parts
    return "".join(str(part["text"]) for part in parts)


def _call(call: Any, number: int) -> dict[str, Any]:
    try:
        function = dict(call["function"])
        arguments = function.get("arguments") or {}
        function["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(function["name"], str) and isinstance(function["arguments"], Mapping):
            return {**call, "function": function}
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    wanted = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
    raise _refusal(f"message {number} has a tool call that is none", wanted)


def _refusal(found: str, wanted: str) -> ConfigError:
    return ConfigError(found, wanted=wanted, do="change the prompt")
