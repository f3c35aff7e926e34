"""The trust boundary: a folder that comes in is looked at here before anything else reads it.

Models, adapters, checkpoints and rows are made by strangers, and the libraries that load models
have ways to run code that a folder brings along. Nothing of Gemma 4 needs that: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import Gemma4Error, ModelError
from .storage import read_json

_CODE_KEYS = ("auto_map", "model_file", "custom_pipelines", "custom_generate")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What trainers of torch leave beside an adapter; nothing here or in a proof reads it.
_NEVER_READ = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# Vocabularies and weight maps: large, and no library takes code from them.
_NO_CONFIG = ("tokenizer.json", "vocab.json", ".index.json")


def require_harmless(folder: Path, kind: type[Gemma4Error] = ModelError) -> None:
    """Refuse a folder that brings code or reads files outside of it.

    Args:
        folder: of a model, an adapter or a checkpoint.
        kind: the class of the error.

    Raises:
        Gemma4Error: a config that names code, a pickle, or a link that leaves the folder; the
            message names the file.
    """
    for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        require_inside(path, folder, kind)
        stem, suffix = path.name.split(".")[0], path.suffix.lower()
        if suffix in _PICKLES and not stem.startswith(_NEVER_READ) and path.is_file():
            raise kind(
                f"{path} is a pickle, which can run code when it is read",
                wanted="weights as safetensors",
                do="save them so with the library that made them, and remove the file",
            )
        if suffix == ".json" and not path.name.endswith(_NO_CONFIG):
            for what in _code_named_by(path):
                raise kind(
                    f"{path} asks to run code: {what}",
                    wanted="a config that names none; Gemma 4 needs no code of its folder",
                    do="take the original files, or remove that entry if you know what it is",
                )


def require_inside(path: Path, folder: Path, kind: type[Gemma4Error]) -> None:
    """Refuse a link that leads out of its folder; the blobs of the Hub's cache are part of it."""
    if not path.is_symlink():
        return
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        target = Path("/")
    if not any(target.is_relative_to(root) for root in allowed):
        raise kind(
            f"{path} is a link that leaves its folder",
            wanted="files of the folder itself",
            do="copy the file into the folder, if you know what it is",
        )


def require_plain_name(name: Any, told: str, kind: type[Gemma4Error]) -> str:
    """A file's name that a file gives; one that leads elsewhere is refused.

    Args:
        told: where it stands, for the message.
    """
    if not isinstance(name, str) or not name or set("/\\\0") & set(name) or name in (".", ".."):
        raise kind(
            f"{told} names the file {str(name)[:100]!r}",
            wanted="names of files in the same folder",
            do="take the original file",
        )
    return name


def _code_named_by(path: Path) -> Iterator[str]:
    """Entries of a JSON file that make some library run code. A broken file is its reader's."""
    try:
        entries = [("", read_json(path))]
    except (OSError, ValueError):
        return
    while entries:
        key, value = entries.pop()
        if key in _CODE_KEYS and value:
            yield f"{key} {str(value)[:100]}"
        elif isinstance(value, str) and value.endswith(".py"):
            yield f"{key} {value[:100]!r}"
        elif isinstance(value, dict):
            entries += value.items()
        elif isinstance(value, list):
            entries += [(key, item) for item in value]
