"""Answer prompts with a model and, if one is named, its trained adapter; or chat on a terminal.

    python -m mlx_gemma4.generate --adapter runs/1 --prompt "What is a list comprehension?"
    python -m mlx_gemma4.generate --model google/gemma-4-E2B-it --conversation chat.json
    python -m mlx_gemma4.generate --adapter runs/1

Without a prompt or conversation it is a chat: a line is a turn, /new begins anew, /quit or the end
of input leaves. Answers go to standard output, thoughts to standard error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .config import GenerateConfig, Part, RunConfig, TrainConfig, build, read_arguments
from .errors import ConfigError, run_command
from .model.conversation import Prompt, conversation, functions, mark_thoughts
from .storage import read_json

if TYPE_CHECKING:
    from .gemma import Gemma4


def main(arguments: list[str] | None = None) -> None:
    """Print answers while they are made."""
    values = read_arguments(
        "mlx_gemma4.generate",
        __doc__,
        [
            Part(
                RunConfig,
                "the model",
                only=("model", "quantize", "save_quantized"),
                help={"model": "a model folder or id; default: the one that the adapter names"},
            ),
            Part(GenerateConfig, "the answer"),
            Part(TrainConfig, "sampling", only=("seed",)),
        ],
        arguments,
        usage="[--model MODEL] [--adapter RUN_OR_ADAPTER] [--prompt PROMPT ...] [settings]",
    )
    run, answer, train = build([RunConfig, GenerateConfig, TrainConfig], values, "the flags")
    prompts, tools = _asked(answer)
    if not (run.model or answer.adapter):
        wanted = "a model, or an adapter that names its base"
        raise ConfigError("--model is not given", wanted=wanted, do="give --model or --adapter")

    from .export.fuse import with_quantized_model
    from .gemma import load
    from .lora.state import adapter_folder, base_model_of

    model = run.model or base_model_of(adapter_folder(answer.adapter))
    run = with_quantized_model(replace(run, model=model))
    gemma = load(str(run.model), answer.adapter, quantize=run.quantize)
    same = ("system", "thinking", "max_tokens", "temperature", "top_p")
    options = {name: getattr(answer, name) for name in same} | {"tools": tools, "seed": train.seed}
    if not prompts:
        _chat(gemma, options)
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{chr(10) * (number > 0)}== {prompt}", flush=True)
        _show(gemma.stream(prompt, **options))


def _asked(answer: GenerateConfig) -> tuple[Sequence[Prompt], Any]:
    """The prompts, none for a chat, and the tools; what cannot be used is refused.

    Raises:
        ConfigError: nothing to answer and nobody to chat with, or two at once.
    """
    given_prompts = answer.prompt or ()
    prompts: Sequence[Prompt] = [p if p != "-" else sys.stdin.read() for p in given_prompts]
    tools = _read(answer.tools, "--tools")
    if answer.conversation:
        if prompts:
            found = "--prompt and --conversation are given"
            raise ConfigError(found, wanted="one of them", do="leave one out")
        given: Any = _read(answer.conversation, "--conversation")
        if isinstance(given, dict):
            more = given.get("tools")
            if tools and more:
                found = f"--tools is given, and {answer.conversation} has tools"
                raise ConfigError(found, wanted="tools in one of them", do="leave out --tools")
            given, tools = given.get("messages"), tools or more
        if not isinstance(given, list):
            wanted = 'a list of messages, or {"messages": [...], "tools": [...]}'
            found = f"{answer.conversation} holds no list of messages"
            raise ConfigError(found, wanted=wanted, do="change the file")
        prompts = [given]
    if not prompts and not sys.stdin.isatty():
        wanted = "--prompt, --conversation, or a terminal to chat in"
        raise ConfigError("--prompt is not given", wanted=wanted, do="give --prompt")
    for prompt in prompts:
        conversation(prompt, answer.system)
    return prompts, functions(tools)


def _read(path: str | None, flag: str) -> Any:
    if path is None:
        return None
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        found = f"{flag} names {path}, which cannot be read: {error}"
        raise ConfigError(found, wanted="a JSON file", do=f"change {flag}") from None


def _show(pieces: Iterator[str]) -> str:
    """Print an answer while it is made; without its thought it comes back."""
    said, was_thought = [], False
    for is_thought, text in mark_thoughts(pieces):
        if is_thought != was_thought:
            print("thought: " if is_thought else "\n", end="", file=sys.stderr, flush=True)
        print(text, end="", file=sys.stderr if is_thought else sys.stdout, flush=True)
        was_thought = is_thought
        if not is_thought:
            said.append(text)
    print(flush=True)
    return "".join(said)


def _chat(gemma: Gemma4, options: dict[str, Any]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  which gives input() arrow keys
    print("a line is a turn; /new begins anew, /quit leaves", file=sys.stderr, flush=True)
    history: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            history = []
        elif line:
            history.append({"role": "user", "content": line})
            said = _show(gemma.stream(history, **options))
            history.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    run_command(main)
