"""The code of a model card runs, and makes the prompts of training."""

from __future__ import annotations

import importlib
import re
import shlex
from types import SimpleNamespace

import pytest
from adapters import KINDS, trained

from mlx_gemma4.export import export
from mlx_gemma4.export.hub import model_card
from mlx_gemma4.model.tokenizer import prompt_tokens

QUESTION = "..."  # as the card has it


@pytest.fixture
def exported(others, tmp_path, monkeypatch):
    """A function: the card of an export whose base and repository are folders at hand."""
    gemma = trained(others["dense"], KINDS["lora"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").symlink_to(others["dense"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo: str(tmp_path / repo))

    def card(format: str) -> str:
        export(gemma, tmp_path / "out", format, verify=False)
        return model_card(tmp_path / "out", "out")

    card.wanted = prompt_tokens(gemma.tokenizer, QUESTION)
    card.default = prompt_tokens(gemma.tokenizer, QUESTION, thinking=True)
    return card


def code(card: str, language: str, library: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)
    return next(block for block in blocks if library in block)


@pytest.mark.parametrize("format", ["mlx-lm", "fused"])
def test_python_for_mlx_lm_makes_our_prompt(exported, monkeypatch, format):
    asked = []
    monkeypatch.setattr("mlx_lm.generate", lambda model, tokenizer, prompt: asked.append(prompt))
    exec(code(exported(format), "python", "mlx_lm"), {})
    assert asked == [exported.wanted]


@pytest.mark.parametrize("format", ["mlx-lm", "fused"])
def test_the_command_of_mlx_lm_makes_our_prompt(exported, tmp_path, monkeypatch, format):
    line = code(exported(format), "bash", "mlx_lm.generate").replace("\\\n", "")
    words = shlex.split(line[line.index("mlx_lm") :])
    words = [str(tmp_path / "out") if word == "adapter" else word for word in words]
    library, asked = importlib.import_module("mlx_lm.generate"), []
    monkeypatch.setattr(library, "generate", lambda *them, **_: asked.append(list(them[2])) or "")
    for given in (words, words[: words.index("--chat-template-config")]):
        monkeypatch.setattr("sys.argv", given)
        library.main()
    assert asked == [exported.wanted, exported.default]
    assert exported.wanted != exported.default


@pytest.mark.parametrize("format", ["mlx-vlm", "fused"])
def test_python_for_mlx_vlm_tells_the_template(exported, monkeypatch, format):
    """Whose templates take content in parts, which ours does not: the option alone is looked at."""
    told, thing = [], SimpleNamespace(config={}, text="")
    monkeypatch.setattr("mlx_vlm.load", lambda *_, **__: (thing, thing))
    monkeypatch.setattr("mlx_vlm.generate", lambda *_: thing)
    monkeypatch.setattr("mlx_vlm.apply_chat_template", lambda *_, **options: told.append(options))
    exec(code(exported(format), "python", "mlx_vlm"), {})
    assert told == [{"enable_thinking": False}]


@pytest.mark.parametrize("format", ["peft", "fused"])
def test_python_for_transformers_makes_our_prompt(exported, format):
    """From the tokenizer on; the models' classes want torch."""
    block = code(exported(format), "python", "transformers")
    base = {"peft": "dense", "fused": "out"}[format]
    assert f'tokenizer = AutoTokenizer.from_pretrained("{base}")' in block
    lines = "from transformers import AutoTokenizer\n" + block[block.index("tokenizer = ") :]
    names = {}
    exec(lines, names)
    prompt = names["prompt"]
    assert list(prompt if isinstance(prompt, list) else prompt["input_ids"]) == exported.wanted
