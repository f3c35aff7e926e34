"""The text side of a checkpoint: tokenizer, processor, prompts, and what ends an answer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, damaged
from ..storage import read_json
from .conversation import Prompt, conversation, functions
from .download import resolve
from .plan import Plan, read_config
from .processor import NO_MEDIA, MediaSettings, read_media_settings

END_OF_TURN = "<turn|>"
_ENDS = (END_OF_TURN, "<|tool_response>")  # what follows a call is not the model's to write

TEMPLATE_ERRORS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template may raise, besides Jinja's own errors."""


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a checkpoint folder, with its chat template.

    Raises:
        ModelError: no tokenizer files, or files that cannot be read.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        raise damaged(
            f"{folder} has no tokenizer.json",
            "tokenizer.json, tokenizer_config.json and chat_template.jinja",
            "copy the tokenizer files of the original checkpoint into the folder",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # anything: another library reads files that may be broken
        found = f"the tokenizer of {folder} cannot be read: {error}"
        raise damaged(found, "the tokenizer files of the original checkpoint") from None


def load_processor(folder: Path) -> Any:
    """mlx-vlm's processor of a checkpoint folder, for images and audio."""
    import mlx_vlm.models.gemma4  # noqa: F401  registers the processor class
    from mlx_vlm.utils import load_processor as load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of mel filters that are all zero
            return load(folder, trust_remote_code=False)
    except Exception as error:
        found = f"the processor of {folder} cannot be read: {error}"
        raise damaged(found, "processor_config.json beside the tokenizer files") from None


def prompt_tokens(
    tokenizer: Any,
    prompt: Prompt,
    *,
    system: str | None = None,
    tools: Any = None,
    thinking: bool = False,
) -> list[int]:
    """Token ids of a prompt up to where the model answers, by the chat template.

    Args:
        prompt: what the user says, or messages.
        system: what a system turn before them says.
        tools: the tools that the model may call, in OpenAI's form.
        thinking: let the model think before it answers. The template is told either way, since
            what it does untold is not the same in every template.

    Raises:
        ConfigError: a prompt that asks nothing, or is none.
        ModelError: there is no template, or it refuses the conversation.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template",
            wanted="chat_template.jinja, as the instruction-tuned (-it) checkpoints have it",
            do="name an instruction-tuned checkpoint, or copy its chat_template.jinja",
        )
    messages, known = conversation(prompt, system), functions(tools)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages,
            tools=known,
            enable_thinking=thinking,
            add_generation_prompt=True,
            return_dict=False,
        )
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        raise ModelError(
            f"the model's chat template refuses the conversation: {' '.join(str(error).split())}",
            wanted="a template that renders it",
            do="change the conversation, or take chat_template.jinja of the original checkpoint",
        ) from None
    return ids


def end_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> set[int]:
    """Ids on which generation stops: those that the checkpoint names, and ends of turns."""
    named: list[Any] = [config.get("eos_token_id"), tokenizer.eos_token_id]
    path = folder / "generation_config.json"
    if path.exists():
        try:
            named.append(read_json(path).get("eos_token_id"))
        except (OSError, ValueError, AttributeError) as error:
            raise damaged(
                f"{path} cannot be read: {error}",
                "a JSON object",
                "download it again, or remove it",
            ) from None
    ids = {i for entry in named for i in (entry if isinstance(entry, list) else [entry])}
    turns = {tokenizer.convert_tokens_to_ids(end) for end in _ENDS}
    return (ids | turns) - {None, tokenizer.unk_token_id}


@dataclass(frozen=True)
class TextSide:
    """The plan and the tokenizer of a model, and how it takes media."""

    plan: Plan
    tokenizer: Any
    media: MediaSettings = NO_MEDIA


def text_side(path_or_hub_id: str | Path) -> TextSide:
    """Plan and tokenizer of a model; its weights are neither downloaded nor read.

    Raises:
        ModelError: not a Gemma 4, or without a tokenizer that can be read.
    """
    folder = resolve(path_or_hub_id, weights=False)
    plan = Plan.from_config(read_config(folder))
    return TextSide(plan, load_tokenizer(folder), read_media_settings(folder, plan))
