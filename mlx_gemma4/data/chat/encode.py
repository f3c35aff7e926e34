"""Rows -> token ids and loss masks, through the model's own chat template.

The tokens are those of `apply_chat_template` (render.py). What the model says in them is read from
the markers around its turns, and held against the row (spans.py). An answer then begins as the
generation prompt begins it (prompt.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...config import DataConfig
from ...errors import DataError
from ...media.file import MediaFile
from ...media.kinds import media_file
from ...media.placeholders import Placeholders
from ...model.conversation import media_of
from ...model.processor import NO_MEDIA, MediaSettings
from ..example import Example, Facts, Store, origin_of
from ..read.records import Raw, located, row_error
from . import spans
from .formats import row_of
from .prompt import opening, prompt_difference
from .render import Rendering, render
from .spans import MARKERS, TURN, Mark, Span

_CHECKPOINT = "use the tokenizer of the checkpoint"


@dataclass(frozen=True)
class Task:
    """What does not change from row to row: ids at or above `vocab_size` are refused.

    `media` says how the model takes images and audio.
    """

    tokenizer: Any
    vocab_size: int
    config: DataConfig
    media: MediaSettings = NO_MEDIA


@dataclass(frozen=True)
class Chunk:
    """Some raw rows of one source, each with its number, which follows `place` in messages.

    Paths of media begin in `folder`.
    """

    place: str
    folder: Path | None
    rows: list[tuple[int, Raw]]


def encode_chunk(task: Task, chunk: Chunk) -> Store:
    """The examples of some rows, tokenized in one call; rows that cannot be used are facts."""
    config, facts, encoder = task.config, Facts(), Encoder(task)
    errors: dict[int, DataError] = {}
    rendered: dict[int, Rendering] = {}
    for i, (number, raw) in enumerate(chunk.rows):
        try:
            row = row_of(raw, origin_of(chunk.place, number), config, chunk.folder)
            with located(row.origin):
                rendered[i] = render(row, task.tokenizer, config.thinking, encoder.ends)
        except DataError as error:
            errors[i] = error
    tokens = encoder.tokenize([rendering.text for rendering in rendered.values()])
    examples: dict[int, Example] = {}
    for (i, rendering), ids in zip(rendered.items(), tokens):
        try:
            with located(rendering.row.origin):
                example = encoder.example(rendering, ids, facts.notes)
                whole = encoder.with_media(example, rendering, facts.notes)
                fitted = _fit(whole, task, encoder)
        except DataError as error:
            errors[i] = error
            continue
        if rendering.messages and not facts.prompts:
            told = prompt_difference(rendering, example, task.tokenizer, encoder.tokenize)
            if told and config.answer_start == "template":
                told += "; answer_start: prompt makes them agree"
            facts.prompts = [told]
        facts.shapes[rendering.row.shape] += 1
        if any(map(_is_empty, rendering.messages)):
            facts.add(Facts(empty=1, empty_rows=[example.origin]))
        if fitted is None:
            facts.skipped += 1
        else:
            facts.truncated += fitted is not whole
            examples[i] = fitted
    bad = [errors[i] for i in sorted(errors)]
    remedy = [bad[0].wanted, bad[0].do] if bad else []
    facts.add(Facts(bad=len(bad), bad_rows=[error.found for error in bad], remedy=remedy))
    numbers = [chunk.rows[i][0] for i in examples]
    return Store.of([*examples.values()], numbers, facts, chunk.place)


def _is_empty(turn: dict[str, Any]) -> bool:
    """Whether a turn is a learned answer that says nothing and calls nothing."""
    is_learned = turn["role"] == "assistant" and turn.get("train", True)
    return is_learned and not turn["content"].strip() and not turn.get("tool_calls")


def _fit(example: Example, task: Task, encoder: Encoder) -> Example | None:
    """The example within max_seq_length, or None to skip it."""
    highest, length = int(example.tokens.max()), task.config.max_seq_length
    if highest >= task.vocab_size:
        wanted = f"ids below {task.vocab_size}, the model's vocabulary"
        raise row_error(f"has the token id {highest}", wanted, _CHECKPOINT)
    if len(example) <= length:
        return example
    if task.config.overlong == "skip":
        return None
    if task.config.overlong == "error":
        do = "raise max_seq_length, or set overlong to skip or truncate"
        raise row_error(f"has {len(example):,} tokens", f"at most max_seq_length, {length:,}", do)
    kept = np.arange(length)
    if task.config.truncate_from == "start":
        kept[1:] += len(example) - length
    cut = replace(example, tokens=example.tokens[kept], mask=example.mask[kept])
    if example.media:
        media = encoder.media_within(example, kept)
        if media is None:
            return None
        cut = replace(cut, media=media)
    return cut if cut.num_targets else None


class Encoder:
    """A tokenizer, what of it every row asks for, and which tokens are targets.

    Of a text row every token is a target; of a conversation what the model says: text, reasoning
    and tool calls, with the tokens that end a turn or hand over to a tool. `train_on` and
    `thinking` of the settings narrow that, and a turn with `"train": False` never is a target.
    """

    def __init__(self, task: Task):
        tokenizer, config = task.tokenizer, task.config
        self._tokenizer = tokenizer
        self._train_on, self._thinking = config.train_on, config.thinking
        self._opens = config.answer_start == "prompt"
        self._openings: dict[Any, np.ndarray] = {}
        self.ends = tokenizer.bos_token, tokenizer.eos_token  # it takes its time to give them
        self._bos_id, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
        ids = {marker: tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS}
        self._ids = {marker: i for marker, i in ids.items() if i not in (None, unknown)}
        self._is_marker = np.zeros(len(tokenizer), bool)
        self._is_marker[list(self._ids.values())] = True
        self._media, self._placeholders = task.media, Placeholders(tokenizer)
        # The tokens of "model" and the line's end, which stand after `<|turn>`.
        self._header = self.tokenize([TURN + "model\n"])[0].tolist()[1:]

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        """The ids that `tokenizer(texts)` gives, without the lists that nobody reads."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def example(self, rendering: Rendering, tokens: np.ndarray, notes: Counter[str]) -> Example:
        """A rendering and its tokens as an example; what a person should know goes into `notes`.

        A DataError says that there is no target, or that the model's turns are not the row's.
        """
        count, bos = np.count_nonzero(tokens == self._bos_id), self.ends[0]
        if count != 1 or tokens[0] != self._bos_id:
            do = f"remove {bos} from the row's text" if count else "use Gemma 4's template"
            raise row_error(f"has {count} {bos} tokens when rendered", "one, at the start", do)
        mask = np.ones(len(tokens), bool)
        if rendering.messages:
            tokens, mask = self._conversation(rendering, tokens)
        told = {
            "answers that begin with <think>, which was read as reasoning": rendering.tagged,
            "texts of reasoning left out, as thinking is drop": rendering.removed,
            "rows with markers of the chat template in their own text": int(bool(rendering.quoted)),
        }
        notes.update({what: count for what, count in told.items() if count})
        return Example(tokens, mask, rendering.row.origin)

    def with_media(self, example: Example, rendering: Rendering, notes: Counter[str]) -> Example:
        """The example with as many tokens of media as there are soft tokens, none a target.

        Raises:
            DataError: a file that cannot be read, or tokens of media that are the row's text.
        """
        parts = media_of(rendering.messages)
        self._placeholders.require(example.tokens, [kind for kind, _ in parts])
        if not parts:
            return example
        files = tuple(media_file(kind, path, self._media, notes) for kind, path in parts)
        tokens, counts = self._placeholders.expanded(example.tokens, files)
        mask = np.repeat(example.mask, counts) & ~self._placeholders.among(tokens)
        return Example(tokens, mask, example.origin, files)

    def media_within(self, example: Example, kept: np.ndarray) -> tuple[MediaFile, ...] | None:
        """The media whose tokens are all kept; None if a cut goes through one, or its opener."""
        places = np.flatnonzero(self._placeholders.among(example.tokens))
        stays, end, media = np.isin(places, kept), 0, []
        for file in example.media:
            start, end = end, end + file.num_tokens + 2
            if stays[start:end].all():
                media.append(file)
            elif stays[start:end].any():
                return None
        return tuple(media)

    def _conversation(
        self, rendering: Rendering, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loss mask of a conversation."""
        marks, turns = self._turns(rendering.text, rendering.quoted, tokens)
        may_train = spans.check_against_row(rendering.messages, turns)
        if rendering.generated:
            self._check_generated(*rendering.generated)
        silent = self._silent(turns)
        mask = np.full(len(tokens), self._train_on == "all")
        for span in self._chosen(turns, rendering.text, marks):
            mask[span.first : span.last] |= span.kind != "response"
        untrained = chain(*(turn for turn, trained in zip(turns, may_train) if not trained))
        for span in (*silent, *untrained):
            mask[span.first : span.last] = False
        if not mask[1:].any():
            raise row_error("has no target token", "an assistant turn to learn")
        return self._begun(rendering, turns, tokens, mask)

    def _turns(
        self, text: str, quoted: frozenset[int], tokens: np.ndarray
    ) -> tuple[list[Mark], list[list[Span]]]:
        """The markers of a text that decide who speaks, and the model's turns."""
        marks = [mark for mark in self._locate(text, tokens) if mark.char not in quoted]
        return marks, spans.model_turns(text, marks, len(tokens), len(self._header))

    def _silent(self, turns: list[list[Span]]) -> list[Span]:
        """Thoughts that are no target."""
        thoughts = (span for span in chain(*turns) if span.kind == "thought")
        return [span for span in thoughts if self._thinking == "mask" or not span.text]

    def _check_generated(self, text: str, quoted: frozenset[int], generated: Sequence[int]) -> None:
        """Hold a template's own rendering against what it marks as generated."""
        [tokens] = self.tokenize([text])
        _, turns = self._turns(text, quoted, tokens)
        silent = self._silent(turns)
        spans.check_against_generation(tokens, turns, silent, generated, self._tokenizer)

    def _begun(
        self, rendering: Rendering, turns: list[list[Span]], tokens: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask in which trained answers begin as the generation prompt begins them.

        The empty thought that it writes is context. A turn that has a thought keeps its own.
        """
        if not self._opens:
            return tokens, mask
        key = repr([*rendering.options.items()][1:]), bool(rendering.row.tools)
        if key not in self._openings:
            text = opening(self._tokenizer, rendering.options)
            self._openings[key] = self.tokenize([text])[0]
        ids = self._openings[key]
        starts = [turn[0].first for turn in turns if turn and turn[0].kind != "thought"]
        places = [start for start in starts if mask[start]]
        where = np.repeat(np.array(places, int), len(ids))
        return np.insert(tokens, where, np.tile(ids, len(places))), np.insert(mask, where, False)

    def _chosen(self, turns: list[list[Span]], text: str, marks: list[Mark]) -> Iterable[Span]:
        """The spans of the model turns that `train_on` names."""
        turns = [turn for turn in turns if turn]
        if self._train_on in ("assistant", "all") or not turns:
            return chain(*turns)
        first = turns[-1][0].first
        if self._train_on == "last":  # from the last place where the model stopped before it ended
            final = max((s.first for s in turns[-1] if s.kind != "response"), default=first)
            stops = (s.last for s in turns[-1] if s.kind in ("end", "response"))
            start = max((stop for stop in stops if stop <= final), default=first)
            return [span for span in turns[-1] if span.first >= start]
        questions = [m for m in marks if m.marker == TURN and text.startswith("user\n", m.end)]
        asked = max((mark.token for mark in questions if mark.token < first), default=-1)
        return chain(*(turn for turn in turns if turn[0].first > asked))

    def _locate(self, text: str, tokens: np.ndarray) -> list[Mark]:
        """The markers of a text with their tokens: the nth marker is the nth such token."""
        marks = [mark for mark in spans.find_marks(text) if mark.marker in self._ids]
        places = np.flatnonzero(self._is_marker[tokens])
        whole = [self._ids[mark.marker] for mark in marks] == tokens[places].tolist()
        marks = [Mark(m.marker, m.char, place) for m, place in zip(marks, places.tolist())]
        opens = [m for m in marks if m.marker == TURN and text.startswith("model\n", m.end)]
        if not whole or not all(self._header_is_whole(text, tokens, mark) for mark in opens):
            found = "the tokenizer joins the chat template's markers with other text"
            wanted = f"a token for each of {' '.join(MARKERS)}, and for what stands between them"
            raise row_error(found, wanted, _CHECKPOINT)
        return marks

    def _header_is_whole(self, text: str, tokens: np.ndarray, mark: Mark) -> bool:
        """Whether a model turn's text begins at a token of its own, or with white space."""
        answer, first = mark.end + len("model\n"), mark.token + 1
        written = tokens[first : first + len(self._header)].tolist()
        return written == self._header or text[answer : answer + 1].isspace()
