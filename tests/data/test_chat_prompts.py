"""How an answer begins: in training as in the generation prompt."""

from __future__ import annotations

import pytest
from helpers import encode
from styles import EMPTY_THOUGHT, EMPTY_THOUGHT_PROMPT, MARKS_GENERATION, STYLES, row

import mlx_gemma4 as g4
from mlx_gemma4.model.tiny import CHAT_TEMPLATE
from mlx_gemma4.model.tokenizer import load_tokenizer

CHAT = (
    {"role": "user", "content": "Open the file."},
    {"role": "assistant", "content": "It is open."},
    {"role": "user", "content": "Read a line."},
    {"role": "assistant", "content": "Return the line."},
)
# As the 12B, 26B and 31B templates have it: no empty thought where thoughts are asked for.
UNLESS_THINKING = CHAT_TEMPLATE.replace(
    "{{- '<|turn>model\\n' -}}",
    "{{- '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>') -}}",
)


@pytest.fixture
def tokenizer(tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = EMPTY_THOUGHT_PROMPT
    return tokenizer


def asked(tokenizer, messages, **options) -> list[int]:
    options |= {"return_dict": False, "add_generation_prompt": True}
    return tokenizer.apply_chat_template(list(messages), **options)


@pytest.mark.parametrize("template", [EMPTY_THOUGHT_PROMPT, UNLESS_THINKING, CHAT_TEMPLATE])
@pytest.mark.parametrize("system", [(), ({"role": "system", "content": "Be short."},)])
@pytest.mark.parametrize(
    ("train_on", "turns", "answer"),
    [("assistant", 2, "It is open."), ("all", 2, ""), ("last", 4, "Return the line."),
     ("completion", 4, "Return the line.")],
)  # fmt: skip
def test_a_learned_answer_follows_the_generation_prompt(
    tokenizer, template, system, train_on, turns, answer
):
    tokenizer.chat_template = template
    messages = (*system, *CHAT[:turns])
    example = encode(row(*messages), tokenizer, train_on)
    prompt = asked(tokenizer, messages[:-1])
    assert example.tokens[: len(prompt)].tolist() == prompt
    if answer:
        assert not example.mask[: len(prompt)].any()
        assert tokenizer.decode(example.tokens[example.mask]) == answer + "<turn|>"


def test_the_empty_thought_is_context_before_every_answer(tokenizer):
    for train_on in ("assistant", "all"):
        example = encode(row(*CHAT), tokenizer, train_on)
        text = tokenizer.decode(example.tokens)
        assert text.count("<|turn>model\n" + EMPTY_THOUGHT) == 2
        learned = tokenizer.decode(example.tokens[example.mask])
        assert "<|channel>" not in learned
        plain = encode(row(*CHAT), tokenizer, train_on, answer_start="template")
        assert learned == tokenizer.decode(plain.tokens[plain.mask])
        assert text.replace(EMPTY_THOUGHT, "") == tokenizer.decode(plain.tokens)


def test_what_is_not_learned_begins_as_the_template_has_it(tokenizer):
    weighed = [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]
    text = tokenizer.decode(encode(row(*weighed), tokenizer, "assistant").tokens)
    assert text.count(EMPTY_THOUGHT) == 1
    assert text.endswith(f"<|turn>model\n{EMPTY_THOUGHT}Return the line.<turn|>\n")


@pytest.mark.parametrize("thinking", ["keep", "mask", "drop"])
def test_a_turn_with_a_thought_of_its_own_gets_no_other(tokenizer, thinking):
    thinks = (CHAT[0], {**CHAT[1], "reasoning": "Easy."})
    example = encode(row(*thinks), tokenizer, "assistant", thinking)
    text = tokenizer.decode(example.tokens)
    assert text.count("<|channel>") == 1
    assert (EMPTY_THOUGHT in text) == (thinking == "drop")


def test_where_thoughts_are_asked_for_the_prompt_is_the_one_that_asks_for_them(tokenizer):
    tokenizer.chat_template = UNLESS_THINKING
    thinks = (*CHAT[:3], {**CHAT[3], "reasoning": "Easy."})
    example = encode(row(*thinks), tokenizer, "assistant")
    prompt = asked(tokenizer, thinks[:1], enable_thinking=True)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert EMPTY_THOUGHT not in tokenizer.decode(example.tokens)


def test_a_template_that_writes_the_empty_thought_itself_gets_no_second(tokenizer):
    tokenizer.chat_template = EMPTY_THOUGHT_PROMPT.replace(
        "{{- message['content'] | trim -}}",
        "{{- '<|channel>thought\\n<channel|>' if message['role'] == 'assistant' -}}"
        "{{- message['content'] | trim -}}",
    )
    text = tokenizer.decode(encode(row(*CHAT), tokenizer, "assistant").tokens)
    assert text.count("<|channel>") == 2


def test_a_prompt_that_opens_a_thought_or_says_more_is_left_alone(tokenizer):
    for more in ("<|channel>thought\\n", "Sure:", "<|channel>thought\\nI am brief.<channel|>"):
        tokenizer.chat_template = CHAT_TEMPLATE.replace(
            "{{- '<|turn>model\\n' -}}", f"{{{{- '<|turn>model\\n{more}' -}}}}"
        )
        example = encode(row(*CHAT), tokenizer, "assistant")
        plain = tokenizer.apply_chat_template(list(CHAT), return_dict=False)
        assert example.tokens.tolist() == plain


def test_generation_marks_are_held_against_the_templates_own_rendering(tokenizer):
    tokenizer.chat_template = MARKS_GENERATION.replace(
        "if add_generation_prompt -%}{{- '<|turn>model\\n' -}}",
        "if add_generation_prompt -%}{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}",
    )
    example = encode(row(*CHAT), tokenizer, "assistant")
    assert tokenizer.decode(example.tokens).count(EMPTY_THOUGHT) == 2
    assert tokenizer.decode(example.tokens[example.mask]) == (
        "It is open.<turn|>Return the line.<turn|>"
    )


# ---------------------------------------------------------------- the check at a run's start


def told(gemma, template, **settings) -> list[str]:
    gemma.tokenizer.chat_template = template
    data = g4.read([{"messages": list(CHAT)}] * 2, gemma, g4.DataConfig(**settings))
    return [line for line in data.facts.prompts if line]


@pytest.mark.parametrize("train_on", ["assistant", "last", "completion", "all"])
@pytest.mark.parametrize("style", STYLES)
def test_prompts_that_agree_are_passed_over_in_silence(gemma, style, train_on):
    assert told(gemma, STYLES[style].template, train_on=train_on) == []


@pytest.mark.parametrize("train_on", ["assistant", "last", "completion", "all"])
def test_prompts_that_differ_are_told_in_one_line(gemma, train_on):
    [line] = told(gemma, EMPTY_THOUGHT_PROMPT, train_on=train_on, answer_start="template")
    assert line.startswith("rows[0]: an answer is learned after '...")
    assert "<|channel>thought\\n<channel|>'; answer_start: prompt makes them agree" in line
    assert "\n" not in line


def test_a_prompt_that_nothing_makes_agree_is_told(gemma):
    template = CHAT_TEMPLATE.replace("{{- '<|turn>model\\n' -}}", "{{- '<|turn>model\\nSure:' -}}")
    [line] = told(gemma, template)
    assert "Sure:" in line and "answer_start" not in line


@pytest.mark.parametrize("answer_start", ["prompt", "template"])
def test_a_run_says_so_when_it_starts(gemma, capsys, answer_start):
    gemma.tokenizer.chat_template = EMPTY_THOUGHT_PROMPT
    rows = [{"messages": list(CHAT)}] * 2
    data = g4.read(rows, gemma, g4.DataConfig(answer_start=answer_start))
    g4.finetune(gemma, data, g4.TrainConfig(iters=1, batch_size=1))
    printed = capsys.readouterr().out
    assert ("the generation prompt ends in" in printed) == (answer_start == "template")
