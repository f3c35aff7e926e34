"""Prompts as text or messages, tools and thinking: the same tokens as in training."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mlx_gemma4 as g4
from mlx_gemma4.model.conversation import conversation, functions, mark_thoughts, split_thought
from mlx_gemma4.model.tokenizer import load_tokenizer, prompt_tokens

TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]
ASKED = [
    {"role": "user", "content": "Open the file."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function",
                        "function": {"name": "read", "arguments": '{"line": 3}'}}],
    },
    {"role": "tool", "name": "read", "tool_call_id": "1", "content": "sum"},
]  # fmt: skip
EXPLICIT = (
    "{{- bos_token -}}{{- 'yes' if enable_thinking is defined and enable_thinking is true -}}"
    "{{- 'no' if enable_thinking is defined and enable_thinking is false -}}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def text(gemma, prompt, **options) -> str:
    return gemma.tokenizer.decode(prompt_tokens(gemma.tokenizer, prompt, **options))


def test_a_text_is_a_user_turn(gemma):
    told = "<bos><|turn>user\nA list?<turn|>\n<|turn>model\n"
    assert text(gemma, "A list?") == told
    assert text(gemma, [{"role": "user", "content": "A list?"}]) == told


def test_openai_messages_are_rendered_as_training_renders_them(gemma):
    """Calls without content, arguments as JSON text, content in parts."""
    said = text(gemma, ASKED, tools=TOOLS)
    assert '<|tool>declaration:{"name": "read"' in said
    assert "<|turn>model\n<|tool_call>call:read{line:3}<tool_call|>" in said
    assert said.endswith('<|tool_response>response:read{value:<|"|>sum<|"|>}<tool_response|>')
    assert "None" not in said
    parts = [{"type": "text", "text": "A "}, {"type": "input_text", "text": "list?"}]
    assert text(gemma, [{"role": "user", "content": parts}]) == text(gemma, "A list?")


def test_the_prompt_is_the_beginning_of_the_training_row(gemma):
    answer = {"role": "assistant", "content": "Returned."}
    row = {"messages": [*ASKED, answer], "tools": TOOLS}
    whole = list(g4.read([row], gemma).train[0].tokens)
    asked = prompt_tokens(gemma.tokenizer, ASKED, tools=TOOLS)
    assert whole[: len(asked)] == asked and len(whole) > len(asked)


def test_tools_without_the_function_around_them(gemma):
    bare = [TOOLS[0]["function"]]
    assert text(gemma, "Hi", tools=bare) == text(gemma, "Hi", tools=TOOLS) != text(gemma, "Hi")


def test_the_template_is_told_of_thinking_either_way(gemma):
    assert "<|think|>" in text(gemma, "Hi", thinking=True)
    assert "<|think|>" not in text(gemma, "Hi")
    gemma.tokenizer.chat_template = EXPLICIT
    assert text(gemma, "Hi", thinking=True) == "<bos>yes"
    assert text(gemma, "Hi") == "<bos>no"


def test_generate_and_stream_take_all_of_it(gemma, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "mlx_gemma4.gemma.prompt_tokens",
        lambda tokenizer, prompt, **options: asked.append((prompt, options)) or [2, 105],
    )
    gemma.generate(ASKED, tools=TOOLS, thinking=True, max_tokens=1)
    list(gemma.stream("Hi", max_tokens=1))
    assert asked == [
        (conversation(ASKED), {"tools": TOOLS, "thinking": True}),
        (conversation("Hi"), {"tools": None, "thinking": False}),
    ]


@pytest.mark.parametrize("prompt", ["", " \n\t", [], None, 3, [{"role": "user", "content": " "}]])
def test_what_would_be_rendered_empty_is_refused_at_once(gemma, prompt):
    for ask in (gemma.generate, gemma.stream):
        with pytest.raises(g4.ConfigError, match=r"the prompt is|is empty"):
            ask(prompt)


BAD = {
    "has no role": [{"content": "a"}],
    "message 2 has no role": [{"role": "user", "content": "a"}, "b"],
    "has the role 'robot'": [{"role": "robot", "content": "a"}],
    "content other than text": [{"role": "user", "content": [{"type": "video", "video": "a"}]}],
    "a tool call that is none": [{"role": "assistant", "tool_calls": ["read"]}],
    "message 1 has a tool call": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}
    ],
}


@pytest.mark.parametrize("told", BAD)
def test_messages_that_are_none(told):
    with pytest.raises(g4.ConfigError, match=told):
        conversation(BAD[told])


def test_a_second_system_turn_is_refused():
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(g4.ConfigError, match="begin with a system turn"):
        conversation(messages, "c")


@pytest.mark.parametrize("tools", ["read", [3], [{"function": {}}], [{"type": "function"}]])
def test_tools_that_are_none(tools):
    with pytest.raises(g4.ConfigError, match="without the name of a function"):
        functions(tools)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"temperature": "hot"}]
)
def test_numbers_out_of_bounds_are_refused_from_python_too(gemma, options):
    with pytest.raises(g4.ConfigError, match=next(iter(options))):
        gemma.stream("Hi", **options)


def test_thoughts_are_parted_from_what_is_said_however_the_pieces_fall():
    answer = "<|channel>thought\nA list?\nEasy.\n<channel|>It holds values."
    assert split_thought(answer) == ("A list?\nEasy.", "It holds values.")
    assert split_thought("It holds values.") == ("", "It holds values.")
    assert split_thought("<|channel>thought\n<channel|>Hi") == ("", "Hi")
    for at in range(len("<|channel>"), answer.index("<channel|>")):
        marked = list(mark_thoughts([answer[:at], answer[at:]]))
        assert "".join(t for is_thought, t in marked if is_thought) == "A list?\nEasy.\n"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
    optional={
        "content": anything
        | st.lists(st.fixed_dictionaries({"type": anything, "text": anything}), max_size=2),
        "name": anything,
        "reasoning": anything,
        "tool_calls": anything
        | st.lists(
            st.fixed_dictionaries(
                {"function": st.fixed_dictionaries({"name": anything, "arguments": anything})}
            ),
            max_size=2,
        ),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.lists(messages, max_size=3) | anything,
    tools=anything | st.lists(st.fixed_dictionaries({"name": anything}), max_size=2),
)
def test_whatever_is_given_is_rendered_or_refused(tokenizer, prompt, tools):
    with contextlib.suppress(g4.Gemma4Error):
        assert prompt_tokens(tokenizer, prompt, tools=tools)
