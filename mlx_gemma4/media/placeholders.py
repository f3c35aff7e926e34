"""Tokens that stand for media: one each in a template's text, then one for each soft token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import row_error
from .file import MediaFile

_MARKERS = {
    "image": ("<|image>", "<|image|>", "<image|>"),
    "audio": ("<|audio>", "<|audio|>", "<audio|>"),
}
_VIDEO = "<|video|>"


class Placeholders:
    """The opener, token and closer of each kind in a tokenizer."""

    def __init__(self, tokenizer: Any):
        unknown = tokenizer.unk_token_id
        names = [name for markers in _MARKERS.values() for name in markers] + [_VIDEO]
        ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        self._ids = {name: i for name, i in ids.items() if i not in (None, unknown)}
        self._is_medium = np.zeros(len(tokenizer), bool)
        self._is_medium[list(self._ids.values())] = True

    def among(self, tokens: np.ndarray) -> np.ndarray:
        """For each token whether it is of media, openers and closers included."""
        return self._is_medium[tokens]

    def require(self, tokens: np.ndarray, kinds: Sequence[str]) -> None:
        """Refuse tokens of media that are not those of media of these kinds, in this order.

        Raises:
            DataError: other tokens, which are then the text's own.
        """
        wanted = [self._ids.get(_MARKERS[kind][1], -1) for kind in kinds]
        found = tokens[self.among(tokens)]
        if found.tolist() != wanted:
            count = " and ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
            told = (
                f"has {count or 'no'} parts of media, and {len(found)} tokens of media in its text"
            )
            do = f"remove {' '.join(self._ids)} from the row's text"
            raise row_error(told, "a template that writes one token for each", do)

    def expanded(
        self, tokens: np.ndarray, files: Sequence[MediaFile]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens with an opener, a token for each soft token, and a closer; after `require`.

        Returns:
            (the tokens, and for each given token how many stand for it).
        """
        places = np.flatnonzero(self.among(tokens))
        sizes = np.array([file.num_tokens + 2 for file in files], int)
        counts = np.ones(len(tokens), int)
        counts[places] = sizes
        expanded, ends = np.repeat(tokens, counts), np.cumsum(counts)[places]
        markers = [_MARKERS[file.kind] for file in files]
        expanded[ends - 1] = [self._ids[closer] for _, _, closer in markers]
        expanded[ends - sizes] = [self._ids[opener] for opener, _, _ in markers]
        return expanded, counts
