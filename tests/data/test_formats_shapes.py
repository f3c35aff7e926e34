"""Every accepted shape of rows: the table of docs/data.md, run; and where media may lie."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_gemma4.config import DataConfig
from mlx_gemma4.data.chat.encode import Chunk, Task, encode_chunk
from mlx_gemma4.data.chat.formats import row_of
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tokenizer import load_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
TABLE = re.findall(r"^\| (\w+) \| `(.+)` \| (.+) \|$", DOCS.read_text("utf-8"), re.MULTILINE)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def row(record: dict, folder: Path | None = None, **settings):
    return row_of(record, "rows.jsonl:7", DataConfig(**settings), folder)


def said(turn: dict) -> str:
    """A turn as docs/data.md writes it."""
    calls = "".join(
        call["function"]["name"] + json.dumps(call["function"]["arguments"])
        for call in turn.get("tool_calls", [])
    )
    thought = f"({turn['reasoning']}) " if "reasoning" in turn else ""
    return f"{turn['role']}: {thought}{turn['content']}{calls}".replace("\n", "⏎")


def test_the_table_shows_every_shape():
    assert {shape for shape, _, _ in TABLE} == {
        *("chat", "tools", "sharegpt", "completions", "alpaca", "text")
    }


@pytest.mark.parametrize(("shape", "example", "becomes"), TABLE)
def test_a_row_of_the_table(shape, example, becomes, tiny):
    raw = example.encode()
    read = row_of(raw, "rows.jsonl:1", DataConfig(), None)
    assert read.shape == shape
    assert (read.text or " / ".join(map(said, read.messages))) == becomes
    task = Task(load_tokenizer(tiny), 1024, DataConfig())
    encoded = encode_chunk(task, Chunk("rows.jsonl:", None, [(1, raw)]))
    assert encoded.facts.shapes == {shape: 1}
    assert len(encoded.lengths) == 1


def test_tools_become_schemas_of_functions():
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    whole = ({"type": "function", "function": function},)
    for tools in ([function], list(whole), json.dumps([function])):
        assert row({"messages": TURNS, "tools": tools}).tools == whole
    assert row({"messages": TURNS, "functions": [function]}).shape == "tools"


def test_calls_keep_their_ids_and_answers_their_names():
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    answer = {"role": "tool", "tool_call_id": "c1", "name": "now", "content": "12:00"}
    turns = [TURNS[0], {"role": "assistant", "tool_calls": [call]}, answer, TURNS[1]]
    read = row({"messages": turns}).messages
    assert read[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}
    ]
    assert read[2] == answer


def test_the_old_function_call_of_openai_files():
    call = {"name": "now", "arguments": '{"zone": "CET"}'}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "now", "content": "12:00"},
    ]
    read = row({"messages": turns}).messages
    assert read[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {"zone": "CET"}}
    assert read[2]["role"] == "tool"


def test_a_weight_of_zero_is_not_learned():
    read = row({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}).messages
    assert read[1] == {**TURNS[1], "train": False}


def test_parts_of_text_are_joined_and_thoughts_among_them_kept():
    parts = [
        {"type": "thinking", "thinking": "A greeting."},
        {"type": "text", "text": "Hel"},
        {"type": "text", "text": "lo"},
    ]
    read = row({"messages": [TURNS[0], {"role": "assistant", "content": parts}]}).messages
    assert read[1] == {"role": "assistant", "content": "Hello", "reasoning": "A greeting."}


def test_messages_as_json_text():
    assert row({"messages": json.dumps(TURNS)}).messages == tuple(TURNS)


def test_the_first_shape_of_several_is_taken():
    """Published sets often carry `text` or `prompt` beside the conversation."""
    assert row({"text": "x", "prompt": "p", "messages": TURNS}).shape == "chat"
    assert row({"text": "x", "prompt": "p", "completion": "c"}).shape == "completions"


def test_columns_name_the_fields():
    columns = ("prompt=question", "completion=best answer")
    read = row({"question": "Hi", "best answer": "Hello", "messages": 3}, columns=columns)
    assert (read.shape, read.messages) == ("completions", tuple(TURNS))


def test_a_column_that_is_not_there():
    with pytest.raises(DataError) as error:
        row({"q": "Hi", "a": "Hello"}, columns={"prompt": "question", "completion": "a"})
    assert error.value.found == "rows.jsonl:7: has no column question; it has a, q"


# ---------------------------------------------------------------- media


@pytest.fixture
def folder(tmp_path) -> Path:
    data = tmp_path / "data"
    (data / "in").mkdir(parents=True)
    (data / "in" / "a.png").write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "way").symlink_to(tmp_path)
    return data


def with_image(path) -> dict:
    parts = [{"type": "image", "image": path}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}, TURNS[1]]}


@pytest.mark.parametrize("path", ["in/a.png", "in/../in/a.png", "./in/a.png"])
def test_media_within_the_folder(folder, path):
    part = row(with_image(path), folder=folder).messages[0]["content"][0]
    assert part == {"type": "image", "image": str((folder / "in" / "a.png").resolve())}


@pytest.mark.parametrize(
    "path", ["../secret.png", "in/../../secret.png", "link.png", "way/secret.png", "/etc/passwd"]
)
def test_media_may_not_leave_the_folder(folder, path):
    with pytest.raises(DataError, match="outside of") as error:
        row(with_image(path), folder=folder)
    assert "media_anywhere" in error.value.do
    part = row(with_image(path), folder=folder, media_anywhere=True).messages[0]["content"][0]
    assert Path(part["image"]).is_file()


@pytest.mark.parametrize(
    "path",
    [
        *("https://example.org/a.png", "data:image/png;base64,AAAA", "none.png", "in"),
        *("in/\0.png", "x" * 5000, 3, None),
    ],
)
def test_media_that_is_no_file_there(folder, path):
    with pytest.raises(DataError, match=r"rows.jsonl:7: turn 1"):
        row(with_image(path), folder=folder)


@pytest.mark.parametrize("field", ["image", "images", "audio"])
def test_media_of_a_row_come_first_in_its_first_question(folder, field):
    value = ["in/a.png"] if field == "images" else "in/a.png"
    content = row({"messages": TURNS, field: value}, folder=folder).messages[0]["content"]
    kind = "audio" if field == "audio" else "image"
    assert [part["type"] for part in content] == [kind, "text"]
    assert content[1]["text"] == "Hi"
