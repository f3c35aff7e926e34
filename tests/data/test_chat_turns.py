"""Thoughts, tools and weights: what of a model turn is learned, and what is counted."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from helpers import encode, encode_together
from styles import AGENT, EMPTY_THOUGHT_PROMPT, MARKS_GENERATION, STRIPS_EARLIER_THOUGHTS, row

from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tiny import CHAT_TEMPLATE
from mlx_gemma4.model.tokenizer import load_tokenizer

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds two numbers."}}
REMOVED = "texts of reasoning left out, as thinking is drop"


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(tiny)


def learned(row: Row, tokenizer, train_on="assistant", thinking="keep", notes=None) -> str:
    example = encode(row, tokenizer, train_on, thinking, notes)
    return tokenizer.decode(example.tokens[example.mask])


def refused(row: Row, tokenizer) -> DataError:
    with pytest.raises(DataError) as error:
        encode(row, tokenizer, "assistant")
    assert row.origin in error.value.found
    return error.value


# ---------------------------------------------------------------- tools


def test_a_call_is_learned_with_the_token_that_hands_over_and_its_result_is_not(tokenizer):
    agent = row(*({**turn, "reasoning": ""} for turn in AGENT[:4]), tools=(TOOL,))
    assert learned(agent, tokenizer) == (
        '<|tool_call>call:add{a:1,b:<|"|>two<|"|>}<tool_call|><|tool_response>It is 3.<turn|>'
    )


def test_a_call_without_a_result_ends_with_the_hand_over(tokenizer):
    asked = row(AGENT[0], {**AGENT[1], "reasoning": ""}, tools=(TOOL,))
    assert learned(asked, tokenizer).endswith("}<tool_call|><|tool_response>")


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("last", "It is 3.<turn|>"),
        ("completion", "<tool_call|><|tool_response>It is 3.<turn|>"),
        ("assistant", "Hello.<turn|><|tool_call>"),
    ],
)
def test_completion_is_the_whole_answer_and_last_what_follows_the_result(
    tokenizer, train_on, wanted
):
    before = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    agent = ({**turn, "reasoning": ""} for turn in AGENT[:4])
    text = learned(row(*before, *agent, tools=(TOOL,)), tokenizer, train_on)
    assert wanted in text
    assert ("Hello" in text) == (train_on == "assistant")
    assert ("<|tool_call>" in text) == (train_on != "last")


def test_tools_that_the_template_does_not_know_are_not_lost_silently(tokenizer):
    tokenizer.chat_template = STRIPS_EARLIER_THOUGHTS.replace(
        "for tool in tools or []", "for t in []"
    )
    error = refused(row(*AGENT, tools=(TOOL,)), tokenizer)
    assert "leaves out the tool add" in error.found


def test_calls_that_the_template_does_not_know_are_not_lost_silently(tokenizer):
    tokenizer.chat_template = STRIPS_EARLIER_THOUGHTS.replace("in m.tool_calls or []", "in []")
    error = refused(row(*AGENT), tokenizer)
    assert "the row says       '(thinks Iadd.) (calls add)" in error.found
    assert "the model turn is  ''" in error.found


def test_a_call_of_another_tool_is_refused(tokenizer):
    tokenizer.chat_template = STRIPS_EARLIER_THOUGHTS.replace("call.function |", "'x' |")
    assert "the model turn is" in refused(row(*AGENT[:4]), tokenizer).found


def test_a_call_written_into_the_text_is_learned_and_a_result_is_not(tokenizer):
    said = "<|tool_call>call:add{a:1}<tool_call|><|tool_response>response:add{3}<tool_response|>3."
    text = learned(row(AGENT[0], {"role": "assistant", "content": said}), tokenizer)
    assert text == "<|tool_call>call:add{a:1}<tool_call|><|tool_response>3.<turn|>"


def test_a_turn_that_goes_on_after_its_end_is_learned_without_the_line_between(tokenizer):
    opens = "loop.previtem['role'] == 'tool'"
    assert opens in CHAT_TEMPLATE
    tokenizer.chat_template = CHAT_TEMPLATE.replace(opens, "loop.previtem['role'] != 'user'")
    more = row(
        AGENT[0], *({"role": "assistant", "content": text} for text in ("Let me see.", "3."))
    )
    text = tokenizer.decode(encode(more, tokenizer, "assistant").tokens)
    assert text.endswith("<|turn>model\nLet me see.<turn|>\n3.<turn|>\n")
    assert learned(more, tokenizer) == "Let me see.<turn|>3.<turn|>"
    assert learned(more, tokenizer, "last") == "3.<turn|>"


@pytest.mark.parametrize("marker", ["<turn|>", "<tool_call|>", "<|tool_response>", "<eos>"])
def test_an_argument_that_would_end_its_call_is_refused(tokenizer, marker):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": [marker]}}}
    error = refused(row(AGENT[0], {**AGENT[1], "tool_calls": [call]}), tokenizer)
    assert f"turn 2, an answer, holds {marker}" in error.found


# ---------------------------------------------------------------- thoughts


@pytest.mark.parametrize(
    ("thinking", "wanted"),
    [
        ("keep", "<|channel>thought\nEasy.\n<channel|>It is 4.<turn|>"),
        ("mask", "It is 4.<turn|>"),
        ("drop", "It is 4.<turn|>"),
    ],
)
def test_thoughts_are_kept_masked_or_dropped(tokenizer, thinking, wanted):
    notes = Counter()
    agent = row(*AGENT, tools=(TOOL,))
    assert learned(agent, tokenizer, "last", thinking, notes) == wanted
    text = tokenizer.decode(encode(agent, tokenizer, "last", thinking).tokens)
    assert ("Easy." in text) == ("<|think|>" in text) == (thinking != "drop")
    assert notes == ({REMOVED: 3} if thinking == "drop" else {})


def test_a_thought_within_the_text_is_a_thought(tokenizer):
    said = {"role": "assistant", "content": "<|channel>thought\nEasy.\n<channel|>It is 4."}
    inline = row(AGENT[4], said)
    kept = learned(inline, tokenizer)
    assert kept == "<|channel>thought\nEasy.\n<channel|>It is 4.<turn|>"
    assert learned(inline, tokenizer, thinking="mask") == "It is 4.<turn|>"
    assert learned(inline, tokenizer, thinking="drop") == "It is 4.<turn|>"
    dropped = encode(inline, tokenizer, "assistant", "drop")
    assert "Easy" not in tokenizer.decode(dropped.tokens)


def test_a_thought_after_a_result_that_holds_a_marker_is_shown(tokenizer):
    turns = [*AGENT[:2], {**AGENT[2], "content": "<|turn>"}, AGENT[3]]
    turns[1] = {**turns[1], "reasoning": ""}
    example = encode(row(*turns), tokenizer, "last")
    assert "<|think|>" in tokenizer.decode(example.tokens)
    said = tokenizer.decode(example.tokens[example.mask])
    assert said == "<|channel>thought\nDone.\n<channel|>It is 3.<turn|>"


def test_an_empty_thought_that_the_template_writes_is_not_learned(tokenizer):
    tokenizer.chat_template = EMPTY_THOUGHT_PROMPT.replace(
        "{{- message['content'] | trim -}}",
        "{{- '<|channel>thought\\n<channel|>' if message['role'] == 'assistant' -}}"
        "{{- message['content'] | trim -}}",
    )
    plain = row({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert learned(plain, tokenizer) == "b<turn|>"


@pytest.mark.parametrize("marker", ["<channel|>", "<|channel>", "<|turn>", "<eos>"])
def test_a_thought_that_would_end_itself_is_refused(tokenizer, marker):
    thought = {"role": "assistant", "content": "b", "reasoning": f"x {marker} y"}
    assert f"holds {marker}" in refused(row(AGENT[0], thought), tokenizer).found


# ---------------------------------------------------------------- weights


def test_a_turn_of_weight_0_is_no_target(tokenizer):
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    assert learned(row(*turns), tokenizer) == "d<turn|>"
    all_of_it = encode(row(*turns), tokenizer, "all")
    assert tokenizer.decode(all_of_it.tokens[~all_of_it.mask]) == "b<turn|>"
    turns[3]["train"] = False
    assert refused(row(*turns), tokenizer).found == "rows.jsonl:7: has no target token"


@pytest.mark.parametrize("template", [None, MARKS_GENERATION])
def test_weights_within_one_turn_are_followed_or_refused(tokenizer, template):
    messages = [{**turn, "reasoning": ""} for turn in AGENT[:4]]
    messages[1]["train"] = False
    if template:
        # A turn for each message.
        tokenizer.chat_template = template
        assert learned(row(*messages), tokenizer) == "It is 3.<turn|>"
    else:
        error = refused(row(*messages), tokenizer)
        assert "answers with weight 0 and answers with weight 1" in error.found


# ---------------------------------------------------------------- text rows, media, workers


@pytest.mark.parametrize(
    "text", ["Open it.", "<bos>Open it.", "Open it.<eos>", "<bos>Open it.<eos>"]
)
def test_a_text_row_has_one_bos_and_one_eos(tokenizer, text):
    example = encode(Row("text", (), text, "rows.jsonl:1"), tokenizer, "assistant")
    assert tokenizer.decode(example.tokens) == "<bos>Open it.<eos>"
    assert example.mask.all()


def test_a_bos_within_a_text_row_is_refused(tokenizer):
    error = refused(Row("text", (), "Open <bos> it.", "rows.jsonl:1"), tokenizer)
    assert error.found == "rows.jsonl:1: has 2 <bos> tokens when rendered"


@pytest.mark.parametrize("kind", ["audio", "image"])
def test_media_that_cannot_be_trained_on(tokenizer, kind):
    parts = [{"type": kind, kind: "a"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": parts}]
    assert f"(assistant) holds {kind} and text" in refused(row(*turns), tokenizer).found


def test_an_error_stands_in_its_rows_place_and_counts_nothing(tokenizer):
    good = row(*AGENT[4:])
    bad = row({"role": "user", "content": "<turn|>"})
    results, facts = encode_together([bad, good, bad], tokenizer, "assistant", "drop")
    assert [result.origin for result in results] == ["rows[1]"]
    assert (facts.bad, facts.notes) == (2, {REMOVED: 1})
    assert not len(encode_together([], tokenizer, "assistant")[0])


def test_the_first_bad_row_is_told_first_whatever_step_it_fails_in(tokenizer):
    """Rows are rendered before any is tokenized: a later row fails first."""
    late = row({"role": "user", "content": "a"})  # no target: seen after tokenizing
    early = row({"role": "user", "content": "<bos>"}, {"role": "assistant", "content": "<turn|>"})
    for rows in ([row(*AGENT[4:]), late, early], [row(*AGENT[4:]), early, late]):
        _, facts = encode_together(rows, tokenizer, "assistant", on_bad_row="error")
        assert [told.split(":")[0] for told in facts.bad_rows] == ["rows[1]", "rows[2]"]
        remedy = "mend or remove the line" if rows[1] is late else "remove the markers"
        assert facts.remedy[1].startswith(remedy)


def test_workers_can_encode(tokenizer):
    rows = [row(*AGENT, tools=(TOOL,)), Row("text", (), "Open it.", "rows.jsonl:1")]
    sent = pickle.loads(pickle.dumps((rows, tokenizer, "assistant")))
    for there, here in zip(
        encode_together(*sent)[0], encode_together(rows, tokenizer, "assistant")[0]
    ):
        assert np.array_equal(there.tokens, here.tokens)
        assert np.array_equal(there.mask, here.mask)


def test_a_tokenizer_set_to_cut_and_pad_does_neither(tokenizer):
    agent = row(*AGENT, tools=(TOOL,))
    wanted = encode(agent, tokenizer, "all").tokens.tolist()
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=4)
    assert encode(agent, tokenizer, "all").tokens.tolist() == wanted


def test_a_tokenizer_that_adds_a_bos_of_its_own_does_not_double_it(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    assert tokenizer("a")["input_ids"][0] == 2
    for example in encode_together([row(*AGENT), Row("text", (), "a", "f:1")], tokenizer, "all")[0]:
        assert example.tokens.tolist().count(2) == 1
