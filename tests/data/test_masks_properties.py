"""Random conversations: what is learned is what the assistant said, whatever the template's style.

Each style is a chat template and, in Python, what it should render: a list of (text, who says it).
The tokens must be those of `apply_chat_template`, the targets must decode to what the model says,
and the other tokens to all the rest.
"""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("hypothesis")
from helpers import encode, encode_together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from styles import EMPTY_THOUGHT, STYLES, Piece

from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.data.chat.spans import MARKERS
from mlx_gemma4.model.tokenizer import load_tokenizer

FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ---------------------------------------------------------------- conversations

# "▁" is how the tokenizer writes a space, so it does not survive decoding.
letters = st.characters(exclude_categories=["Cs"], exclude_characters="▁\0")
words = st.sampled_from(
    ["Open the file.", "Return it", "a", "1", "model\n", "user\n", "thought\n", "\n\n", "  ", "\t",
     "é", "🙂", "漢字", "<|think|>", '<|"|>', "<|turn", "turn|>", "<", "|>", "{{ 7 }}", "{% if %}",
     "call:add{}", "<|tool>", "<0x41>", "\u200b", "\xa0"]
)  # fmt: skip
harmless = st.lists(words | st.lists(letters, max_size=6).map("".join), max_size=5).map("".join)


def said_by_the_model(text: str) -> bool:
    return not any(marker in text for marker in (*MARKERS, "<bos>", "<eos>"))


answers = harmless.filter(said_by_the_model)
thoughts = answers.filter(str.strip)
others = (
    st.lists(
        words | st.sampled_from(MARKERS) | st.lists(letters, max_size=6).map("".join), max_size=6
    )
    .map("".join)
    .filter(lambda text: "<bos>" not in text)
)
values = answers | st.integers() | st.booleans() | st.none() | st.lists(st.integers(), max_size=2)
tool_names = st.sampled_from(["add", "look_up", "weather"])
calls = st.builds(
    lambda name, arguments: {
        "type": "function", "function": {"name": name, "arguments": arguments}
    },
    tool_names,
    st.dictionaries(st.sampled_from(["a", "b", "city"]), values, max_size=2),
)  # fmt: skip
tools = st.lists(
    st.builds(
        lambda name, text: {"type": "function", "function": {"name": name, "description": text}},
        tool_names,
        others,
    ),
    max_size=2,
)


@st.composite
def conversations(draw) -> list[dict]:
    """System turn or not, questions, thoughts or not, calls with results or without, answers."""
    thinks = draw(st.booleans())

    def assistant(**more) -> dict:
        turn = {"role": "assistant", "content": draw(answers), **more}
        return {**turn, "reasoning": draw(thoughts)} if thinks and draw(st.booleans()) else turn

    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(others)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(others)})
        for _ in range(draw(st.integers(0, 2))):
            made = draw(st.lists(calls, min_size=1, max_size=2))
            messages.append(assistant(tool_calls=made))
            for one in made:
                name = one["function"]["name"]
                messages.append({"role": "tool", "name": name, "content": draw(others)})
        messages.append(assistant())
    ending = draw(st.sampled_from(["answer", "question", "results", "call"]))
    if ending == "question":
        messages.append({"role": "user", "content": draw(others)})
    elif ending in ("results", "call"):
        made = draw(calls)
        messages[-1]["tool_calls"] = [made]
        if ending == "results":
            name = made["function"]["name"]
            messages.append({"role": "tool", "name": name, "content": draw(others)})
    return messages


def row_of(messages: list[dict], declared: list[dict]) -> Row:
    return Row(
        "tools" if declared else "chat", tuple(messages), "", "rows.jsonl:7", tuple(declared)
    )


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture(params=STYLES)
def style(request, tokenizer):
    tokenizer.chat_template = STYLES[request.param].template
    return STYLES[request.param]


def without_thoughts(messages: list[dict]) -> list[dict]:
    return [{k: v for k, v in turn.items() if k != "reasoning"} for turn in messages]


def thoughts_in(messages: list[dict]) -> int:
    return sum("reasoning" in turn for turn in messages)


def begun(pieces: list[Piece], style, learned=("text", "call", "end")) -> list[Piece]:
    """The pieces where learned answers begin as the style's generation prompt begins them."""
    if style.template != STYLES["prompt with an empty thought"].template:
        return pieces
    done: list[Piece] = []
    for piece, following in zip(pieces, [*pieces[1:], ("", None)]):
        done.append(piece)
        if piece[0] == "<|turn>model\n" and following[1] in learned:
            done.append((EMPTY_THOUGHT, None))
    return done


# ---------------------------------------------------------------- properties


@given(messages=conversations(), declared=tools, thinking=st.sampled_from(["keep", "mask", "drop"]))
@FIXED
def test_what_is_learned_is_what_the_assistant_said_and_nothing_else(
    style, tokenizer, messages, declared, thinking
):
    notes = Counter()
    row = row_of(messages, declared)
    example = encode(row, tokenizer, "assistant", thinking, notes)
    rendered = without_thoughts(messages) if thinking == "drop" else messages
    pieces = begun(style.pieces(rendered, declared), style)
    learned = {"text", "call", "end"} | ({"thought", "put in"} if thinking == "keep" else set())
    assert tokenizer.decode(example.tokens) == "".join(text for text, _ in pieces)
    assert tokenizer.decode(example.tokens[example.mask]) == "".join(
        text for text, kind in pieces if kind in learned
    )
    assert tokenizer.decode(example.tokens[~example.mask]) == "".join(
        text for text, kind in pieces if kind not in learned
    )
    removed = notes["texts of reasoning left out, as thinking is drop"]
    assert removed == (thoughts_in(messages) if thinking == "drop" else 0)


@given(messages=conversations(), declared=tools)
@FIXED
def test_tokens_are_those_of_apply_chat_template(style, tokenizer, messages, declared):
    example = encode(row_of(messages, declared), tokenizer, "assistant", answer_start="template")
    pieces = style.pieces(messages, declared)
    assert tokenizer.decode(example.tokens) == "".join(text for text, _ in pieces)
    wanted = tokenizer.apply_chat_template(
        [{**turn, "reasoning_content": turn.get("reasoning")} for turn in messages],
        tools=declared or None,
        return_dict=False,
        **({"enable_thinking": True} if thoughts_in(messages) else {}),
    )
    if all(kind != "put in" for _, kind in pieces):
        assert example.tokens.tolist() == wanted
    else:
        own = "".join(text for text, kind in pieces if kind != "put in")
        assert tokenizer.decode(wanted) == own
    assert wanted[0] == tokenizer.bos_token_id and wanted.count(wanted[0]) == 1


def stretch(pieces: list[Piece], start: int) -> str:
    return "".join(text for text, kind in pieces[start:] if kind)


@given(messages=conversations(), declared=tools)
@FIXED
def test_last_and_completion_are_the_end_of_what_is_said(style, tokenizer, messages, declared):
    """What follows the last question that is answered; of it, what follows the last tool result."""
    row = row_of(messages, declared)
    pieces = style.pieces(messages, declared)
    while not pieces[-1][1]:
        pieces.pop()
    asked = max(i for i, (text, kind) in enumerate(pieces) if not kind and "<|turn>user\n" in text)
    # The end of the last stretch is the last piece; anything else between is another's.
    last = max(
        i for i, (text, kind) in enumerate(pieces[:-1])
        if not kind or (kind == "end" and text == "<|tool_response>")
    )  # fmt: skip
    for train_on, start in (("completion", asked), ("last", last + 1)):
        example = encode(row, tokenizer, train_on)
        assert tokenizer.decode(example.tokens[example.mask]) == stretch(pieces, start)


@given(rows=st.lists(st.tuples(conversations(), tools), min_size=2, max_size=4))
@settings(FIXED, max_examples=15)
def test_many_rows_at_once_are_the_rows_one_by_one(style, tokenizer, rows):
    rows = [row_of(messages, declared) for messages, declared in rows]
    rows.insert(1, Row("text", (), "Open the file.", "rows.jsonl:8"))
    rows.insert(2, row_of([{"role": "user", "content": "a"}], []))
    alone = Counter()
    results, facts = encode_together(rows, tokenizer, "assistant")
    assert ["rows[2]: has no target token" in told for told in facts.bad_rows] == [True]
    assert [result.origin for result in results] == [
        f"rows[{i}]" for i in range(len(rows)) if i != 2
    ]
    for row, result in zip([rows[0], rows[1], *rows[3:]], results):
        example = encode(row, tokenizer, "assistant", "keep", alone)
        assert result.tokens.tolist() == example.tokens.tolist()
        assert result.mask.tolist() == example.mask.tolist()
    assert facts.notes == alone
