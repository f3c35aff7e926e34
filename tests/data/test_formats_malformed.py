"""Malformed input: one message that names file, line and remedy, exit code 2, and no traceback."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mlx_gemma4.data import __main__ as command
from mlx_gemma4.errors import run_command
from mlx_gemma4.model.tokenizer import text_side

GOOD = b'{"prompt": "Hi", "completion": "Hello"}\n'
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def chat(*turns, **more) -> bytes:
    return json.dumps({"messages": turns, **more}).encode()


def calling(call) -> bytes:
    return chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]})


def parquet(table: dict) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    return file.getvalue()


def named(arguments) -> dict:
    return {"function": {"name": "f", "arguments": arguments}}


# Name -> (the third line of a JSONL file, what the message must say).
LINES = {
    "an open brace": (b'{"text": "a"', "is not JSON"),
    "no JSON": (b"text: a", "is not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "is not JSON"),
    "a trailing comma": (b'{"text": "a",}', "is not JSON"),
    "single quotes": (b"{'text': 'a'}", "is not JSON"),
    "a comment": (b'{"text": "a"} // done', "is not JSON"),
    "a raw control character": (b'{"text": "a\x01b"}', "is not JSON"),
    "a raw NUL byte": (b'{"text": "a\x00b"}', "is not JSON"),
    "only NUL bytes": (b"\0" * 64, "is not JSON"),
    "a bad escape": (b'{"text": "\\x41"}', "is not JSON"),
    "NaN": (b'{"text": NaN}', "NaN is no JSON number"),
    "an integer of 5000 digits": (b'{"text": ' + b"9" * 5000 + b"}", ""),
    "brackets 200,000 deep": (b"[" * 200_000, "is not JSON"),
    "objects 100,000 deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not JSON"),
    "a BOM within the file": (b'\xef\xbb\xbf{"text": "a"}', "is not JSON"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "is not JSON"),
    "Latin-1": ('{"text": "né"}'.encode("latin-1"), "is not UTF-8"),
    "a cut character": (b'{"text": "n\xc3"}', "is not UTF-8"),
    "a row of 10 MB": (b'{"text": "' + b"a" * 10_000_000 + b'"}', "longer than 8 MB"),
    "a list": (b"[1, 2]", "is of type list"),
    "a number": (b"3", "is of type int"),
    "null": (b"null", "is of type NoneType"),
    "no field": (b"{}", "has the keys (none)"),
    "a wrong column": (b'{"question": "a", "answer": "b"}', "has the keys answer, question"),
    "a prompt alone": (b'{"prompt": "a"}', "has the keys prompt"),
    "a thousand keys": (json.dumps({f"k{i}": 1 for i in range(1000)}).encode(), "has the keys k0"),
    "empty text": (b'{"text": " "}', "has text ' '"),
    "text that is a number": (b'{"text": 5}', "has text '5'"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    "the other half, in a turn": (chat(USER, {**ANSWER, "content": "\udc4d"}), "surrogate pair"),
    "a half in the name of an argument": (calling(named({"\udc4d": 1})), "surrogate pair"),
    "an escaped NUL": (b'{"text": "a\\u0000b"}', "NUL character"),
    "a NUL in a tool's name": (calling({"function": {"name": "f\0"}}), "NUL character"),
    "a tool call 60 deep": (
        calling(named(json.loads('{"a":' * 60 + "1" + "}" * 60))),
        "nested too deep",
    ),
    "no turns": (chat(), "messages is empty or no list"),
    "turns that are an object": (b'{"messages": {"role": "user"}}', "messages is empty or no list"),
    "turns that are null": (b'{"messages": null}', "messages is empty or no list"),
    "turns that are no JSON": (b'{"messages": "Hi"}', "messages is text that is not JSON"),
    "a turn that is text": (chat("Hi"), "turn 1: has role 'Hi'"),
    "a turn that is null": (chat(None), "turn 1: has role None"),
    "a wrong role": (chat(USER, {**ANSWER, "role": "bot"}), "turn 2: has role 'bot'"),
    "a role that is of type list": (chat({**USER, "role": ["user"]}), "turn 1: has role ['user']"),
    "no role": (chat({"content": "Hi"}), "turn 1: has role None"),
    "a ShareGPT speaker unknown": (
        b'{"conversations": [{"from": "alice", "value": "Hi"}]}',
        "turn 1: has role 'alice'",
    ),
    "ShareGPT without value": (
        b'{"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}',
        "turn 1 (user): has no text content",
    ),
    "content that is a number": (chat({**USER, "content": 3}), "turn 1 (user): has no text"),
    "no content": (chat(USER, {"role": "assistant"}), "turn 2 (assistant): has no text"),
    "parts that are texts": (chat({**USER, "content": ["Hi"]}), "turn 1 (user): has no text"),
    "no parts": (chat({**USER, "content": []}), "turn 1 (user): has no text"),
    "an unknown part": (chat({**USER, "content": [{"type": "pdf"}]}), "part of type 'pdf'"),
    "a part without text": (
        chat({**USER, "content": [{"type": "text"}]}),
        "turn 1 (user): has text None",
    ),
    "two answers in turn": (chat(USER, ANSWER, ANSWER), "turn 3 (assistant): follows assistant"),
    "a tool's answer first": (chat({**USER, "role": "tool"}), "turn 1 (tool): is the first"),
    "a system turn late": (
        chat(USER, ANSWER, {"role": "system", "content": "a"}),
        "turn 3 (system): follows assistant",
    ),
    "two system turns": (
        chat(*[{"role": "system", "content": "a"}] * 2, USER, ANSWER),
        "turn 2 (system): follows system",
    ),
    "a tool's answer to nothing": (
        chat(USER, ANSWER, {"role": "tool", "content": "5"}),
        "turn 3 (tool): answers turn 2, which calls no tool",
    ),
    "no answer": (chat(USER), "has no target token"),
    "a call without name": (calling({"function": {"arguments": {}}}), "without the name"),
    "a call that is text": (calling("f()"), "without the name"),
    "arguments that are a list": (calling(named([1])), "the arguments of f are a list"),
    "arguments that are no JSON": (calling(named("{a: 1}")), "the arguments of f is text"),
    "calls of the user": (chat({**USER, "tool_calls": [named({})]}), "(user): has tool calls"),
    "thoughts of the user": (chat({**USER, "reasoning": "a"}), "(user): has reasoning"),
    "thoughts that are a list": (chat(USER, {**ANSWER, "thinking": ["a"]}), ""),
    "two thoughts": (
        chat(USER, {**ANSWER, "thinking": "a", "reasoning": "b"}),
        "has 2 fields of reasoning",
    ),
    "a weight of 0.5": (chat(USER, {**ANSWER, "weight": 0.5}), "has weight 0.5"),
    "tools without names": (chat(USER, ANSWER, tools=[{"type": "function"}]), "tools has an entry"),
    "tools that are a number": (chat(USER, ANSWER, tools=5), "tools has an entry"),
    "an instruction that is null": (
        b'{"instruction": null, "output": "a"}',
        "has instruction None",
    ),
    "a completion that is null": (b'{"prompt": "a", "completion": null}', "no text content"),
    "a prompt that is of type list": (b'{"prompt": [], "completion": "a"}', "no text content"),
}

CSV = b'prompt,completion\n"Hi","Hello"\n'
# File name -> (content, what the message must say, or the line it must name).
FILES = {
    "empty.jsonl": (b"", "holds no example"),
    "blank.jsonl": (b"\n \n\t\r\n", "holds no example"),
    "only-bom.jsonl": (b"\xef\xbb\xbf", "holds no example"),
    "empty-array.json": (b"[]", "holds no example"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "is text in UTF-16"),
    "binary.jsonl": (bytes(range(256)) * 20, "is a binary file"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a binary file"),
    "notes.txt": (b"Some notes.\n", "is a file of a kind that is not known"),
    "open-array.json": (b'[{"text": "a"},\n{"text": "b"}\n', ":3: is not JSON"),
    "no-comma.json": (b'[{"text": "a"}\n{"text": "b"}]', ":2: is not JSON"),
    "comma-at-end.json": (b'[{"text": "a"},\n]', ":2: is not JSON"),
    "broken-item.json": (b'[{"text": "a"},\n\n{"text": b}]', ":3: is not JSON"),
    "after-array.json": (b'[{"text": "a"}]\n\nend', ":3: is not JSON"),
    "number-item.json": (b'[{"text": "a"},\n7]', ":2: is of type int"),
    "long-item.json": (
        b'[{"text": "a"},\n{"text": "' + b"a" * 9_000_000 + b'"}]',
        ":2: is longer than 8 MB",
    ),
    "latin.json": ('[{"text": "né"}]'.encode("latin-1"), "the byte 0xe9 is not UTF-8"),
    "one-object.json": (b'{"data": [1, 2]}', ":1: has the keys data"),
    "empty.csv": (b"", "holds no example"),
    "header-only.csv": (b"prompt,completion\n", "holds no example"),
    "short-line.csv": (CSV + b'"Hi"\n', ":3: has 1 cells"),
    "long-line.csv": (CSV + b"a,b,c\n", ":3: has 3 cells"),
    "open-quote.csv": (CSV + b'"Hi","Hello\n', ":3: is not CSV"),
    "no-name.csv": (b"prompt,\nHi,Hello\n", ":1: has the columns"),
    "same-name.csv": (b"prompt,prompt\nHi,Hello\n", ":1: has the columns"),
    "wrong-column.csv": (b"question,answer\nHi,Hello\n", ":2: has the keys answer, question"),
    "latin.csv": (CSV + "né,b\n".encode("latin-1"), ":3: the byte 0xe9 is not UTF-8"),
    "empty-cell.csv": (b"text,id\n,1\n", ":2: has text ''"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 9)[:-9], "cannot read"),
    "broken.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"broken" * 9, "cannot read"),
    "cut.parquet": (parquet({"text": ["a"]})[:-9], "cannot read"),
    "wrong.parquet": (parquet({"words": ["a"]}), ":row 1: has the keys words"),
    "null.parquet": (parquet({"text": ["a", None]}), ":row 2: has the keys (none)"),
}


@pytest.fixture(scope="session")
def side(checkpoints):
    return text_side(checkpoints["e2b"])


@pytest.fixture
def refused(side, monkeypatch, capsys):
    """The message of a run of the command, which must end with exit code 2."""
    monkeypatch.setattr(command, "text_side", lambda model: side)

    def run(data: Path, *flags: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run_command(lambda: command.main(["--model", "m", "--data", str(data), *flags]))
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert "\n  wanted: " in told and "\n  do:     " in told
        assert "Traceback" not in told
        assert len(told) < 2000
        told.encode()  # what cannot be printed must not be in it
        return told

    return run


def test_there_are_many():
    assert len(LINES) + len(FILES) >= 100


@pytest.mark.parametrize("name", LINES)
def test_a_line(tmp_path, refused, name):
    line, words = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\r\n" + line + b"\r\n" + GOOD)
    told = refused(path, "--max-seq-length", "4096")
    assert f"{path}:3" in told
    assert words in told


@pytest.mark.parametrize("name", FILES)
def test_a_file(tmp_path, refused, name):
    content, words = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    told = refused(path)
    assert str(path) in told
    assert words in told


@pytest.mark.parametrize("name", [name for name in LINES if name != "no answer"])
def test_a_bad_line_is_skipped_counted_and_named_where_that_is_asked(tmp_path, side, name):
    from mlx_gemma4.config import DataConfig
    from mlx_gemma4.data.dataset import read

    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + LINES[name][0] + b"\n" + GOOD)
    data = read(path, side, DataConfig(on_bad_row="skip"))
    assert [example.origin[-2:] for example in data] == [":1", ":3"]
    assert data.facts.bad == 1
    assert f"{path}:2" in data.facts.bad_rows[0]


def test_a_folder_without_train_file(tmp_path, refused):
    (tmp_path / "training.jsonl").write_bytes(GOOD)
    assert "has no train.jsonl; it holds training.jsonl" in refused(tmp_path)


def test_a_path_that_is_not_there(tmp_path, refused):
    assert "does not exist" in refused(tmp_path / "none.jsonl")


def test_a_link_to_nothing(tmp_path, refused):
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert f"cannot read {tmp_path / 'train.jsonl'}" in refused(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refused(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path, refused):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert f"cannot read {path}" in refused(path)


def test_a_split_in_two_forms(tmp_path, refused):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(GOOD))
    assert "train split in several forms" in refused(tmp_path)


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_a_weight_that_is_none(tmp_path, refused, weight):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert "a number above 0" in refused(f"{tmp_path / 'a.jsonl'}={weight}")


def test_a_fraction_beside_a_valid_file(tmp_path, refused):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_bytes(GOOD)
    assert "has valid rows of its own" in refused(tmp_path, "--valid-fraction", "0.5")


def test_one_row_cannot_be_split(tmp_path, refused):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3)
    assert "1 different rows" in refused(tmp_path / "a.jsonl", "--valid-fraction", "0.5")


def test_columns_that_are_no_pairs(tmp_path, refused):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert "columns is ['prompt']" in refused(tmp_path / "a.jsonl", "--columns", "prompt")


def test_the_command_itself_ends_with_2_and_no_traceback(tmp_path, tiny):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"broken\n")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_gemma4.data", "--model", str(tiny), "--data", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {path}:2: is not JSON")
    assert "Traceback" not in done.stderr
