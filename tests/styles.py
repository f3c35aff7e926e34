"""Chat templates of several styles, and in Python what each of them should render.

A style's `pieces` is written from the template's description, not from the code under test: a list
of (text, kind), where kind is what the model says ("text", "call", "thought", "end") or None.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.model.tiny import CHAT_TEMPLATE

Piece = tuple[str, str | None]

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
AGENT = (
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "", "reasoning": "I add.", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3.", "reasoning": "Done."},
    {"role": "user", "content": "Thanks. And 2 + 2?"},
    {"role": "assistant", "content": "It is 4.", "reasoning": "Easy."},
)
"""A conversation with reasoning, a call of a tool and a second question."""


def row(*messages: dict, tools: tuple[dict, ...] = ()) -> Row:
    return Row("tools" if tools else "chat", messages, "", "rows.jsonl:7", tools)


@dataclass(frozen=True)
class Style:
    """A template, what it renders of (messages, tools), and whether it knows of tools."""

    template: str
    pieces: Callable[[list[dict], list[dict]], list[Piece]]


def value(it) -> str:
    return f'<|"|>{it}<|"|>' if isinstance(it, str) else json.dumps(it)


def call(tool_call: dict) -> str:
    function = tool_call["function"]
    arguments = sorted(function["arguments"].items(), key=lambda pair: pair[0].lower())
    inner = ",".join(f"{key}:{value(it)}" for key, it in arguments)
    return f"<|tool_call>call:{function['name']}{{{inner}}}<tool_call|>"


# ---------------------------------------------------------------- ours


def ours(messages: list[dict], tools: list[dict], calls_first: bool = False) -> list[Piece]:
    """Tool results within the model's turn, thoughts of all turns, text before calls."""
    thinks = any(turn.get("reasoning") for turn in messages)
    pieces: list[Piece] = [("<bos>", None)]
    system = messages[0] if messages[0]["role"] == "system" else None
    if system or tools or thinks:
        text = "<|turn>system\n" + "<|think|>\n" * thinks
        text += system["content"].strip() if system else ""
        for tool in tools:
            declared = json.dumps(tool["function"], ensure_ascii=False)
            text += f"<|tool>declaration:{declared}<tool|>"
        pieces.append((text + "<turn|>\n", None))
    turns = messages[1:] if system else messages
    for i, turn in enumerate(turns):
        before = turns[i - 1]["role"] if i else None
        after = turns[i + 1]["role"] if i + 1 < len(turns) else None
        if turn["role"] == "user":
            pieces.append((f"<|turn>user\n{turn['content'].strip()}<turn|>\n", None))
        elif turn["role"] == "tool":
            follows_call = before == "assistant" and not (
                calls_first and turns[i - 1]["content"].strip()
            )
            pieces.append(("<|tool_response>", "end" if follows_call else None))
            text = f"response:{turn['name']}{{value:{value(turn['content'])}}}<tool_response|>"
            pieces.append((text + "<turn|>\n" * (after == "user"), None))
        else:
            if before != "tool":
                pieces.append(("<|turn>model\n", None))
            if turn.get("reasoning"):
                thought = f"<|channel>thought\n{turn['reasoning'].strip()}\n<channel|>"
                pieces.append((thought, "put in" if calls_first else "thought"))
            text = [(turn["content"].strip(), "text")]
            calls = [(call(one), "call") for one in turn.get("tool_calls", ())]
            pieces += calls + text if calls_first else text + calls
            if turn.get("tool_calls") and not after:
                pieces.append(("<|tool_response>", "end"))
            elif after != "tool":
                pieces += [("<turn|>", "end"), ("\n", None)]
    return pieces


EMPTY_THOUGHT = "<|channel>thought\n<channel|>"

# The larger members open the answer that is asked for with an empty thought.
EMPTY_THOUGHT_PROMPT = CHAT_TEMPLATE.replace(
    "{{- '<|turn>model\\n' -}}", "{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}"
)
assert EMPTY_THOUGHT_PROMPT != CHAT_TEMPLATE


# As the released templates have it: calls, results, then the text without the channels in it. No
# thought is written at all.
_THOUGHT = "{{- '<|channel>thought\\n' + message['reasoning_content'] | trim + '\\n<channel|>' -}}"
_CONTENT = "{{- message['content'] | trim -}}\n"
_AFTER_CALLS = "{%- if message['tool_calls'] and not follows"
assert all(CHAT_TEMPLATE.count(part) == 1 for part in (_THOUGHT, _CONTENT, _AFTER_CALLS))
SHOWS_NONE = CHAT_TEMPLATE.replace(_THOUGHT, "").replace(_CONTENT, "").replace(
    _AFTER_CALLS,
    "{{- (message['content'].split('<channel|>') | last if message['role'] == 'assistant' "
    "else message['content']) | trim -}}\n" + _AFTER_CALLS,
)  # fmt: skip


def shows_none(messages: list[dict], tools: list[dict]) -> list[Piece]:
    """As ours, and calls stand before the text; every thought is put in, before both."""
    return ours(messages, tools, calls_first=True)


# ---------------------------------------------------------------- earlier thoughts are stripped

STRIPS_EARLIER_THOUGHTS = """\
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for tool in tools or [] -%}
{{- '<|turn>developer\\n<|tool>' + tool | tojson + '<tool|><turn|>\\n' -}}
{%- endfor -%}
{%- for m in messages -%}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
{%- if m.reasoning and loop.index0 > last.user -%}
{{- '<|channel>thought\\n' + m.reasoning + '<channel|>' -}}
{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{{- '<|tool_call>' + call.function | tojson + '<tool_call|>' -}}
{%- endfor -%}
{{- m.content + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def strips(messages: list[dict], tools: list[dict]) -> list[Piece]:
    """A turn for each message, nothing trimmed; its own thoughts follow the last question."""
    asked = max((i for i, turn in enumerate(messages) if turn["role"] == "user"), default=-1)
    pieces: list[Piece] = [("<bos>", None)]
    for tool in tools:
        declared = json.dumps(tool, ensure_ascii=False)
        pieces.append((f"<|turn>developer\n<|tool>{declared}<tool|><turn|>\n", None))
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            pieces.append((f"<|turn>{turn['role']}\n{turn['content']}<turn|>\n", None))
            continue
        pieces.append(("<|turn>model\n", None))
        if turn.get("reasoning") and i > asked:
            pieces.append((f"<|channel>thought\n{turn['reasoning']}<channel|>", "thought"))
        elif turn.get("reasoning"):
            thought = f"<|channel>thought\n{turn['reasoning'].strip()}\n<channel|>"
            pieces.append((thought, "put in"))
        for one in turn.get("tool_calls", ()):
            written = json.dumps(one["function"], ensure_ascii=False)
            pieces.append((f"<|tool_call>{written}<tool_call|>", "call"))
        pieces += [(turn["content"], "text"), ("<turn|>", "end"), ("\n", None)]
    return pieces


# ---------------------------------------------------------------- {% generation %}

MARKS_GENERATION = """\
{{- bos_token -}}
{%- if tools -%}{{- '<|turn>system\\n' + tools | tojson + '<turn|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|turn>model\\n' -}}
{%- generation -%}
{%- if m.reasoning_content -%}
{{- '<|channel>thought\\n' + m.reasoning_content | trim + '<channel|>' -}}
{%- endif -%}
{{- m.content | trim -}}
{%- for call in m.tool_calls or [] -%}
{{- '<|tool_call>' + call.function.name + call.function.arguments | tojson + '<tool_call|>' -}}
{%- endfor -%}
{{- '<turn|>\\n' -}}
{%- endgeneration -%}
{%- else -%}
{{- '<|turn>' + m.role + '\\n' + m.content | trim + '<turn|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def marks(messages: list[dict], tools: list[dict]) -> list[Piece]:
    """A turn for each message, and what is generated marked, with the line after its end."""
    pieces: list[Piece] = [("<bos>", None)]
    if tools:
        declared = json.dumps(tools, ensure_ascii=False)
        pieces.append((f"<|turn>system\n{declared}<turn|>\n", None))
    for turn in messages:
        text = turn["content"].strip()
        if turn["role"] != "assistant":
            pieces.append((f"<|turn>{turn['role']}\n{text}<turn|>\n", None))
            continue
        pieces.append(("<|turn>model\n", None))
        if turn.get("reasoning"):
            thought = f"<|channel>thought\n{turn['reasoning'].strip()}<channel|>"
            pieces.append((thought, "thought"))
        pieces.append((text, "text"))
        for one in turn.get("tool_calls", ()):
            arguments = json.dumps(one["function"]["arguments"], ensure_ascii=False)
            written = one["function"]["name"] + arguments
            pieces.append((f"<|tool_call>{written}<tool_call|>", "call"))
        pieces += [("<turn|>", "end"), ("\n", None)]
    return pieces


STYLES = {
    "ours": Style(CHAT_TEMPLATE, ours),
    "prompt with an empty thought": Style(EMPTY_THOUGHT_PROMPT, ours),
    "no thoughts, calls first": Style(SHOWS_NONE, shows_none),
    "earlier thoughts stripped": Style(STRIPS_EARLIER_THOUGHTS, strips),
    "generation marked": Style(MARKS_GENERATION, marks),
}
