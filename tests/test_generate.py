"""`python -m mlx_gemma4.generate`: where prompts come from, which adapter answers, and a chat."""

from __future__ import annotations

import io
import json

import pytest
from helpers import CHAT, make_lora_nonzero

import mlx_gemma4 as g4
from mlx_gemma4 import generate
from mlx_gemma4.errors import run_command
from mlx_gemma4.lora.state import save_adapter

TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> g4.Run:
    """A run of two steps, with its folder."""
    folder = tmp_path_factory.mktemp("run") / "out"
    gemma = g4.load(tiny)
    config = g4.TrainConfig(iters=2, learning_rate=1e-1, batch_size=2)
    lora = g4.LoraConfig(rank=2)
    return g4.finetune(gemma, g4.read(CHAT, gemma), config, lora=lora, output=folder, callbacks=[])


def call(*words: object) -> None:
    generate.main([str(word) for word in words])


def told(capsys, *words: object) -> str:
    """The message of a command that ends with 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: call(*words))
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.startswith("error: ") and not printed.out
    return printed.err


@pytest.fixture
def asked(monkeypatch) -> list:
    """What the model was asked, (prompt, options); it answers "1", "2", ... after a thought."""
    calls = []

    def stream(self, prompt, **options):
        calls.append((json.loads(json.dumps(prompt)), options))
        return iter(["<|channel>", "thought\nhm", "m\n", "<channel|>", str(len(calls))])

    monkeypatch.setattr(g4.Gemma4, "stream", stream)
    return calls


# ---------------------------------------------------------------- the adapter


def test_a_run_its_adapter_and_a_checkpoint_answer_alike_without_model(run, tiny, capsys):
    gemma = g4.load(tiny, adapter=run.output / "adapter")
    wanted = gemma.generate("A list?", max_tokens=8) + "\n"
    assert wanted != g4.load(tiny).generate("A list?", max_tokens=8) + "\n"
    for place in ("", "adapter", "checkpoints/step-000002"):
        call("--adapter", run.output / place, "--prompt", "A list?", "--max-tokens", 8)
        assert capsys.readouterr().out == wanted
    assert g4.load(tiny, adapter=run.output).generate("A list?", max_tokens=8) + "\n" == wanted


@pytest.mark.parametrize("base", ["", 3, ["a/b"]])
def test_an_adapter_that_names_no_base(tiny, tmp_path, capsys, base):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=2))
    make_lora_nonzero(gemma)
    save_adapter(gemma.backbone, tmp_path / "adapter", gemma.lora, base)
    assert "names no base model" in told(capsys, "--adapter", tmp_path, "--prompt", "Hi")


@pytest.mark.parametrize("model", ["../../etc", "a/..", "..", "google/../x", "a/b/../c"])
def test_ids_that_lead_elsewhere(capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = told(capsys, "--model", model, "--prompt", "Hi")
    assert "is no folder" in message or "has no config.json" in message


# ---------------------------------------------------------------- what is asked


def test_several_prompts_are_answered_each_under_its_heading(tiny, asked, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("A file?"))
    call("--model", tiny, "--prompt", "A list?", "-")
    assert capsys.readouterr().out == "== A list?\n1\n\n== A file?\n2\n"
    assert [prompt for prompt, _ in asked] == ["A list?", "A file?"]


def test_thinking_is_asked_for_and_the_thought_is_kept_apart(tiny, asked, capsys):
    call("--model", tiny, "--prompt", "Hi", "--thinking")
    printed = capsys.readouterr()
    assert printed.out == "1\n"
    assert printed.err == "thought: hmm\n\n"
    call("--model", tiny, "--prompt", "Hi")
    assert [options["thinking"] for _, options in asked] == [True, False]


def test_a_conversation_and_tools_from_files(tiny, asked, tmp_path):
    messages = CHAT[1]["messages"][:-1]
    bare, whole, tools = (tmp_path / name for name in ("bare.json", "whole.json", "tools.json"))
    bare.write_text(json.dumps(messages))
    whole.write_text(json.dumps({"messages": messages, "tools": TOOLS}))
    tools.write_text(json.dumps([tool["function"] for tool in TOOLS]))
    call("--model", tiny, "--conversation", bare)
    call("--model", tiny, "--conversation", whole)
    call("--model", tiny, "--conversation", bare, "--tools", tools)
    call("--model", tiny, "--prompt", "Hi", "--tools", tools)
    assert [prompt for prompt, _ in asked] == [messages, messages, messages, "Hi"]
    assert [options["tools"] for _, options in asked] == [None, TOOLS, TOOLS, TOOLS]


FILES = {
    "no list of messages": "{}",
    "cannot be read": "{",
    "the prompt is []": "[]",
    "message 1 (user) is empty": '[{"role": "user", "content": ""}]',
    "has no role": '["Hi"]',
}


@pytest.mark.parametrize("found", FILES)
def test_conversations_that_are_none(tmp_path, capsys, found):
    (tmp_path / "chat.json").write_text(FILES[found])
    assert found in told(capsys, "--model", "m", "--conversation", tmp_path / "chat.json")


def test_what_excludes_each_other_and_what_is_not_there(tmp_path, capsys):
    chat, tools = tmp_path / "chat.json", tmp_path / "tools.json"
    chat.write_text(json.dumps({**CHAT[0], "tools": TOOLS}))
    tools.write_text(json.dumps(TOOLS))
    both = ("--model", "m", "--conversation", chat)
    assert "--prompt and --conversation" in told(capsys, *both, "--prompt", "Hi")
    assert "has tools" in told(capsys, *both, "--tools", tools)
    missing = told(capsys, "--model", "m", "--prompt", "Hi", "--tools", tmp_path / "none")
    assert "--tools names" in missing and "cannot be read" in missing


@pytest.mark.parametrize("prompts", [[""], ["  "], ["Hi", "\n"]])
def test_an_empty_prompt_is_refused_before_a_model_is_looked_for(capsys, prompts):
    assert "is empty" in told(capsys, "--model", "none", "--prompt", *prompts)


def test_without_a_terminal_it_says_what_is_missing(capsys):
    message = told(capsys, "--model", "m")
    assert "--prompt is not given" in message and "--conversation" in message


# ---------------------------------------------------------------- a chat


@pytest.fixture
def chat(monkeypatch, tiny, asked, capsys):
    def talk(*lines: str) -> str:
        left = iter(lines)

        def next_line(prompt):
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", next_line)
        call("--model", tiny, "--system", "Be short.")
        assert next(left, None) is None
        return capsys.readouterr().out

    return talk


def test_a_chat_gives_its_history_back_without_thoughts(chat, asked):
    assert chat("A list?", "", "  And a file? ") == "1\n2\n\n"
    assert [prompt for prompt, _ in asked] == [
        [{"role": "user", "content": "A list?"}],
        [
            {"role": "user", "content": "A list?"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "And a file?"},
        ],
    ]
    assert {options["system"] for _, options in asked} == {"Be short."}


def test_a_chat_begins_anew_and_ends_when_told(chat, asked):
    assert chat("A list?", "/new", "A file?", "/quit") == "1\n2\n"
    assert asked[1][0] == [{"role": "user", "content": "A file?"}]


def test_help_shows_every_way_to_ask(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    shown = capsys.readouterr().out
    for word in ("--thinking", "--tools", "--conversation", "/new", "/quit", "--adapter runs/1"):
        assert word in shown


def test_a_prompt_keeps_its_commas(run, asked):
    call("--adapter", run.output, "--prompt", "one, two", "three,four")
    assert [prompt for prompt, _ in asked] == ["one, two", "three,four"]
