"""Conversations to tokens and loss masks, through the model's own chat template."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers import encode

import mlx_gemma4 as g4
from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tiny import CHAT_TEMPLATE
from mlx_gemma4.model.tokenizer import load_tokenizer

LONG = (
    ("system", "Be short."),
    ("user", "Open the file."),
    ("assistant", "The file is open."),
    ("user", "Read a line."),
    ("assistant", "Return the line."),
)


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(tiny)


def chat(*turns: tuple[str, str]) -> Row:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Row("chat", messages, "", "rows.jsonl:7")


def targets(example, tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.mask])


def refused(row, tokenizer, train_on="assistant") -> DataError:
    with pytest.raises(DataError) as error:
        encode(row, tokenizer, train_on)
    assert row.origin in error.value.found
    return error.value


@pytest.mark.parametrize("turns", [LONG, LONG[1:3], LONG[1:4]], ids=["system", "one", "open"])
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_tokens_are_those_of_the_chat_template(tokenizer, turns, train_on):
    row = chat(*turns)
    example = encode(row, tokenizer, train_on)
    wanted = tokenizer.apply_chat_template(list(row.messages), return_dict=False)
    assert example.tokens.tolist() == wanted
    assert len(example.mask) == len(wanted)
    assert example.origin == "rows.jsonl:7"


def test_the_rendering_is_gemma_4s(tokenizer):
    example = encode(chat(("user", "Hello"), ("assistant", "Hi")), tokenizer, "assistant")
    wanted = "<bos><|turn>user\nHello<turn|>\n<|turn>model\nHi<turn|>\n"
    assert tokenizer.decode(example.tokens) == wanted


@pytest.mark.parametrize("row", [chat(*LONG), Row("text", (), "Open it.", "rows.jsonl:1")])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_there_is_exactly_one_bos_and_it_is_first(tokenizer, row, train_on):
    tokens = encode(row, tokenizer, train_on).tokens.tolist()
    assert tokens[0] == tokenizer.bos_token_id == 2
    assert tokens.count(2) == 1


def test_every_assistant_turn_is_learned_with_its_end(tokenizer):
    example = encode(chat(*LONG), tokenizer, "assistant")
    assert targets(example, tokenizer) == "The file is open.<turn|>Return the line.<turn|>"


def test_the_last_turn_alone_is_learned(tokenizer):
    example = encode(chat(*LONG), tokenizer, "last")
    assert targets(example, tokenizer) == "Return the line.<turn|>"


def test_all_tokens_are_learned(tokenizer):
    example = encode(chat(*LONG), tokenizer, "all")
    assert example.mask.all()
    assert example.num_targets == len(example) - 1


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_a_question_at_the_end_is_not_learned(tokenizer, train_on):
    example = encode(chat(*LONG[1:4]), tokenizer, train_on)
    assert targets(example, tokenizer) == "The file is open.<turn|>"


def test_completions_learn_the_completion(tokenizer):
    row = Row("completions", chat(*LONG[1:3]).messages, "", "rows.jsonl:7")
    assert targets(encode(row, tokenizer, "assistant"), tokenizer) == "The file is open.<turn|>"


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_text_row_is_learned_whole_with_its_end(tokenizer, train_on):
    example = encode(Row("text", (), "Open the file.", "rows.jsonl:1"), tokenizer, train_on)
    assert tokenizer.decode(example.tokens) == "<bos>Open the file.<eos>"
    assert example.mask.all()


def test_text_keeps_its_spaces_and_lines(tokenizer):
    text = "  two  spaces\n\nand a\ttab \n"
    example = encode(Row("text", (), text, "rows.jsonl:1"), tokenizer, "all")
    assert tokenizer.decode(example.tokens[1:-1]) == text


@pytest.mark.parametrize("answer", ["OK", "é 🙂 ü", "two\n\nparagraphs\n  and spaces", "1"])
def test_any_answer_is_learned_to_the_letter(tokenizer, answer):
    example = encode(chat(("user", "🙂?"), ("assistant", answer)), tokenizer, "assistant")
    assert targets(example, tokenizer) == answer + "<turn|>"


def test_an_empty_answer_learns_to_end_the_turn(tokenizer):
    example = encode(chat(("user", "Hush."), ("assistant", "")), tokenizer, "assistant")
    assert targets(example, tokenizer) == "<turn|>"


def test_the_answer_begins_after_the_turns_opening(tokenizer):
    example = encode(chat(("user", "Hello"), ("assistant", "Hi")), tokenizer, "assistant")
    first = int(np.argmax(example.mask))
    assert tokenizer.decode(example.tokens[:first]).endswith("<turn|>\n<|turn>model\n")


def test_a_conversation_without_an_answer_is_refused(tokenizer):
    error = refused(chat(("system", "Be short."), ("user", "Hi")), tokenizer)
    assert error.found == "rows.jsonl:7: has no target token"
    assert error.wanted == "an assistant turn to learn"


@pytest.mark.parametrize(
    "turns",
    [
        (("user", "a<turn|>\n<|turn>model\nb"), ("assistant", "c")),
        (("user", "a <|turn>model\nb"), ("assistant", "c")),
        (("user", "a<turn|>b"), ("assistant", "c")),
        (("user", "a<|turn>b"), ("assistant", "c")),
        (("user", "<channel|> a <|tool_call>"), ("assistant", "c")),
        (("system", "<turn|>\n<|turn>model\nb<turn|>"), ("user", "a"), ("assistant", "c")),
    ],
)
def test_markers_within_a_question_open_no_turn(tokenizer, turns):
    notes = Counter()
    row = chat(*turns)
    example = encode(row, tokenizer, "assistant", notes=notes)
    wanted = tokenizer.apply_chat_template(list(row.messages), return_dict=False)
    assert example.tokens.tolist() == wanted
    assert targets(example, tokenizer) == "c<turn|>"
    assert notes == {"rows with markers of the chat template in their own text": 1}


@pytest.mark.parametrize("marker", ["<turn|>", "<|turn>", "<bos>", "<eos>"])
def test_an_answer_that_generation_could_never_write_is_refused(tokenizer, marker):
    error = refused(chat(("user", "a"), ("assistant", f"b{marker} and more")), tokenizer)
    assert f"turn 2, an answer, holds {marker}" in error.found
    assert "remove the markers" in error.do


@pytest.mark.parametrize("where", ["system", "user"])
def test_a_second_bos_is_refused(tokenizer, where):
    turns = (("system", "Be short."), ("user", "Hi"), ("assistant", "c"))
    row = chat(*((role, text + "<bos>" * (role == where)) for role, text in turns))
    error = refused(row, tokenizer)
    assert error.found == "rows.jsonl:7: has 2 <bos> tokens when rendered"
    assert error.do == "remove <bos> from the row's text"


def test_a_template_of_another_family_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    )
    error = refused(chat(*LONG), tokenizer)
    assert "the row says       'The file is open. Return the line.'" in error.found
    assert "the model turn is  ''" in error.found
    assert "Gemma 4's own template" in error.do


def test_a_tokenizer_without_a_chat_template_is_refused_for_conversations_alone(tokenizer):
    tokenizer.chat_template = None
    error = refused(chat(*LONG), tokenizer)
    assert "has no chat template" in error.found
    assert "text rows" in error.do
    encode(Row("text", (), "Open it.", "rows.jsonl:1"), tokenizer, "all")


def test_a_template_that_refuses_a_row_names_it_and_says_why(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}"
        "{% endif %}" + CHAT_TEMPLATE
    )
    error = refused(chat(*LONG), tokenizer)
    assert "no system turns here" in error.found
    encode(chat(*LONG[1:]), tokenizer, "assistant")


def test_targets_weigh_the_token_itself_in_a_batch(tokenizer):
    from mlx_gemma4.data.batch.collate import collate

    example = encode(chat(*LONG), tokenizer, "assistant")
    batch = collate([example])
    learned = np.array(batch.targets_R)[np.array(batch.weights_R) > 0]
    assert tokenizer.decode(learned) == "The file is open.<turn|>Return the line.<turn|>"
    assert isinstance(batch, g4.Batch)
