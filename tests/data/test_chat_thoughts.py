"""Reasoning that a template leaves out is put in, learned, and held against the row."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers import encode
from styles import AGENT, MARKS_GENERATION, SHOWS_NONE, STRIPS_EARLIER_THOUGHTS, row

import mlx_gemma4 as g4
from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tiny import CHAT_TEMPLATE
from mlx_gemma4.model.tokenizer import load_tokenizer

WRITTEN = '<|tool_call>call:add{a:1,b:<|"|>two<|"|>}<tool_call|><|tool_response>'
TAGGED = "answers that begin with <think>, which was read as reasoning"


@pytest.fixture
def tokenizer(tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = SHOWS_NONE
    return tokenizer


def thought(text: str) -> str:
    return f"<|channel>thought\n{text}\n<channel|>"


def learned(row: Row, tokenizer, train_on="assistant", thinking="keep", notes=None) -> str:
    example = encode(row, tokenizer, train_on, thinking, notes)
    return tokenizer.decode(example.tokens[example.mask])


def refused(row: Row, tokenizer, thinking="keep") -> DataError:
    with pytest.raises(DataError) as error:
        encode(row, tokenizer, "assistant", thinking)
    assert row.origin in error.value.found
    return error.value


KEPT = (
    f"{thought('I add.')}{WRITTEN}{thought('Done.')}It is 3.<turn|>"
    f"{thought('Easy.')}It is 4.<turn|>"
)


def test_the_template_of_these_tests_shows_no_thought(tokenizer):
    messages = [{**turn, "reasoning_content": turn.get("reasoning", "")} for turn in AGENT]
    assert "channel" not in tokenizer.apply_chat_template(messages, tokenize=False)


def test_every_thought_is_put_in_and_learned(tokenizer):
    notes = Counter()
    assert learned(row(*AGENT), tokenizer, notes=notes) == KEPT
    assert notes == {}
    example = encode(row(*AGENT), tokenizer, "assistant")
    text = tokenizer.decode(example.tokens)
    assert text.startswith("<bos><|turn>system\n<|think|>\n")
    plain = [{k: v for k, v in turn.items() if k != "reasoning"} for turn in AGENT]
    own = tokenizer.apply_chat_template(plain, tokenize=False, enable_thinking=True)
    for one in ("I add.", "Done.", "Easy."):
        text = text.replace(thought(one), "")
    assert text == own


def test_mask_shows_what_keep_learns_and_drop_removes_it(tokenizer):
    kept, masked = (encode(row(*AGENT), tokenizer, "assistant", how) for how in ("keep", "mask"))
    assert kept.tokens.tolist() == masked.tokens.tolist()
    without = KEPT
    for one in ("I add.", "Done.", "Easy."):
        without = without.replace(thought(one), "")
    assert tokenizer.decode(masked.tokens[masked.mask]) == without
    dropped = encode(row(*AGENT), tokenizer, "assistant", "drop")
    text = tokenizer.decode(dropped.tokens)
    assert "channel" not in text and "<|think|>" not in text
    assert tokenizer.decode(dropped.tokens[dropped.mask]) == without


def test_a_template_that_shows_some_keeps_its_own_markup(tokenizer):
    tokenizer.chat_template = STRIPS_EARLIER_THOUGHTS
    text = learned(row(*AGENT), tokenizer)
    assert text.startswith(thought("I add.") + "<|tool_call>")
    assert thought("Done.") + "It is 3.<turn|>" in text
    assert text.endswith("<turn|><|channel>thought\nEasy.<channel|>It is 4.<turn|>")


@pytest.mark.parametrize("same", ["It is 4.", "4", "<|think|>", "It is 3.", "  spaces\n around "])
def test_thoughts_that_are_also_said_elsewhere_stand_in_their_places(tokenizer, same):
    turns = [{**turn, "reasoning": same} if "reasoning" in turn else turn for turn in AGENT]
    text = learned(row(*turns), tokenizer)
    wanted = KEPT
    for one in ("I add.", "Done.", "Easy."):
        wanted = wanted.replace(thought(one), thought(same.strip()))
    assert text == wanted


@pytest.mark.parametrize("answer", ["  It is 4.", "\n\nIt is 4.\n", "It is 4.", "", "\U000f0000 a"])
@pytest.mark.parametrize("template", [SHOWS_NONE, STRIPS_EARLIER_THOUGHTS])
def test_white_space_and_private_characters_of_an_answer_stay(tokenizer, answer, template):
    tokenizer.chat_template = template
    more = ({"role": "user", "content": "\U000f0001?"}, {"role": "assistant", "content": "Yes."})
    said = {**AGENT[5], "content": answer}
    text = learned(row(AGENT[4], said, *more), tokenizer)
    if template == SHOWS_NONE:
        answer = answer.strip()
    assert text == f"{thought('Easy.')}{answer}<turn|>Yes.<turn|>"


def test_a_thought_within_the_text_is_kept_where_it_begins_the_answer(tokenizer):
    said = {"role": "assistant", "content": "<|channel>thought\nEasy.\n<channel|>It is 4."}
    assert learned(row(AGENT[4], said), tokenizer) == thought("Easy.") + "It is 4.<turn|>"
    assert learned(row(AGENT[4], said), tokenizer, thinking="drop") == "It is 4.<turn|>"


def test_a_thought_that_cannot_be_kept_names_the_remedy(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{- message['content'] | trim -}}\n",
        "{%- set parts = message['content'].split('<|channel>thought\\nb<channel|>') -%}\n"
        "{{- parts | join('') | trim -}}\n",
    )
    said = {"role": "assistant", "content": "It is<|channel>thought\nb<channel|> 4."}
    for thinking in ("keep", "mask"):
        error = refused(row(AGENT[4], said), tokenizer, thinking)
    assert "the chat template leaves out 1 texts of reasoning within an answer" in error.found
    assert error.do.startswith("set thinking to drop")
    assert learned(row(AGENT[4], said), tokenizer, thinking="drop") == "It is 4.<turn|>"


def test_a_template_that_changes_with_the_marks_is_refused_with_the_remedy(tokenizer):
    tokenizer.chat_template = SHOWS_NONE.replace(
        "{%- if message['role'] == 'tool' -%}",
        "{{- '!' * (message['content'] | length) if message['role'] == 'user' and "
        "messages[-1]['content'] | length > 8 -}}\n{%- if message['role'] == 'tool' -%}",
    )
    error = refused(row(*AGENT[4:]), tokenizer)
    assert "the chat template leaves out reasoning, and changes" in error.found
    assert error.do.startswith("set thinking to drop")


def test_markers_in_the_rows_text_stay_quoted_behind_what_is_put_in(tokenizer):
    turns = [AGENT[0], AGENT[1], {**AGENT[2], "content": "<|turn>model\n3"}, *AGENT[3:]]
    turns[4] = {**AGENT[4], "content": "<turn|>?"}
    assert learned(row(*turns), tokenizer) == KEPT


def test_generation_marks_are_held_against_what_the_template_wrote(tokenizer):
    start = MARKS_GENERATION.index("{%- if m.reasoning_content")
    end = MARKS_GENERATION.index("{%- endif -%}\n", start) + len("{%- endif -%}\n")
    tokenizer.chat_template = MARKS_GENERATION[:start] + MARKS_GENERATION[end:]
    assert learned(row(*AGENT[4:]), tokenizer) == thought("Easy.") + "It is 4.<turn|>"


# ---------------------------------------------------------------- <think>


@pytest.mark.parametrize("template", [SHOWS_NONE, CHAT_TEMPLATE])
@pytest.mark.parametrize("said", ["<think>\nEasy.\n</think>\n\nIt", " <think>Easy.</think>It"])
def test_think_tags_at_the_start_are_reasoning_and_the_report_says_so(tokenizer, template, said):
    tokenizer.chat_template = template
    notes = Counter()
    tagged = row(AGENT[4], {"role": "assistant", "content": said + " is 4."})
    assert learned(tagged, tokenizer, notes=notes) == thought("Easy.") + "It is 4.<turn|>"
    assert notes == {TAGGED: 1}
    assert learned(tagged, tokenizer, thinking="drop") == "It is 4.<turn|>"
    assert "<|think|>" in tokenizer.decode(encode(tagged, tokenizer, "assistant").tokens)


def test_think_tags_elsewhere_are_text_and_empty_ones_are_nothing(tokenizer):
    for said in ("It <think>Easy.</think> is", "<think>Easy."):
        text = learned(row(AGENT[4], {"role": "assistant", "content": said}), tokenizer)
        assert text == said + "<turn|>"
    empty = row(AGENT[4], {"role": "assistant", "content": "<think>\n\n</think>\n\nIt is 4."})
    assert learned(empty, tokenizer) == "It is 4.<turn|>"
    assert "<|think|>" not in tokenizer.decode(encode(empty, tokenizer, "all").tokens)


def test_two_different_texts_of_reasoning_are_refused(tokenizer):
    said = {"role": "assistant", "content": "<think>Easy.</think>It is 4.", "reasoning": "Easy."}
    assert learned(row(AGENT[4], said), tokenizer) == thought("Easy.") + "It is 4.<turn|>"
    error = refused(row(AGENT[4], {**said, "reasoning": "Hard."}), tokenizer)
    assert "begins with another: 'Easy.'" in error.found


def test_what_a_reader_prints_of_tags(gemma):
    turns = [AGENT[4], {"role": "assistant", "content": "<think>Easy.</think>It is 4."}]
    assert f"  1 {TAGGED}" in repr(g4.read([{"messages": turns}], gemma)).splitlines()
