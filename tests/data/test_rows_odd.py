"""Rows that cannot be used, told together; odd orders of turns; answers that are empty."""

from __future__ import annotations

import json

import pytest
from styles import EMPTY_THOUGHT_PROMPT, STYLES

import mlx_gemma4 as g4
from mlx_gemma4.data import dataset
from mlx_gemma4.data.__main__ import main
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tiny import CHAT_TEMPLATE
from mlx_gemma4.model.tokenizer import text_side

GOOD = {"prompt": "Hi", "completion": "Hello"}
NO_ANSWER = {"messages": [{"role": "user", "content": "Hi"}]}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture
def side(tiny):
    return text_side(tiny)


def refused(rows, side, **settings) -> DataError:
    with pytest.raises(DataError) as error:
        g4.read(rows, side, g4.DataConfig(**settings))
    return error.value


def learned(side, *turns: dict, **settings) -> tuple[str, str]:
    """What of a conversation is learned, and all of it."""
    example = g4.read([{"messages": list(turns)}], side, g4.DataConfig(**settings))[0]
    return tuple(map(side.tokenizer.decode, (example.tokens[example.mask], example.tokens)))


# ---------------------------------------------------------------- rows that cannot be used


def test_one_bad_row_is_told_by_itself(side):
    error = refused([GOOD, {"text": " "}, GOOD], side)
    assert error.found == "rows[1]: has text ' '"
    assert error.do == "mend or remove the line"


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_the_first_three_are_told_and_how_many_there_are(side, monkeypatch, chunk):
    monkeypatch.setattr(dataset, "_CHUNK_ROWS", chunk)
    bad = [{"text": " "}, NO_ANSWER, {"x": 1}, {"text": 4}, {"y": 1}]
    error = refused([GOOD, *bad, GOOD], side)
    first, *lines = error.found.splitlines()
    assert first == "5 of the 7 rows read cannot be used; the first:"
    assert [line.strip()[:8] for line in lines] == ["rows[1]:", "rows[2]:", "rows[3]:"]
    assert lines[1].endswith("has no target token")
    assert error.wanted == "of the first: text that is not empty"
    assert error.do == "mend or remove the line; or set on_bad_row to skip"


def test_a_picture_takes_one_line_of_the_list(side):
    side.tokenizer.chat_template = CHAT_TEMPLATE.replace("<turn|>", "<turn|>.")
    error = refused([GOOD, GOOD], side)
    assert len(error.found.splitlines()) == 3


def test_a_file_of_bad_rows_is_not_read_to_its_end(side, monkeypatch):
    monkeypatch.setattr(dataset, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(dataset, "_MANY_BAD", 6)
    error = refused([GOOD, *[{"text": " "}] * 99], side)
    assert error.found.startswith("7 of the 8 rows read cannot be used")


def test_bad_rows_of_a_large_file_leave_no_entry_in_the_cache(side, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "SMALL", 10)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [GOOD, NO_ANSWER, GOOD, {"x": 1}]))
    error = refused(path, side)
    assert error.found.startswith("2 of the 4 rows read cannot be used")
    assert f"{path}:2: has no target token" in error.found
    assert not [entry for entry in (tmp_path / "cache" / "tokens").iterdir() if entry.is_dir()]
    data = g4.read(path, side, g4.DataConfig(on_bad_row="skip"))
    assert (len(data), data.facts.bad) == (2, 2)


# ---------------------------------------------------------------- orders of turns


def test_model_is_a_name_of_the_assistant(side):
    assert learned(side, USER, {**ANSWER, "role": "model"})[0] == "Hello<turn|>"


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_may_come_first(side, style):
    side.tokenizer.chat_template = STYLES[style].template
    answers, text = learned(side, ANSWER, USER, {**ANSWER, "content": "Yes?"})
    assert answers == "Hello<turn|>Yes?<turn|>"
    assert text.startswith("<bos><|turn>model\n")
    system = {"role": "system", "content": "Be short."}
    assert learned(side, system, ANSWER)[0] == "Hello<turn|>"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "completion"])
def test_a_user_may_speak_twice(side, style, train_on):
    side.tokenizer.chat_template = STYLES[style].template
    more = {"role": "user", "content": "Are you there?"}
    answers, text = learned(side, USER, more, ANSWER, USER, USER, ANSWER, train_on=train_on)
    assert answers == "Hello<turn|>" * (2 if train_on == "assistant" else 1)
    assert "<|turn>user\nHi<turn|>\n<|turn>user\nAre you there?<turn|>\n" in text
    assert text.count("<|turn>user\nHi<turn|>\n") == 3


def test_a_template_that_leaves_out_one_of_two_equal_questions_is_refused(side):
    side.tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{%- if message['role'] == 'tool' -%}",
        "{%- if message['role'] == 'user' and follows == 'user' -%}\n"
        "{%- elif message['role'] == 'tool' -%}",
    )
    error = refused([{"messages": [USER, USER, ANSWER]}], side)
    assert error.found == "rows[0]: the chat template leaves out turn 2 (user)"


def test_a_template_that_wants_turns_to_alternate_is_explained(side):
    side.tokenizer.chat_template = (
        "{%- if messages[0]['role'] == messages[1]['role'] -%}"
        "{{- raise_exception('roles must alternate') -}}{%- endif -%}" + CHAT_TEMPLATE
    )
    error = refused([{"messages": [USER, USER, ANSWER]}], side)
    assert "roles must alternate" in error.found
    assert "turns of one speaker that follow each other" in error.do


def test_a_chat_that_begins_with_an_answer_is_no_matter_for_the_check_of_prompts(side):
    side.tokenizer.chat_template = EMPTY_THOUGHT_PROMPT
    data = g4.read([{"messages": [ANSWER, USER, ANSWER]}], side)
    assert data.facts.prompts == [""]


# ---------------------------------------------------------------- empty answers


def test_an_empty_answer_is_a_warning_with_its_line(side, tmp_path, capsys, tiny):
    empty = {"prompt": "Hush.", "completion": " "}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [GOOD, empty, GOOD, empty]))
    data = g4.read(path, side)
    line = f"  warning: 2 with an empty answer: {path}:2, {path}:4"
    assert line in repr(data).splitlines()
    main(["--model", str(tiny), "--data", str(path)])
    assert line in capsys.readouterr().out.splitlines()
    data = g4.read([empty] * 5, side)
    places = "rows[0], rows[1], rows[2], ..."
    assert f"  warning: 5 with an empty answer: {places}" in repr(data).splitlines()


def test_calls_thoughts_and_turns_that_are_not_learned(side):
    call = {"type": "function", "function": {"name": "stop", "arguments": {}}}
    told = [
        {"messages": [USER, {**ANSWER, "content": "", "tool_calls": [call]}]},
        {"messages": [USER, {**ANSWER, "content": "", "weight": 0}, USER, ANSWER]},
        GOOD,
        {"text": "Once."},
    ]
    assert "warning" not in repr(g4.read(told, side))
    thinks = {"messages": [USER, {**ANSWER, "content": "", "reasoning": "Hm."}]}
    assert "warning: 1 with an empty answer: rows[0]" in repr(g4.read([thinks], side))
