"""A prompt with media -> token ids and what the encoders take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..model.processor import MediaSettings
from .kinds import content_of, encoder_inputs, kept, media_file
from .placeholders import Placeholders


def expanded_prompt(
    tokens: Sequence[int], parts: Sequence[tuple[str, Any]], tokenizer: Any, settings: MediaSettings
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Token ids (T,) with a token for each soft token, and `Batch`'s inputs of the media.

    Args:
        tokens: as the chat template writes them.
        parts: kind and path, content or object of each medium, in the order of its token.

    Raises:
        ConfigError: a file that cannot be used, or a model that does not take its kind.
    """
    ids, placeholders = np.array(tokens), Placeholders(tokenizer)
    try:
        placeholders.require(ids, [kind for kind, _ in parts])
        files = [media_file(kind, _path(kind, value), settings) for kind, value in parts]
        room = {
            kind: (len(own), max(own))
            for kind in dict.fromkeys(kind for kind, _ in parts)
            if (own := [file.num_tokens for file in files if file.kind == kind])
        }
        inputs = encoder_inputs(files, settings, room)
    except DataError as error:
        raise ConfigError(error.found, wanted=error.wanted, do="change the prompt") from None
    expanded, _ = placeholders.expanded(ids, files)
    if "image" in room:
        types = expanded == settings.of("image").token
        inputs["mm_token_type_ids"] = types.astype(np.int32)[None]
    return expanded, inputs


def _path(kind: str, value: Any) -> str:
    content = content_of(kind, value)
    path = Path(str(value)).expanduser() if content is None else kept(kind, content)
    if not path.is_file():
        raise DataError(f"there is no {kind} {str(value)[:200]}", wanted="a file", do="")
    return str(path)
