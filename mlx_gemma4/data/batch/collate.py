"""Examples -> the arrays of a batch: padding, packed rows, the list of targets, and media.

Shapes: B rows, T positions, R targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ...media.file import MediaFile
from ...media.kinds import encoder_inputs, features
from ...model.processor import NO_MEDIA, MediaSettings
from ...nn.batch import Batch
from ...nn.media import Media
from ..example import Example
from ..read.records import located
from .order import bucket
from .shapes import NO_SHAPES, Shapes


def collate(
    rows: Sequence[Example | Sequence[Example]],
    pad_token: int = 0,
    media: MediaSettings = NO_MEDIA,
) -> Batch:
    """Examples as one batch, padded on the right with `pad_token`.

    Args:
        rows: an example is a row of its own; a list of examples is one packed row, in which no
            example attends to another.
        media: how the model takes images and audio, as `Gemma4.media` says.

    Raises:
        DataError: a medium that cannot be read, or has changed since the rows were read.

    >>> one = Example(np.array([2, 7, 8]), np.array([False, False, True]), "rows.jsonl:1")
    >>> two = Example(np.array([2, 9]), np.array([False, True]), "rows.jsonl:2")
    >>> batch = collate([[one, two]])
    >>> batch.tokens_BT[0, :3].tolist(), batch.targets_R[:2].tolist()
    ([2, 7, 2], [8, 9])
    >>> batch.positions_R[:2].tolist(), batch.sequences_R[:2].tolist()
    ([1, 2], [0, 1])
    """
    return collate_alike([rows], pad_token, media)[0]


def collate_alike(
    batches: Sequence[Sequence[Example | Sequence[Example]]],
    pad_token: int = 0,
    media: MediaSettings = NO_MEDIA,
    encoded: bool = False,
    shapes: Shapes = NO_SHAPES,
) -> list[Batch]:
    """`collate` for each of the batches of a step, in shapes that they share.

    Args:
        encoded: soft tokens come from elsewhere, in the order of their tokens: media are not read.
        shapes: those that the batches of a run have.
    """
    parts = [[[row] if isinstance(row, Example) else list(row) for row in rows] for rows in batches]
    every = [row for rows in parts for row in rows]
    examples = [[example for row in rows for example in row] for rows in parts]
    longest = max(len(example) - 1 for row in every for example in row)
    positions = max(sum(len(example) - 1 for example in row) for row in every)
    # Room for the sum of every sequence, even where an example has no target.
    targets = max(max(len(es), sum(e.num_targets for e in es)) for es in examples)
    T, R, bound = shapes.of_batch(positions, targets, longest)
    packed = any(len(row) > 1 for row in every)
    made = [_collate(rows, pad_token, T, R, packed, bound if packed else None) for rows in parts]
    room = _room([[file for example in es for file in example.media] for es in examples])
    return [
        _with_media(batch, rows, room, media, encoded) if any(e.media for e in es) else batch
        for batch, rows, es in zip(made, parts, examples)
    ]


def _room(batches: Sequence[Sequence[MediaFile]]) -> dict[str, tuple[int, int]]:
    """By kind the most media of a batch and the most soft tokens of one, rounded up."""
    room = {}
    for kind in {file.kind for files in batches for file in files}:
        own = [[file.num_tokens for file in files if file.kind == kind] for files in batches]
        room[kind] = bucket(max(map(len, own)), 1), bucket(max(map(max, filter(None, own))), 16)
    return room


def _with_media(
    batch: Batch,
    rows: list[list[Example]],
    room: dict[str, tuple[int, int]],
    settings: MediaSettings,
    encoded: bool,
) -> Batch:
    """The batch with inputs of the encoders or places of soft tokens, and numbers of its images."""
    tokens = np.asarray(batch.tokens_BT)
    files = [file for row in rows for example in row for file in example.media]
    origins = {id(file): e.origin for row in rows for e in row for file in e.media}

    def read(file: MediaFile, settings: MediaSettings) -> tuple[np.ndarray, np.ndarray]:
        with located(origins[id(file)]):
            return features(file, settings)

    made: Media | None
    if encoded:
        places, own = np.arange(tokens.size), [settings.of(kind).token for kind in room]
        there = np.flatnonzero(np.isin(tokens, own))
        places[there] = tokens.size + np.arange(len(there))
        made = Media(places_BT=mx.array(places.reshape(tokens.shape).astype(np.int32)))
    else:
        made = Media.of(**encoder_inputs(files, settings, room, read))
    batch = replace(batch, media=made)
    counts = [file.num_tokens for file in files if file.kind == "image"]
    if not counts:
        return batch
    numbers = np.full(tokens.shape, -1, np.int32)
    is_image = tokens == settings.of("image").token
    numbers[is_image] = np.repeat(np.arange(len(counts)), counts)
    return replace(batch, images_BT=mx.array(numbers), largest_image=room["image"][1])


def _collate(
    rows: list[list[Example]], pad_token: int, T: int, R: int, packed: bool, bound: int | None
) -> Batch:
    tokens_BT = np.full((len(rows), T), pad_token, np.int32)
    segments_BT = np.zeros((len(rows), T), np.int32)
    targets, positions, sequences = [], [], []
    sequence = 0
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row):
            end = start + len(example) - 1
            tokens_BT[b, start:end] = example.tokens[:-1]
            segments_BT[b, start:end] = segment
            places = np.flatnonzero(example.mask[1:])  # the position before each target
            targets.append(example.tokens[1:][places])
            positions.append(b * T + start + places)
            sequences.append(np.full(len(places), sequence))
            start, sequence = end, sequence + 1
        segments_BT[b, start:] = len(row)

    count = sum(map(len, targets))

    def filled(parts: list[np.ndarray]) -> mx.array:
        """(R,), filled up by repeating the last."""
        values = np.concatenate(parts) if count else np.zeros(1, np.int64)
        return mx.array(values[np.minimum(np.arange(R), len(values) - 1)].astype(np.int32))

    return Batch(
        tokens_BT=mx.array(tokens_BT),
        targets_R=filled(targets),
        weights_R=mx.array((np.arange(R) < count).astype(np.float32)),
        positions_R=filled(positions),
        sequences_R=filled(sequences),
        segments_BT=mx.array(segments_BT) if packed else None,
        longest=bound,
    )
