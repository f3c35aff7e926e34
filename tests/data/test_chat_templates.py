"""Chat templates that would do harm, lose text, or disagree with themselves."""

from __future__ import annotations

import pytest
from helpers import encode
from styles import MARKS_GENERATION

from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.errors import DataError
from mlx_gemma4.model.tiny import CHAT_TEMPLATE
from mlx_gemma4.model.tokenizer import load_tokenizer

TURNS = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Open the file."},
    {"role": "assistant", "content": "The file is open."},
)


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(tiny)


def refused(tokenizer, template: str, *messages: dict) -> DataError:
    tokenizer.chat_template = template
    with pytest.raises(DataError) as error:
        encode(Row("chat", messages or TURNS, "", "rows.jsonl:7"), tokenizer, "assistant")
    assert "rows.jsonl:7" in error.value.found
    return error.value


# ---------------------------------------------------------------- nothing executes

ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['exec']('%s') }}",
    "init": "{{ namespace.__init__.__globals__['os'].system('%s') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('%s') }}",
    "format": "{{ '{0.__class__.__base__}'.format(messages) }}",
    "attr": "{{ (''|attr('__class__')|attr('__mro__'))[1].__subclasses__() }}",
    "import": "{{ __import__('os').system('%s') }}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(999999999) %}x{% endfor %}",
    "row": "{{ messages.append(1) }}",
    "row's turn": "{{ messages[0].update({'content': 'x'}) }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_hostile_template_is_refused_and_runs_nothing(tokenizer, tmp_path, name):
    trace = tmp_path / "ran"
    attack = ESCAPES[name].replace("%s", f"open({str(trace)!r}, chr(119))".replace("'", '"'))
    error = refused(tokenizer, CHAT_TEMPLATE + attack)
    assert "is refused by the model's chat template" in error.found
    assert not trace.exists()
    assert TURNS[0] == {"role": "system", "content": "Be short."}


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for %}", "{{ ''.__class__ }}", "{# a #}"])
def test_the_rows_text_is_no_template(tokenizer, text):
    row = Row("chat", ({"role": "user", "content": text}, TURNS[2]), "", "rows.jsonl:7")
    example = encode(row, tokenizer, "assistant")
    assert f"<|turn>user\n{text}<turn|>" in tokenizer.decode(example.tokens)


# ---------------------------------------------------------------- templates that stumble


@pytest.mark.parametrize(
    "bad",
    ["{{ 1 + 'a' }}", "{{ messages[99].role }}", "{{ nothing.role }}", "{% if %}", "{{ 1 / 0 }}",
     "{{ raise_exception('never') }}", "{{ messages[0] | int('x', 'y', 'z') }}"],
)  # fmt: skip
def test_a_template_that_stumbles_names_the_row(tokenizer, bad):
    error = refused(tokenizer, CHAT_TEMPLATE + bad)
    assert "is refused by the model's chat template" in error.found


# ---------------------------------------------------------------- templates that lose text


CONTENT = "{{- message['content'] | trim -}}"


@pytest.mark.parametrize(
    ("part", "instead", "lost"),
    [
        ("first['content'] | trim if first", "'' if first", "turn 1 (system)"),
        (CONTENT, "{{- message['content'][:9] -}}", "turn 2 (user)"),
    ],
)
def test_a_template_that_leaves_text_out_is_refused(tokenizer, part, instead, lost):
    assert part in CHAT_TEMPLATE
    error = refused(tokenizer, CHAT_TEMPLATE.replace(part, instead))
    assert error.found.endswith(f"the chat template leaves out {lost}")


@pytest.mark.parametrize(
    ("change", "shown"),
    [("[:9]", "The file"), ("| upper", "THE FILE IS OPEN."), ("+ ' Yes.'", "is open. Yes.")],
)
def test_a_template_that_changes_an_answer_is_refused_with_a_picture(tokenizer, change, shown):
    said = "if message.role == 'assistant' else message['content'] -}}"
    template = CHAT_TEMPLATE.replace(CONTENT, f"{{{{- message['content'] {change} {said}")
    found = refused(tokenizer, template).found
    row_says, turn_is = found.split("\n")[1:]
    assert "the row says" in row_says and "is open." in row_says
    assert "the model turn is" in turn_is and shown in turn_is


def test_the_picture_of_a_long_answer_shows_where_they_part(tokenizer):
    long = {"role": "assistant", "content": "word " * 200 + "end."}
    template = CHAT_TEMPLATE.replace(CONTENT, CONTENT.replace("trim", "replace('end', 'and')"))
    row_says, turn_is = refused(tokenizer, template, TURNS[1], long).found.split("\n")[1:]
    assert row_says.endswith("...'word word word word end.'")
    assert turn_is.endswith("...'word word word word and.'")


def test_reasoning_that_the_row_does_not_have_is_refused(tokenizer):
    template = (
        "{{ bos_token }}{% for m in messages %}<|turn>"
        "{{ 'model\n<|channel>thought\nMade up.<channel|>' if m.role == 'assistant' "
        "else m.role + '\n' }}{{ m.content }}<turn|>\n{% endfor %}"
    )
    assert "(thinks Madeup.)" in refused(tokenizer, template, *TURNS[1:]).found


def test_a_template_that_answers_in_the_users_name_is_refused(tokenizer):
    template = CHAT_TEMPLATE.replace("'model' if message['role'] == 'assistant' else", "")
    assert "the model turn is  ''" in refused(tokenizer, template).found


def test_a_template_without_bos_is_refused(tokenizer):
    error = refused(tokenizer, CHAT_TEMPLATE.replace("{{- bos_token -}}", ""))
    assert error.found == "rows.jsonl:7: has 0 <bos> tokens when rendered"
    assert error.do == "use Gemma 4's template"


def test_a_template_that_reads_markers_in_the_text_is_refused(tokenizer):
    sees = "{{- '!' if '<turn|>' in message['content'] -}}"
    question = {"role": "user", "content": "a <turn|><|turn> b"}
    error = refused(tokenizer, CHAT_TEMPLATE.replace(CONTENT, sees + CONTENT), question, TURNS[2])
    assert "the chat template changes with the markers in the row's text" in error.found


# ---------------------------------------------------------------- {% generation %}


def test_generation_marks_without_the_end_of_the_turn_agree(tokenizer):
    tokenizer.chat_template = MARKS_GENERATION.replace(
        "{{- '<turn|>\\n' -}}\n{%- endgeneration -%}", "{%- endgeneration -%}{{- '<turn|>\\n' -}}"
    )
    example = encode(Row("chat", TURNS, "", "rows.jsonl:7"), tokenizer, "assistant")
    assert tokenizer.decode(example.tokens[example.mask]) == "The file is open.<turn|>"


@pytest.mark.parametrize("also", ["user", "system"])
def test_generation_marks_that_disagree_are_refused_with_a_picture(tokenizer, also):
    other = "{{- '<|turn>' + m.role + '\\n' + m.content | trim + '<turn|>\\n' -}}"
    assert other in MARKS_GENERATION
    opened = "{%- if m.role == '" + also + "' -%}{%- generation -%}"
    template = MARKS_GENERATION.replace(
        other, f"{opened}{other}{{%- endgeneration -%}}{{%- else -%}}{other}{{%- endif -%}}"
    )
    found = refused(tokenizer, template).found
    by_markers, by_generation = found.split("\n")[1:]
    assert "by markers" in by_markers and "The file is open." in by_markers
    assert "by {% generation %}" in by_generation and f"<|turn>{also}" in by_generation


def test_generation_marks_that_leave_out_thoughts_agree_where_they_are_masked(tokenizer):
    thought = MARKS_GENERATION[MARKS_GENERATION.index("{%- if m.reasoning_content") :]
    thought = thought[: thought.index("{%- endif -%}") + len("{%- endif -%}\n")]
    tokenizer.chat_template = MARKS_GENERATION.replace(thought, "").replace(
        "{%- generation -%}\n", thought + "{%- generation -%}\n"
    )
    row = Row("chat", (*TURNS[:2], {**TURNS[2], "reasoning": "Easy."}), "", "rows.jsonl:7")
    example = encode(row, tokenizer, "assistant", "mask")
    assert tokenizer.decode(example.tokens[example.mask]) == "The file is open.<turn|>"
    with pytest.raises(DataError, match=r"by {% generation %}"):
        encode(row, tokenizer, "assistant", "keep")


# ---------------------------------------------------------------- tokenizers


def test_a_tokenizer_that_splits_the_markers_is_refused(tokenizer):
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("n<turn|>", normalized=False)])
    error = refused(tokenizer, CHAT_TEMPLATE, {"role": "user", "content": "in"}, TURNS[2])
    assert "the tokenizer joins the chat template's markers with other text" in error.found


def test_a_tokenizer_that_joins_the_header_with_the_answer_is_refused(tokenizer):
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("\nThe", normalized=False)])
    assert "joins" in refused(tokenizer, CHAT_TEMPLATE).found
