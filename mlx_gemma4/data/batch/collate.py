"""Examples -> the arrays of a batch: padding, packed rows, the list of targets, and images.

Shapes: B rows, T positions, R targets, I images, S patches, C values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ...model.processor import ImageSettings, require_images
from ...nn.batch import Batch
from ...nn.media import Media
from ..example import Example
from ..media.image import patches
from ..read.records import located
from .order import bucket
from .shapes import NO_SHAPES, Shapes


def collate(
    rows: Sequence[Example | Sequence[Example]],
    pad_token: int = 0,
    images: ImageSettings | None = None,
) -> Batch:
    """Examples as one batch, padded on the right with `pad_token`.

    Args:
        rows: an example is a row of its own; a list of examples is one packed row, in which no
            example attends to another.
        images: how images become patches, as `Gemma4.images` says.

    Raises:
        DataError: an image that cannot be read, or has changed since the rows were read.

    >>> one = Example(np.array([2, 7, 8]), np.array([False, False, True]), "rows.jsonl:1")
    >>> two = Example(np.array([2, 9]), np.array([False, True]), "rows.jsonl:2")
    >>> batch = collate([[one, two]])
    >>> batch.tokens_BT[0, :3].tolist(), batch.targets_R[:2].tolist()
    ([2, 7, 2], [8, 9])
    >>> batch.positions_R[:2].tolist(), batch.sequences_R[:2].tolist()
    ([1, 2], [0, 1])
    """
    return collate_alike([rows], pad_token, images)[0]


def collate_alike(
    batches: Sequence[Sequence[Example | Sequence[Example]]],
    pad_token: int = 0,
    images: ImageSettings | None = None,
    shapes: Shapes = NO_SHAPES,
) -> list[Batch]:
    """`collate` for each of the batches of a step, in shapes that they share.

    Args:
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
    if not any(example.images for es in examples for example in es):
        return made
    settings = require_images(images)
    most = bucket(max(sum(len(example.images) for example in es) for es in examples), 1)
    files = [image for es in examples for example in es for image in example.images]
    largest = bucket(max(image.num_tokens for image in files), 16)
    return [
        _with_images(batch, rows, most, largest, settings) if any(e.images for e in es) else batch
        for batch, rows, es in zip(made, parts, examples)
    ]


def _with_images(
    batch: Batch, rows: list[list[Example]], most: int, largest: int, settings: ImageSettings
) -> Batch:
    """The batch with room for `most` images of `largest` soft tokens; what is left is padding."""
    S, C = largest * settings.pooling**2, 3 * settings.patch**2
    pixels_ISC = np.zeros((most, S, C), np.float32)
    places_IS2 = np.full((most, S, 2), -1, np.int32)
    numbers_BT = np.full(batch.tokens_BT.shape, -1, np.int32)
    i = 0
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            places = start + np.flatnonzero(example.tokens == settings.token)
            counts = [image.num_tokens for image in example.images]
            numbers_BT[b, places] = np.repeat(np.arange(i, i + len(counts)), counts)
            for image in example.images:
                with located(example.origin):
                    pixels, at = patches(image, settings)
                pixels_ISC[i, : len(at)], places_IS2[i, : len(at)] = pixels, at
                i += 1
            start += len(example) - 1
    media = Media.of(pixel_values=pixels_ISC, image_position_ids=places_IS2)
    return replace(batch, images_BT=mx.array(numbers_BT), largest_image=largest, media=media)


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
