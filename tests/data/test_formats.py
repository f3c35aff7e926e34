"""JSONL files to conversations: three shapes of rows, and errors that name file and line."""

from __future__ import annotations

import json

import pytest
from helpers import write_rows

from mlx_gemma4.data.chat.formats import read_rows
from mlx_gemma4.data.read.files import find_files
from mlx_gemma4.errors import DataError

WANTED = "messages; conversations; prompt and completion; instruction and output; or text"
GOOD = {"text": "Open the file."}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows_of(tmp_path, *lines) -> list:
    return list(read_rows(write_rows(tmp_path / "data", train=lines) / "train.jsonl"))


def paths_of(source) -> dict:
    return {split: [file.path for file in files] for split, files in find_files(source).items()}


def refused(tmp_path, line) -> DataError:
    """The error that a file with one good row, a blank line, and this line ends in."""
    with pytest.raises(DataError) as error:
        rows_of(tmp_path, GOOD, "", line)
    assert f"{tmp_path / 'data' / 'train.jsonl'}:3" in error.value.found
    return error.value


def test_a_chat_row(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": [{"role": "system", "content": "Be short."}, *TURNS]})
    assert (row.shape, row.text) == ("chat", "")
    assert [turn["role"] for turn in row.messages] == ["system", "user", "assistant"]
    assert row.messages[2]["content"] == "Hello"


def test_a_completions_row_is_a_question_and_its_answer(tmp_path):
    (row,) = rows_of(tmp_path, {"prompt": "Hi", "completion": "Hello"})
    assert row.shape == "completions"
    assert list(row.messages) == TURNS


def test_a_text_row(tmp_path):
    (row,) = rows_of(tmp_path, {"text": " Open the file.\n"})
    assert (row.shape, row.messages, row.text) == ("text", (), " Open the file.\n")


def test_further_keys_of_a_row_and_a_turn_are_left_out(tmp_path):
    turns = [{**turn, "name": "x"} for turn in TURNS]
    (row,) = rows_of(tmp_path, {"id": 4, "messages": turns})
    assert list(row.messages) == TURNS


def test_shapes_may_be_mixed_in_a_file(tmp_path):
    rows = rows_of(tmp_path, GOOD, {"messages": TURNS}, {"prompt": "a", "completion": "b"})
    assert [row.shape for row in rows] == ["text", "chat", "completions"]


def test_blank_lines_are_passed_over_and_still_counted(tmp_path):
    rows = rows_of(tmp_path, "", GOOD, "   ", "\t", GOOD)
    assert [row.origin.rsplit(":", 1)[1] for row in rows] == ["2", "5"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row.text for row in read_rows(path)] == ["a", "b"]


def test_a_last_line_without_an_end_is_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}')
    assert [row.text for row in read_rows(path)] == ["a", "b"]


def test_text_beyond_ascii(tmp_path):
    assert rows_of(tmp_path, json.dumps({"text": "é 🙂"}, ensure_ascii=False))[0].text == "é 🙂"


@pytest.mark.parametrize(
    "line", ['{"text": "a"', "text: a", '{"text": "a"} {"text": "b"}', "[" * 9]
)
def test_a_line_that_is_not_json(tmp_path, line):
    error = refused(tmp_path, line)
    assert "is not JSON" in error.found
    assert error.wanted == "one JSON object a line"
    assert error.do == "mend or remove the line"


def test_a_line_nested_too_deep_is_refused_like_any_other(tmp_path):
    assert "train.jsonl:3" in refused(tmp_path, "[" * 200_000).found


@pytest.mark.parametrize(
    ("line", "kind"), [("[1]", "list"), ('"a"', "str"), ("3", "int"), ("null", "NoneType")]
)
def test_json_that_is_no_object(tmp_path, line, kind):
    error = refused(tmp_path, line)
    assert f"is of type {kind}" in error.found
    assert error.wanted == "an object with the fields of a row"


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"question": "a", "answer": "b"}, "answer, question"),
        ({"prompt": "a"}, "prompt"),
        ({"completion": "a"}, "completion"),
        ({}, "(none)"),
    ],
)
def test_a_row_without_a_usable_field_names_the_fields_it_has(tmp_path, row, keys):
    error = refused(tmp_path, row)
    assert f"has the keys {keys}" in error.found
    assert error.wanted == WANTED
    assert error.do.startswith("rename the fields of the file")


@pytest.mark.parametrize("text", ["", "  \n", None, 3, ["a"]])
def test_text_that_is_empty_or_no_text(tmp_path, text):
    error = refused(tmp_path, {"text": text})
    assert "has text" in error.found
    assert error.wanted == "text that is not empty"


@pytest.mark.parametrize("messages", [[], None, 3, {"role": "user"}])
def test_messages_that_are_no_turns(tmp_path, messages):
    error = refused(tmp_path, {"messages": messages})
    assert "messages is empty or no list" in error.found
    assert error.wanted == "a list of turns"


@pytest.mark.parametrize("role", ["bot", "Model", None, 3, ["user"]])
def test_a_wrong_role_is_shown_with_the_known_ones(tmp_path, role):
    error = refused(tmp_path, {"messages": [TURNS[0], {"role": role, "content": "a"}]})
    assert f"turn 2: has role {role!r}" in error.found
    assert error.wanted == "a role of system, user, assistant, tool"


@pytest.mark.parametrize("turn", ["Hi", None, ["user", "Hi"]])
def test_a_turn_that_is_no_object(tmp_path, turn):
    assert f"turn 1: has role {turn!r}" in refused(tmp_path, {"messages": [turn]}).found


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": 3},
        {"role": "assistant", "content": ["a"]},
    ],
)
def test_a_turn_without_text_content(tmp_path, turn):
    error = refused(tmp_path, {"messages": [TURNS[0], turn]})
    assert "turn 2 (assistant): has no text content" in error.found
    assert error.wanted == "content as text, or a list of parts with text"


@pytest.mark.parametrize(
    "row", [{"prompt": 1, "completion": "a"}, {"prompt": "a", "completion": []}]
)
def test_a_completions_row_with_other_than_text(tmp_path, row):
    assert "has no text content" in refused(tmp_path, row).found


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert str(path) in error.value.found
    assert "UTF-8" in error.value.wanted


def test_a_folder_gives_its_splits(tmp_path):
    folder = write_rows(tmp_path / "data", train=[GOOD], valid=[GOOD])
    (folder / "notes.txt").write_text("not read")
    assert paths_of(folder) == {
        "train": [folder / "train.jsonl"],
        "valid": [folder / "valid.jsonl"],
    }
    assert find_files(str(folder)) == find_files(folder)


def test_a_file_is_the_training_split(tmp_path):
    path = write_rows(tmp_path, valid=[GOOD]) / "valid.jsonl"
    assert paths_of(path) == {"train": [path]}


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError) as error:
        find_files(tmp_path / "none")
    assert f"{tmp_path / 'none'} does not exist" in error.value.found
    assert error.value.do == "check the path given as data"


def test_a_folder_without_train_jsonl_says_what_it_holds(tmp_path):
    folder = write_rows(tmp_path / "data", training=[GOOD], valid=[GOOD])
    with pytest.raises(DataError) as error:
        find_files(folder)
    assert "has no train.jsonl; it holds training.jsonl, valid.jsonl" in error.value.found
    assert "rename the file" in error.value.do


def test_an_empty_folder_holds_nothing(tmp_path):
    with pytest.raises(DataError, match="it holds nothing"):
        find_files(tmp_path)
