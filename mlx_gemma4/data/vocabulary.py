"""What a tokenizer makes of a rendered conversation: tokens, and where the markers are in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DataError
from .spans import MARKERS, TURN, Mark, find_marks

__all__ = ["Vocabulary"]


class Vocabulary:
    """A tokenizer, and what of it every row asks for.

    Attributes:
        tokenizer: of the model.
        bos, eos: how texts begin and end.
        header: tokens of "model" and the line's end, which stand after `<|turn>`.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token, tokenizer.eos_token
        self._bos_id, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
        ids = {marker: tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS}
        self._ids = {marker: i for marker, i in ids.items() if i not in (None, unknown)}
        self._is_marker = np.zeros(len(tokenizer), bool)
        self._is_marker[list(self._ids.values())] = True
        self.header = self.tokenize([TURN + "model\n"])[0].tolist()[1:]

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        """The ids that `tokenizer(texts)` gives, without the lists that nobody reads."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def require_one_bos(self, tokens: np.ndarray, origin: str) -> None:
        """Refuse a row unless its first token, and no other, is `<bos>`."""
        count = np.count_nonzero(tokens == self._bos_id)
        if count != 1 or tokens[0] != self._bos_id:
            raise DataError(
                f"{origin} has {count} {self.bos} tokens when rendered",
                wanted="one, at the start",
                do=f"remove {self.bos} from the row's text" if count else "use Gemma 4's template",
            )

    def locate(self, text: str, tokens: np.ndarray, origin: str) -> list[Mark]:
        """The markers of a text with their tokens: the nth marker is the nth such token.

        Raises:
            DataError: a marker is joined with other text, or a model turn's opening with what
                follows it.
        """
        marks = [mark for mark in find_marks(text) if mark.marker in self._ids]
        places = np.flatnonzero(self._is_marker[tokens])
        whole = [self._ids[mark.marker] for mark in marks] == tokens[places].tolist()
        marks = [Mark(m.marker, m.char, place) for m, place in zip(marks, places.tolist())]
        if not whole or not all(self._header_is_whole(text, tokens, mark) for mark in marks):
            raise DataError(
                f"{origin}: the tokenizer joins the chat template's markers with other text",
                wanted=f"a token for each of {' '.join(MARKERS)}, and for what stands between them",
                do="use the tokenizer of the checkpoint",
            )
        return marks

    def _header_is_whole(self, text: str, tokens: np.ndarray, mark: Mark) -> bool:
        """Whether a model turn's text begins at a token of its own, or with white space."""
        if mark.marker != TURN or not text.startswith("model\n", mark.end):
            return True
        first = mark.token + 1
        written = tokens[first : first + len(self.header)].tolist()
        answer = mark.end + len("model\n")
        return written == self.header or text[answer : answer + 1].isspace()
