"""A raw row -> `Row`: a conversation or a text, whatever shape the row was written in.

The shape is told by the fields, in this order: `messages` (chat; tools, where there are any),
`conversations` (sharegpt), `prompt` and `completion` (completions), `instruction` and `output`
(alpaca), `text`. docs/data.md shows each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .files import DataFile
from .records import Raw, no_object, parse_line, read_records, without_nulls
from .turns import from_json, normalise_turns, refuse

__all__ = ["Manner", "Row", "column_map", "read_rows", "row_of"]

_WANTED = "messages; conversations; prompt and completion; instruction and output; or text"
_DEEPEST = 50
_MEDIA_FIELDS = {"image": "image", "images": "image", "audio": "audio", "audios": "audio"}


@dataclass(frozen=True)
class Row:
    """One row of a data file: a conversation, or plain text.

    Attributes:
        shape: "chat", "tools", "sharegpt", "completions", "alpaca" or "text", as it was written.
        messages: turns as `turns.py` describes them; empty for text.
        text: the text; empty for a conversation.
        origin: "file:line".
        tools: the tools that a conversation may use, as JSON schemas.
    """

    shape: str
    messages: tuple[dict[str, Any], ...]
    text: str
    origin: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Manner:
    """How rows are to be read.

    Attributes:
        columns: our field -> the row's column; empty takes the fields as they are.
        folder: where paths of images and audio begin.
        media_anywhere: let such paths leave the folder.
    """

    columns: Mapping[str, str]
    folder: Path | None = None
    media_anywhere: bool = False


def column_map(columns: Sequence[str]) -> dict[str, str]:
    """`("prompt=question", ...)` as {"prompt": "question"}.

    Raises:
        ConfigError: something other than field=column.

    >>> column_map(["prompt=question", "completion=answer"])
    {'prompt': 'question', 'completion': 'answer'}
    """
    pairs = [pair.partition("=") for pair in columns]
    for name, sign, column in pairs:
        if not (name and column):
            raise ConfigError(
                f"columns holds {name + sign + column!r}",
                wanted="field=column, such as prompt=question",
                do="change columns",
            )
    return {name: column for name, _, column in pairs}


def read_rows(path: str | Path, manner: Manner | None = None) -> Iterator[Row]:
    """The rows of a file, in the order they stand there; blank lines are passed over.

    Raises:
        DataError: the first row that cannot be used, by file and line.
    """
    file = DataFile.of(Path(path))
    for number, raw in read_records(file):
        yield row_of(raw, file.origin(number), manner or Manner({}, file.path.parent))


def row_of(raw: Raw, origin: str, manner: Manner) -> Row:
    """A raw row as a Row.

    Raises:
        DataError: a row that cannot be used, by its origin.
    """
    if isinstance(raw, DataError):
        raise raw
    record = parse_line(raw, origin) if isinstance(raw, bytes) else raw
    if not isinstance(record, dict):
        raise no_object(record, origin)
    if manner.columns:
        record = _renamed(record, origin, manner.columns)
    row = _row(record, origin, manner)
    _require_clean((row.messages, row.tools, row.text), origin, _DEEPEST)
    return row


def _renamed(record: dict, origin: str, columns: Mapping[str, str]) -> dict:
    missing = [column for column in columns.values() if column not in record]
    if missing:
        raise DataError(
            f"{origin} has no column {', '.join(missing)}; it has {_names(record)}",
            wanted=", ".join(columns.values()) + ", which columns names",
            do="change columns",
        )
    return {name: record[column] for name, column in columns.items()}


def _row(record: dict, origin: str, manner: Manner) -> Row:
    has = {key for key, value in record.items() if value is not None}
    if "messages" in record:
        shape, turns = "chat", record["messages"]
    elif "conversations" in record:
        shape, turns = "sharegpt", record["conversations"]
    elif {"prompt", "completion"} <= record.keys():
        shape, turns = "completions", _prompt_and_completion(record)
    elif {"instruction", "output"} <= record.keys():
        shape, turns = "alpaca", _alpaca(record, origin)
    elif "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise DataError(
                f"{origin} has text {str(record['text'])[:40]!r}",
                wanted="text that is not empty",
                do="mend or remove the line",
            )
        return Row("text", (), record["text"], origin)
    else:
        raise DataError(
            f"{origin} has the keys {_names(record)}",
            wanted=_WANTED,
            do="rename the fields of the file, or map them: columns prompt=question ...",
        )
    if isinstance(turns, str):
        turns = from_json(turns, origin, "messages")
    if isinstance(turns, list) and "system" in has and record["system"] != "":
        turns = [{"role": "system", "content": record["system"]}, *turns]
    if isinstance(turns, list) and has & _MEDIA_FIELDS.keys():
        turns = _with_media(turns, record, origin)
    messages = normalise_turns(
        turns, origin, folder=manner.folder, media_anywhere=manner.media_anywhere
    )
    tools = _tools(record, origin)
    if shape == "chat" and (tools or any("tool_calls" in turn for turn in messages)):
        shape = "tools"
    return Row(shape, messages, "", origin, tools)


def _prompt_and_completion(record: dict) -> list:
    """Two texts are a question and its answer; lists of turns are joined."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]


def _alpaca(record: dict, origin: str) -> list:
    question = record["instruction"]
    given = record.get("input") or ""
    if not isinstance(question, str) or not isinstance(given, str):
        raise refuse(origin, "instruction or input is no text", "texts")
    return [
        {"role": "user", "content": f"{question}\n\n{given}" if given.strip() else question},
        {"role": "assistant", "content": record["output"]},
    ]


def _with_media(turns: list, record: dict, origin: str) -> list:
    """Images and audio of the row as parts that come first in the first user turn."""
    parts = []
    for field, kind in _MEDIA_FIELDS.items():
        value = record.get(field)
        for path in value if isinstance(value, list) else [value] if value else []:
            parts.append({"type": kind, kind: path})
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and (turn.get("from") or turn.get("role")) in ("user", "human"):
            key = "value" if "from" in turn else "content"
            text = turn.get(key)
            rest = text if isinstance(text, list) else [{"type": "text", "text": text}]
            return [*turns[:i], {**turn, key: parts + rest}, *turns[i + 1 :]]
    if not parts:
        return turns
    raise refuse(origin, "images or audio and no user turn", "a user turn to show them in")


def _tools(record: dict, origin: str) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or record.get("functions") or []
    if isinstance(tools, str):
        tools = from_json(tools, origin, "tools")
    wrapped = []
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise refuse(
                origin,
                "tools has an entry without the name of a function",
                'a list of {"type": "function", "function": {"name": "...", ...}}',
            )
        wrapped.append({"type": "function", "function": without_nulls(function)})
    return tuple(wrapped)


def _names(record: dict) -> str:
    names = ", ".join(sorted(map(str, record))) or "(none)"
    return names if len(names) <= 200 else names[:200] + " ..."


def _require_clean(value: Any, origin: str, depth: int) -> None:
    """Refuse text that no tokenizer takes, and nesting that no template can walk."""
    if isinstance(value, str):
        if "\0" in value:
            raise refuse(origin, "the text holds a NUL character", "text without it")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise _half_a_character(value[error.start], origin) from None
    elif isinstance(value, (dict, list, tuple)):
        if not depth:
            raise refuse(origin, "nested too deep", f"at most {_DEEPEST} levels")
        for item in value.items() if isinstance(value, dict) else value:
            _require_clean(item, origin, depth - 1)


def _half_a_character(character: str, origin: str) -> DataError:
    if "\udc80" <= character <= "\udcff":
        # What reading a file with `surrogateescape` makes of a byte that is not UTF-8.
        return refuse(
            origin,
            f"the byte {ord(character) - 0xDC00:#x} is not UTF-8",
            "text in UTF-8",
            "save the file as UTF-8, or remove the line",
        )
    return refuse(origin, "holds half of a surrogate pair", "text that UTF-8 can hold")
