"""JSONL files -> conversations: one row a line, in the three shapes that mlx-lm reads.

A row is one of:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["Row", "find_files", "read_rows"]

SPLITS = ("train", "valid", "test")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One row of a data file: a conversation, or plain text.

    Attributes:
        shape: "chat", "completions" or "text", as it was written.
        messages: turns with role and content; empty for text.
        text: the text; empty for a conversation.
        origin: "file:line".
    """

    shape: str
    messages: tuple[dict[str, str], ...]
    text: str
    origin: str


def find_files(source: str | Path) -> dict[str, Path]:
    """The file of each split: of a folder its train, valid and test.jsonl, of a file train.

    Raises:
        DataError: neither, or a folder without train.jsonl.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return {"train": source}
    if not source.is_dir():
        raise DataError(
            f"{source} does not exist",
            wanted="a folder with train.jsonl, or a .jsonl file",
            do="check the path given as data",
        )
    files = {name: source / f"{name}.jsonl" for name in SPLITS}
    found = {name: path for name, path in files.items() if path.is_file()}
    if "train" not in found:
        there = ", ".join(sorted(path.name for path in source.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{source} has no train.jsonl; it holds {there}",
            wanted="train.jsonl, and if you have them valid.jsonl and test.jsonl",
            do="rename the file, or name the file itself as data",
        )
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are passed over.

    Raises:
        DataError: a line that is not JSON, or not one of the three shapes, by file and line.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}",
            wanted="a text file in UTF-8 with one JSON object a line",
            do="check the file",
        ) from None


def _row(line: str, origin: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{origin} is not JSON: {error}",
            wanted="one JSON object a line",
            do="mend or remove the line",
        ) from None
    if "\\ud" in line.lower() and not _encodes(content):
        raise DataError(
            f"{origin} holds half of a surrogate pair",
            wanted="text that UTF-8 can hold",
            do="mend or remove the line",
        )
    if isinstance(content, dict):
        if "messages" in content:
            return Row("chat", _messages(content["messages"], origin), "", origin)
        if "prompt" in content and "completion" in content:
            turns = [
                {"role": "user", "content": content["prompt"]},
                {"role": "assistant", "content": content["completion"]},
            ]
            return Row("completions", _messages(turns, origin), "", origin)
        if "text" in content:
            if not isinstance(content["text"], str) or not content["text"].strip():
                raise DataError(
                    f"{origin} has text {str(content['text'])[:40]!r}",
                    wanted="text that is not empty",
                    do="mend or remove the line",
                )
            return Row("text", (), content["text"], origin)
        found = f"{origin} has the keys {', '.join(sorted(map(str, content))) or '(none)'}"
    else:
        found = f"{origin} is a JSON {type(content).__name__}"
    raise DataError(
        found,
        wanted="messages, or prompt and completion, or text",
        do="rename the fields of the file",
    )


def _encodes(content: Any) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _messages(turns: Any, origin: str) -> tuple[dict[str, str], ...]:
    def refuse(found: str, wanted: str) -> DataError:
        return DataError(f"{origin}: {found}", wanted=wanted, do="mend or remove the line")

    if not isinstance(turns, list) or not turns:
        raise refuse("messages is empty or no list", "a list of turns")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            role = turn.get("role") if isinstance(turn, dict) else turn
            raise refuse(f"turn {i + 1} has role {role!r}", "a role of " + ", ".join(_ROLES))
        if not isinstance(turn.get("content"), str):
            raise refuse(f"turn {i + 1} ({turn['role']}) has no text content", "content as text")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
