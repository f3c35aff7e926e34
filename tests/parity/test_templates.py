"""The public versions of Gemma 4's chat template, as trl's wheel has them, and what is trained.

What a row should become is written here from the row and from the template's own renderings of
the turns before an answer, not from the code under test.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from itertools import groupby

import pytest
from helpers import encode
from styles import EMPTY_THOUGHT, call

from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tokenizer import load_tokenizer

WHEEL = {
    file.name: file.locate().read_text("utf-8")
    for file in importlib.metadata.distribution("trl").files or ()
    if file.name.startswith("gemma4") and file.suffix == ".jinja"
}
OPENER = "{{- '<|turn>model\\n' -}}"
# The larger members' templates have this more: an empty thought, unless thoughts are asked for.
MORE = "{%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}"
TEMPLATES = WHEEL | {
    "larger " + name: text.replace(OPENER, OPENER + MORE + "{%- endif -%}")
    for name, text in WHEEL.items()
}

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "One."}},
            "required": ["a"],
        },
    },
}
ADD = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
SYSTEM = {"role": "system", "content": "Be short."}
ASKED = {"role": "user", "content": "What is 1 + 2?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [ADD]}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "add", "content": "3"}
SAYS = {"role": "assistant", "content": "It is 3."}
AGAIN = {"role": "user", "content": "And 2 + 2? <turn|>\n<|turn>model\nFour."}
FOUR = {"role": "assistant", "content": "It is 4."}
CHATS = {
    "one": (ASKED, SAYS),
    "system": (SYSTEM, ASKED, SAYS),
    "several": (SYSTEM, ASKED, SAYS, AGAIN, FOUR),
    "tool": (ASKED, CALLS, RESULT, SAYS),
    "two calls": (SYSTEM, ASKED, CALLS, RESULT, CALLS, RESULT, SAYS),
    "several with a tool": (SYSTEM, ASKED, CALLS, RESULT, SAYS, AGAIN, FOUR),
    "a call last": (ASKED, SAYS, AGAIN, CALLS),
    "a call at the end": (ASKED, CALLS),
}
ANSWER_STARTS = ("prompt", "template")


def test_the_wheel_has_the_versions():
    assert len(WHEEL) >= 5
    assert all(text.count(OPENER) == 1 for text in WHEEL.values())


@pytest.fixture(params=sorted(TEMPLATES))
def template(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(tiny, template):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.fixture(params=sorted(CHATS))
def plain(request) -> tuple[dict, ...]:
    return CHATS[request.param]


def thinking(messages) -> tuple[dict, ...]:
    """The messages where every answer has reasoning of its own."""
    return tuple(
        {**turn, "reasoning": f"I think {i}."} if turn["role"] == "assistant" else turn
        for i, turn in enumerate(messages)
    )


def row(messages) -> Row:
    tools = (TOOL,) if any("tool_calls" in turn for turn in messages) else ()
    return Row("chat", tuple(messages), "", "rows.jsonl:7", tools)


def thought(turn: dict) -> str:
    return f"<|channel>thought\n{turn['reasoning']}\n<channel|>" if "reasoning" in turn else ""


def own(tokenizer, messages, tools, thinks: bool, prompt: bool = True) -> list[int]:
    """The template's own tokens of a conversation, by default its generation prompt."""
    return tokenizer.apply_chat_template(
        [{**turn, "reasoning_content": turn.get("reasoning", "")} for turn in messages],
        tools=list(tools) or None,
        add_generation_prompt=prompt,
        return_dict=False,
        **({"enable_thinking": True} if thinks else {}),
    )


def learned(example, tokenizer) -> list[str]:
    """The stretches of targets, as text."""
    runs = groupby(zip(example.tokens, example.mask), lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_target, run in runs if is_target]


def said(messages, template: str) -> list[str]:
    """What the model says, a text for each answer: thought, calls or text, and where it stops."""
    after_call = "<turn|>" if "_v2" in template else "<|tool_response>"
    return [
        thought(turn) + "".join(map(call, turn.get("tool_calls", ()))) + turn["content"]
        + (after_call if "tool_calls" in turn else "<turn|>")
        for turn in messages
        if turn["role"] == "assistant"
    ]  # fmt: skip


@pytest.mark.parametrize("answer_start", ANSWER_STARTS)
@pytest.mark.parametrize("thinks", [False, True])
def test_targets_are_what_the_model_says_and_where_it_stops(
    template, tokenizer, plain, thinks, answer_start
):
    messages = thinking(plain) if thinks else plain
    notes = Counter()
    example = encode(row(messages), tokenizer, "assistant", "keep", notes, answer_start)
    assert learned(example, tokenizer) == said(messages, template)
    assert set(notes) <= {"rows with markers of the chat template in their own text"}


@pytest.mark.parametrize("answer_start", ANSWER_STARTS)
@pytest.mark.parametrize("thinks", [False, True])
def test_without_what_is_put_in_the_text_is_the_templates(
    template, tokenizer, plain, thinks, answer_start
):
    messages = thinking(plain) if thinks else plain
    example = encode(row(messages), tokenizer, "assistant", "keep", None, answer_start)
    if not thinks and answer_start == "template":
        whole = own(tokenizer, messages, row(plain).tools, thinks, prompt=False)
        assert example.tokens.tolist() == whole
    text = tokenizer.decode(example.tokens)
    opened = text.count("<|turn>model\n" + EMPTY_THOUGHT)
    model_turns = text.count("<|turn>model\n") - text.count(AGAIN["content"])
    adds = "larger" in template and not thinks and answer_start == "prompt"
    assert opened == (model_turns if adds else 0)
    text = text.replace(EMPTY_THOUGHT, "")
    for turn in messages:
        if "reasoning" in turn:
            assert text.count(thought(turn)) == 1
            text = text.replace(thought(turn), "")
    bare = own(tokenizer, plain, row(plain).tools, thinks, prompt=False)
    assert text == tokenizer.decode(bare)
    assert ("<|think|>" in text) == thinks


@pytest.mark.parametrize("thinks", [False, True])
def test_the_first_answer_follows_the_generation_prompt(template, tokenizer, plain, thinks):
    messages = thinking(plain) if thinks else plain
    first = next(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
    prompt = own(tokenizer, messages[:first], row(messages).tools, thinks)
    for train_on in ("assistant", "all"):
        example = encode(row(messages), tokenizer, train_on)
        assert example.tokens[: len(prompt)].tolist() == prompt
    example = encode(row(messages), tokenizer, "assistant")
    assert not example.mask[: len(prompt)].any() and example.mask[len(prompt)]
    if "larger" in template and not thinks:
        assert tokenizer.decode(prompt).endswith("<|turn>model\n" + EMPTY_THOUGHT)
        plain_start = encode(row(messages), tokenizer, "assistant", answer_start="template")
        assert plain_start.tokens[: len(prompt)].tolist() != prompt


@pytest.mark.parametrize("train_on", ["last", "completion"])
@pytest.mark.parametrize("thinks", [False, True])
def test_the_last_answer_follows_the_generation_prompt(
    template, tokenizer, plain, thinks, train_on
):
    """With reasoning on what is asked for alone: templates leave it out of earlier answers."""
    *before, last = plain
    if thinks:
        last = {**last, "reasoning": "I think."}
    messages = (*before, last)
    example = encode(row(messages), tokenizer, train_on)
    prompt = own(tokenizer, before, row(messages).tools, thinks)
    if train_on == "last" or before[-1]["role"] == "user":
        assert "".join(learned(example, tokenizer)) == said(messages, template)[-1]
        assert example.tokens[: len(prompt)].tolist() == prompt
    else:
        assert learned(example, tokenizer)[-1] == said(messages, template)[-1]


def test_a_thought_beside_a_call_that_has_text_too_stands_before_both(template, tokenizer):
    both = {**CALLS, "content": "Let me add.", "reasoning": "I add."}
    example = encode(row((ASKED, both, RESULT, SAYS)), tokenizer, "assistant")
    text = tokenizer.decode(example.tokens)
    assert f"<|turn>model\n{thought(both)}<|tool_call>" in text
    assert text.count("<|channel>") == 1


@pytest.mark.parametrize("how", ["<think>I think.</think>\n\n", thought({"reasoning": "I think."})])
def test_reasoning_in_the_text_is_the_same_reasoning(template, tokenizer, how):
    field = (SYSTEM, ASKED, {**SAYS, "reasoning": "I think."}, AGAIN, FOUR)
    within = (SYSTEM, ASKED, {**SAYS, "content": how + SAYS["content"]}, AGAIN, FOUR)
    a, b = (encode(row(messages), tokenizer, "assistant") for messages in (field, within))
    assert a.tokens.tolist() == b.tokens.tolist() and a.mask.tolist() == b.mask.tolist()


def test_reasoning_within_an_answer_that_the_templates_take_out_is_refused(template, tokenizer):
    within = (ASKED, {**SAYS, "content": f"It {thought({'reasoning': 'Hm.'})}is 3."})
    for how in ("keep", "mask"):
        with pytest.raises(DataError, match="leaves out 1 texts of reasoning") as error:
            encode(row(within), tokenizer, "assistant", how)
        assert error.value.do.startswith("set thinking to drop")
    assert learned(encode(row(within), tokenizer, "assistant", "drop"), tokenizer) == [
        "It is 3.<turn|>"
    ]


@pytest.mark.parametrize("order", ["the answer first", "two questions"])
def test_odd_orders_of_turns_are_the_templates_too(template, tokenizer, order):
    messages = (SAYS, ASKED, FOUR) if order == "the answer first" else (ASKED, AGAIN, FOUR)
    for thinks in (False, True):
        example = encode(row(thinking(messages) if thinks else messages), tokenizer, "assistant")
        text = tokenizer.decode(example.tokens).replace(EMPTY_THOUGHT, "")
        for turn in thinking(messages):
            text = text.replace(thought(turn), "")
        assert text == tokenizer.decode(own(tokenizer, messages, (), thinks, prompt=False))


@pytest.mark.parametrize("how", ["mask", "drop"])
def test_reasoning_that_is_masked_or_dropped(template, tokenizer, plain, how):
    messages = thinking(plain)
    example = encode(row(messages), tokenizer, "assistant", how)
    assert learned(example, tokenizer) == said(plain, template)
    kept = encode(row(messages if how == "mask" else plain), tokenizer, "assistant")
    assert example.tokens.tolist() == kept.tokens.tolist()
