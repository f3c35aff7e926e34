"""Turns as files write them -> turns as the rest of the program reads them.

A turn is a dict with `role` (system, user, assistant, tool) and `content`, a text. Where there are
any, it also has `reasoning`, a text; `tool_calls`, each {"type": "function", "function": {"name",
"arguments"}} with arguments as an object; `name` and `tool_call_id` of a tool's answer; and
`train: False` on an assistant turn that is shown but never learned. With images or audio,
`content` is a list of parts {"type": "text" | "image" | "audio", the same word: text or path}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["ROLES", "normalise_turns", "refuse", "resolve_media"]

ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLE = {"developer": "system", "function": "tool"}
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_call": "function_call",
}  # fmt: skip
_REASONING = ("reasoning", "reasoning_content", "thinking")
_MEDIA = {"image": "image", "image_url": "image", "audio": "audio", "audio_url": "audio"}


def refuse(origin: str, found: str, wanted: str, do: str = "mend or remove the line") -> DataError:
    """An error for the row at `origin`."""
    return DataError(f"{origin}: {found}", wanted=wanted, do=do)


def normalise_turns(
    turns: Any, origin: str, *, folder: Path | None = None, media_anywhere: bool = False
) -> tuple[dict[str, Any], ...]:
    """The turns of one conversation, with roles and fields as the head of this file says.

    Args:
        turns: what the row holds; JSON text is parsed, as columns of tables have it.
        origin: "file:line", for messages.
        folder: where paths of images and audio begin, and which they may not leave.
        media_anywhere: let them leave it.

    Raises:
        DataError: a turn that is none, or turns in an order that no conversation has.
    """
    if isinstance(turns, str):
        turns = from_json(turns, origin, "messages")
    if not isinstance(turns, list) or not turns:
        raise refuse(origin, "messages is empty or no list", "a list of turns")
    done = []
    for number, turn in enumerate(turns, 1):
        where = f"{origin}: turn {number}"
        role = _role(turn, where)
        normal = _called(turn, where) if role == "function_call" else _turn(turn, role, where)
        if isinstance(normal["content"], list):
            normal["content"] = [
                resolve_media(part, where, folder, media_anywhere) for part in normal["content"]
            ]
        done.append(normal)
    _require_order(done, origin)
    return tuple(done)


def _role(turn: Any, where: str) -> str:
    role = turn
    if isinstance(turn, dict):
        if isinstance(turn.get("from"), str):
            role = _SHAREGPT.get(turn["from"].lower(), turn["from"])
        else:
            role = turn.get("role")
            role = _SAME_ROLE.get(role, role) if isinstance(role, str) else role
        if isinstance(role, str) and role in (*ROLES, "function_call"):
            return role
    raise DataError(
        f"{where} has role {repr(role)[:60]}",
        wanted="a role of " + ", ".join(ROLES),
        do="mend or remove the line",
    )


def _turn(turn: dict, role: str, where: str) -> dict[str, Any]:
    content = turn.get("value" if "from" in turn else "content")
    normal: dict[str, Any] = {"role": role, "content": _content(content, role, where)}
    thoughts = [turn[key] for key in _REASONING if turn.get(key)]
    if isinstance(content, list):
        thoughts += [part["thinking"] for part in content if part.get("type") == "thinking"]
    if any(not isinstance(thought, str) for thought in thoughts) or len(set(thoughts)) > 1:
        raise DataError(
            f"{where} ({role}) has {len(thoughts)} fields of reasoning, or one that is no text",
            wanted="one text: reasoning, reasoning_content or thinking",
            do="mend or remove the line",
        )
    if thoughts:
        normal["reasoning"] = thoughts[0]
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):
        calls = [{"function": turn["function_call"]}]
    if calls:
        normal["tool_calls"] = _tool_calls(calls, where)
    for key in ("name", "tool_call_id"):
        if role == "tool" and turn.get(key) is not None:
            normal[key] = _text(turn[key], key, where)
    if (thoughts or calls) and role != "assistant":
        raise DataError(
            f"{where} ({role}) has {'tool calls' if calls else 'reasoning'}",
            wanted="those on assistant turns only",
            do="mend or remove the line",
        )
    if role == "assistant" and turn.get("weight") in (0, 1):
        if not turn["weight"]:
            normal["train"] = False
    elif turn.get("weight") is not None:
        raise DataError(
            f"{where} ({role}) has weight {turn['weight']!r}",
            wanted="0 or 1, on an assistant turn",
            do="mend the line, or remove the weight",
        )
    if content in (None, []) and role == "assistant" and not calls:
        raise _no_content(role, where)
    return normal


def _no_content(role: str, where: str) -> DataError:
    return DataError(
        f"{where} ({role}) has no text content",
        wanted="content as text, or a list of parts with text",
        do="mend or remove the line",
    )


def _content(content: Any, role: str, where: str) -> str | list[dict[str, str]]:
    """Text as it is; parts as one text, or as parts where there are images or audio."""
    if content in (None, []) and role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if (
        not isinstance(content, list)
        or not content
        or not all(isinstance(part, dict) for part in content)
    ):
        raise _no_content(role, where)
    parts = [part for part in content if part.get("type") != "thinking"]
    normal = [_part(part, where) for part in parts]
    if all(part["type"] == "text" for part in normal):
        return "".join(part["text"] for part in normal)
    return normal


def _part(part: dict, where: str) -> dict[str, str]:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        return {"type": "text", "text": _text(part.get("text"), "text", where)}
    if isinstance(kind, str) and kind in _MEDIA:
        keys = (kind, _MEDIA[kind], "path", "url")
        value = next((part[key] for key in keys if part.get(key)), None)
        if isinstance(value, dict):
            value = value.get("url") or value.get("path")
        return {"type": _MEDIA[kind], _MEDIA[kind]: _text(value, f"path of {kind}", where)}
    raise DataError(
        f"{where} has a part of type {kind!r}",
        wanted="text, image or audio",
        do="mend or remove the line",
    )


def resolve_media(
    part: dict[str, str], where: str, folder: Path | None, anywhere: bool
) -> dict[str, str]:
    """The part with the whole path of its file.

    Raises:
        DataError: an address instead of a path, a path outside the folder, or no file there.
    """
    kind = part["type"]
    if kind == "text":
        return part
    name = part[kind].removeprefix("file://")
    if "://" in name or name.startswith("data:") or folder is None:
        raise DataError(
            f"{where} has the {kind} {name[:60]!r}",
            wanted="a path within the data folder; nothing is downloaded",
            do="save the file beside the rows and name its path",
        )
    try:
        path, root = (folder / name).resolve(), folder.resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):
        path, root, there = folder / "?", folder, False
    if not anywhere and not path.is_relative_to(root):
        raise DataError(
            f"{where} has the {kind} {name[:200]!r}, outside of {folder}",
            wanted="paths within the folder of the rows",
            do="move the file there, or set media_anywhere if you trust these rows",
        )
    if not there:
        raise DataError(
            f"{where} has the {kind} {name[:200]!r}, and there is no such file",
            wanted=f"the path of a file, from {folder}",
            do="mend the path",
        )
    return {"type": kind, kind: str(path)}


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where} has {key} {value!r}"[:200], wanted="a text", do="mend or remove the line"
        )
    return value


def _called(turn: dict, where: str) -> dict[str, Any]:
    """ShareGPT's turn from function_call: the call as JSON."""
    call = from_json(_text(turn.get("value"), "value", where), where, "a function_call")
    calls = call if isinstance(call, list) else [call]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": _tool_calls([{"function": c} for c in calls], where),
    }


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = from_json(calls, where, "tool_calls")
    done = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise DataError(
                f"{where} has a tool call without the name of a function",
                wanted='{"function": {"name": "...", "arguments": {...}}}',
                do="mend or remove the line",
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = from_json(arguments, where, f"the arguments of {name}")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise DataError(
                f"{where}: the arguments of {name} are a {type(arguments).__name__}",
                wanted="an object, or JSON text of one",
                do="mend or remove the line",
            )
        normal = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            normal["id"] = call["id"]
        done.append(normal)
    return done


def from_json(text: str, where: str, what: str) -> Any:
    """A value that a row holds as JSON text."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {what} is text that is not JSON: {error}",
            wanted="JSON",
            do="mend or remove the line",
        ) from None


_MAY_FOLLOW = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _require_order(turns: list[dict[str, Any]], origin: str) -> None:
    previous, calls = None, False
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role not in _MAY_FOLLOW[previous]:
            after = f"follows {previous}" if previous else "is the first"
            raise refuse(
                origin,
                f"turn {number} ({role}) {after}",
                "a system turn at most first, then user and assistant in turn",
                "join turns of one speaker, and let a conversation begin with the user",
            )
        if role == "tool" and previous == "assistant" and not calls:
            raise refuse(
                origin,
                f"turn {number} is a tool's answer, and turn {number - 1} calls no tool",
                "an assistant turn with tool_calls before it",
            )
        previous, calls = role, bool(turn.get("tool_calls"))
