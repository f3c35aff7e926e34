"""A raw row -> `Row`: a conversation or a text, whatever shape the row was written in.

The fields tell the shape; docs/data.md shows each. A turn of a `Row` is a dict with `role` (system,
user, assistant, tool) and `content`, a text, or with images or audio a list of parts (media.py).
It may have `reasoning`, a text; `tool_calls`, each {"type": "function", "function": {"name",
"arguments"}} with arguments as an object; `name` and `tool_call_id` of a tool's answer; and
`train: False` if it is never a target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ...config import DataConfig
from ..read.files import DataFile
from ..read.records import Raw, located, record_of, row_error, without_nulls
from .media import MEDIA, add_media, media_part

Media = Callable[[dict], dict[str, str]]

_DEEPEST = 50
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_MORE_ROLES = _ROLES | {"developer": "system", "function": "tool", "model": "assistant"}
_SHAREGPT = _ROLES | {
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("function", "observation"), "tool"),
    "human": "user",
    "function_call": "function_call",
}
_REASONING = ("reasoning", "reasoning_content", "thinking")
_MAY_FOLLOW = {
    None: ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("user", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True)
class Row:
    """One row of a dataset: a conversation, or plain text.

    Attributes:
        shape: "chat", "tools", "sharegpt", "completions", "alpaca" or "text", as it was written.
        messages: turns, as the head of this file describes them; empty for text.
        origin: "file:line".
        tools: the tools that a conversation may use, as JSON schemas.
    """

    shape: str
    messages: tuple[dict[str, Any], ...]
    text: str
    origin: str
    tools: tuple[dict[str, Any], ...] = ()


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file; a DataError names the first that cannot be used, by file and line."""
    file = DataFile.of(Path(path))
    for number, raw in file.records():
        yield row_of(raw, f"{file.place}{number}", DataConfig(), file.folder)


def row_of(raw: Raw, origin: str, config: DataConfig, folder: Path | None) -> Row:
    """A raw row as a Row; a DataError names one that cannot be used, by its origin.

    Args:
        folder: where paths of media begin, which they leave only where media_anywhere is set.
    """
    with located(origin):
        record = record_of(raw)
        if config.columns:
            if missing := [name for name in config.columns.values() if name not in record]:
                found = f"has no column {', '.join(missing)}; it has {_names(record)}"
                raise row_error(found, "those that columns names", "change columns")
            record = {name: record[column] for name, column in config.columns.items()}
        media = partial(media_part, folder=folder, anywhere=config.media_anywhere)
        row = _row(record, origin, media)
        _require_clean((row.messages, row.tools, row.text), _DEEPEST)
        return row


def _row(record: dict, origin: str, media: Media) -> Row:
    turns: Any
    if "messages" in record:
        shape, turns = "chat", record["messages"]
    elif "conversations" in record:
        shape, turns = "sharegpt", record["conversations"]
    elif {"prompt", "completion"} <= record.keys():
        shape, turns = "completions", _pair(record["prompt"], record["completion"])
    elif {"instruction", "output"} <= record.keys():
        asked, given = record["instruction"], _text(record.get("input") or "", "input")
        asked = _text(asked, "instruction") + (f"\n\n{given}" if given.strip() else "")
        shape, turns = "alpaca", _pair(asked, record["output"])
    elif "text" in record:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise row_error(f"has text {str(text)[:40]!r}", "text that is not empty")
        return Row("text", (), text, origin)
    else:
        wanted = "messages; conversations; prompt and completion; instruction and output; or text"
        do = "rename the fields of the file, or map them: columns prompt=question ..."
        raise row_error(f"has the keys {_names(record) or '(none)'}", wanted, do)
    turns = _from_json(turns, "messages")
    if not isinstance(turns, list) or not turns:
        raise row_error("messages is empty or no list", "a list of turns")
    if record.get("system") not in (None, ""):
        turns = [{"role": "system", "content": record["system"]}, *turns]
    messages = tuple(_conversation(add_media(turns, record), media))
    functions = _functions(record.get("tools") or record.get("functions") or [], "tools")
    tools = tuple({"type": "function", "function": without_nulls(f)} for _, f in functions)
    if shape == "chat" and (tools or any("tool_calls" in turn for turn in messages)):
        shape = "tools"
    return Row(shape, messages, "", origin, tools)


def _pair(prompt: Any, completion: Any) -> list:
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _conversation(turns: list, media: Media) -> Iterator[dict[str, Any]]:
    """The turns as the head of this file describes them, in an order that a template takes."""
    previous: dict[str, Any] = {"role": None}
    for number, given in enumerate(turns, 1):
        with located(f"turn {number}"):
            role = _role(given)
        with located(f"turn {number} ({role})"):
            turn = _turn(given, role, media)
            role, before = turn["role"], previous["role"]
            if role not in _MAY_FOLLOW[before]:
                wanted = "a system turn at most first, and answers that do not follow each other"
                do = "join the turns of the assistant, and put system text first"
                raise row_error(f"follows {before}" if before else "is the first", wanted, do)
            if role == "tool" and before == "assistant" and "tool_calls" not in previous:
                wanted = "an assistant turn with tool_calls before it"
                raise row_error(f"answers turn {number - 1}, which calls no tool", wanted)
        yield turn
        previous = turn


def _role(turn: Any) -> str:
    given = turn
    if isinstance(turn, dict):
        speaker: Any = turn.get("from")
        given = speaker if isinstance(speaker, str) else turn.get("role")
        if isinstance(given, str):
            role = _SHAREGPT.get(given.lower()) if given is speaker else _MORE_ROLES.get(given)
            if role:
                return role
    raise row_error(f"has role {repr(given)[:60]}", "a role of " + ", ".join(_ROLES))


def _turn(turn: dict, role: str, media: Media) -> dict[str, Any]:
    content = turn.get("value" if "from" in turn else "content")
    calls = turn.get("function_call") or turn.get("tool_calls") or []
    if role == "function_call":  # ShareGPT's: the call as JSON
        role, calls, content = "assistant", _text(content, "value") or "{}", ""
    said = "" if calls and content in (None, []) else _content(content, media)
    normal: dict[str, Any] = {"role": role, "content": said}
    if reasoning := _reasoning(turn, content):
        normal["reasoning"] = reasoning
    if calls:
        normal["tool_calls"] = _tool_calls(calls)
    if role != "assistant" and (reasoning or calls):
        what = "tool calls" if calls else "reasoning"
        raise row_error(f"has {what}", "those on assistant turns only")
    for key in ("name", "tool_call_id"):
        if role == "tool" and turn.get(key) is not None:
            normal[key] = _text(turn[key], key)
    weight = turn.get("weight")
    if weight is not None and (role != "assistant" or weight not in (0, 1)):
        raise row_error(f"has weight {weight!r}", "0 or 1, on an assistant turn")
    if weight == 0:
        normal["train"] = False
    return normal


def _reasoning(turn: dict, content: Any) -> str:
    """The one text of reasoning of a turn, or ""."""
    texts = [turn[key] for key in _REASONING if turn.get(key)]
    if isinstance(content, list):
        texts += [part["thinking"] for part in content if part.get("type") == "thinking"]
    if not all(isinstance(text, str) for text in texts) or len(set(texts)) > 1:
        found = f"has {len(texts)} fields of reasoning, or one that is no text"
        raise row_error(found, f"one text: {', '.join(_REASONING)}")
    return texts[0] if texts else ""


def _content(content: Any, media: Media) -> str | list[dict]:
    """Text, or parts with images or audio."""
    if isinstance(content, str):
        return content
    if not (content and isinstance(content, list) and all(isinstance(p, dict) for p in content)):
        raise row_error("has no text content", "content as text, or a list of parts with text")
    parts = []
    for part in content:
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text"):
            parts.append({"type": "text", "text": _text(part.get("text"), "text")})
        elif isinstance(kind, str) and kind in MEDIA:
            parts.append(media(part))
        elif kind != "thinking":
            raise row_error(f"has a part of type {kind!r}", "text, image or audio")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    done = []
    for call, function in _functions(calls, "tool_calls"):
        name = function["name"]
        arguments = _from_json(function.get("arguments"), f"the arguments of {name}")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            raise row_error(f"the arguments of {name} are a {kind}", "an object")
        normal = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            normal["id"] = call["id"]
        done.append(normal)
    return done


def _functions(entries: Any, what: str) -> Iterator[tuple[dict, Any]]:
    """Each entry of tools or tool calls, and the function that it is or holds."""
    entries = _from_json(entries, what)
    for entry in entries if isinstance(entries, list) else [entries]:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            wanted = 'entries such as {"type": "function", "function": {"name": "...", ...}}'
            raise row_error(f"{what} has an entry without the name of a function", wanted)
        yield entry, function


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise row_error(f"has {key} {value!r}"[:200], "a text")
    return value


def _from_json(value: Any, what: str) -> Any:
    """A value that a row may hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except (ValueError, RecursionError) as error:
        raise row_error(f"{what} is text that is not JSON: {error}", "JSON") from None


def _names(record: dict) -> str:
    names = ", ".join(sorted(map(str, record)))
    return names if len(names) <= 200 else names[:200] + " ..."


def _require_clean(value: Any, depth: int) -> None:
    """Refuse text that no tokenizer takes, and nesting that no template can walk."""
    if isinstance(value, str):
        if "\0" in value:
            raise row_error("the text holds a NUL character", "text without it")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code, found = ord(value[error.start]), "holds half of a surrogate pair"
            if 0xDC80 <= code <= 0xDCFF:  # what `surrogateescape` makes of a byte
                found = f"the byte {code - 0xDC00:#x} is not UTF-8"
            raise row_error(found, "text that UTF-8 can hold") from None
    elif isinstance(value, (dict, list, tuple)):
        if not depth:
            raise row_error("nested too deep", f"at most {_DEEPEST} levels")
        if isinstance(value, dict):
            if not all(isinstance(name, str) for name in value):
                raise row_error("the name of a field is no text", "names as texts")
            value = chain(value, value.values())
        for item in value:
            _require_clean(item, depth - 1)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise row_error(f"holds a {type(value).__name__}", "what JSON can hold")
