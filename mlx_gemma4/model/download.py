"""A folder, or what the Hugging Face Hub has under an id: the one place that downloads models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..trust import require_harmless
from .plan import read_config

SIDE_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""What a model folder of this family has beside its weights; nothing else is fetched or copied."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def resolve(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model, downloaded from the Hugging Face Hub if it is not a folder.

    Args:
        weights: download the tensors too, beside config, tokenizer and template.

    Raises:
        ModelError: neither a folder nor a model that the Hub gives.
    """
    return _folder(path_or_hub_id, SIDE_FILES + (_WEIGHTS if weights else ()))


def fetch_config(path_or_hub_id: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model; nothing else is downloaded.

    Raises:
        ModelError: neither a folder nor a model that the Hub gives, or no JSON object.
    """
    return read_config(_folder(path_or_hub_id, ("config.json",)))


def _folder(path_or_hub_id: str | Path, names: Sequence[str]) -> Path:
    folder = Path(path_or_hub_id).expanduser()
    try:
        there = folder.is_dir()
    except (OSError, ValueError):  # no path at all: too long, or with a null byte
        there = False
    if not there:
        folder = _download(str(path_or_hub_id), names)
    require_harmless(folder)
    return folder


def _download(hub_id: str, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import HfHubHTTPError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(names)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{hub_id} is no folder, and the Hub did not give it: {reason}",
            wanted="a model folder or a Hugging Face id, such as google/gemma-4-E2B-it",
            do="check the spelling, the network, and `hf auth login` for gated models",
        ) from None
