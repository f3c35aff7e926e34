"""Soft tokens of media that are computed once: where no encoder trains, an epoch needs none.

What an encoder gives for a file is kept in the cache, under the content of both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..data.batch.order import bucket
from ..data.example import Example
from ..data.read.records import located
from ..errors import DataError
from ..gemma import Gemma4
from ..media.file import MediaFile
from ..media.kinds import encoder_inputs, features
from ..model.names import flat, text_model
from ..nn import media as media_code
from ..nn.batch import Batch
from ..nn.media import Media, encoded
from ..storage import cache_folder, new_file

MOST_BYTES = 20_000_000_000
"""What is kept for the encoders of one model; of other media soft tokens are computed anew."""

Found = Mapping[MediaFile, np.ndarray | tuple[np.ndarray, np.ndarray]]
"""Of each file the bytes of its soft tokens, (tokens, width), or else what its encoder takes."""


class SoftTokens:
    """What the encoders of a model give for files, kept on the disk.

    Args:
        gemma: whose encoders no weight trains of while this is in use.

    Attributes:
        folder: where they are kept.
        computed: media that went through an encoder.
    """

    def __init__(self, gemma: Gemma4):
        self._gemma, self._dtype = gemma, text_model(gemma.backbone).norm.weight.dtype
        self._width = gemma.plan.hidden_size * self._dtype.size  # bytes of a soft token
        self.folder = cache_folder("soft_tokens") / _fingerprint(gemma, self._dtype)
        self._size = sum(path.stat().st_size for path in self.folder.glob("*"))
        self.computed = 0

    @classmethod
    def of(cls, gemma: Gemma4) -> SoftTokens | None:
        """None for a model without encoders, or with one that trains."""
        names = flat(gemma.backbone.trainable_parameters())
        parts = {name.split(".")[0] for name in flat(gemma.backbone.parameters())}
        own = parts & {*gemma.plan.encoders}
        return cls(gemma) if own and not any(n.split(".")[0] in own for n in names) else None

    def read(self, examples: Iterable[Example]) -> Found:
        """What is there of the media of some examples; the device is left alone.

        Raises:
            DataError: a file that has changed since the rows were read.
        """
        found: dict[MediaFile, np.ndarray | tuple[np.ndarray, np.ndarray]] = {}
        for example in examples:
            for file in example.media:
                if file not in found:
                    stored = self._stored(file)
                    with located(example.origin):
                        whole = features(file, self._gemma.media) if stored is None else stored
                    found[file] = whole
        return found

    def put_into(
        self, batches: Sequence[Batch], files: Sequence[Sequence[MediaFile]], found: Found
    ) -> list[Batch]:
        """The batches of a step, whose media have places, with soft tokens in shapes they share.

        Args:
            files: of each batch, in the order of their tokens.
        """
        soft = {file: self._computed(file, value) for file, value in found.items()}
        most = bucket(max((sum(f.num_tokens for f in own) for own in files), default=1), 64)
        filled = []
        for batch, own in zip(batches, files):
            if batch.media is not None:
                rows = np.zeros((most, self._width), np.uint8)
                start = 0
                for file in own:
                    rows[start : start + file.num_tokens] = soft[file]
                    start += file.num_tokens
                embeddings = mx.array(rows).view(self._dtype)
                batch = replace(batch, media=replace(batch.media, embeddings_KD=embeddings))
            filled.append(batch)
        return filled

    def _computed(
        self, file: MediaFile, value: np.ndarray | tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return value
        room = {file.kind: (1, bucket(file.num_tokens, 16))}
        inputs = encoder_inputs([file], self._gemma.media, room, lambda *_: value)
        media = encoded(self._gemma.backbone, Media(**{k: mx.array(v) for k, v in inputs.items()}))
        assert media.embeddings_KD is not None
        stored = np.array(media.embeddings_KD.astype(self._dtype).view(mx.uint8))
        self.computed += 1
        self._keep(file, stored)
        return stored

    def _path(self, file: MediaFile) -> Path:
        return self.folder / f"{file.kind}-{file.digest}-{file.columns}x{file.rows}"

    def _stored(self, file: MediaFile) -> np.ndarray | None:
        try:
            stored = np.fromfile(self._path(file), np.uint8)
        except OSError:
            return None
        whole = stored.size == file.num_tokens * self._width
        return stored.reshape(-1, self._width) if whole else None

    def _keep(self, file: MediaFile, stored: np.ndarray) -> None:
        if self._size + stored.nbytes > MOST_BYTES:
            return
        self._size += stored.nbytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self._path(file)) as partial:
                stored.tofile(partial)
        except OSError as error:
            found = f"cannot keep soft tokens in {self.folder}: {error}"
            do = "free some space, or set MLX_GEMMA4_CACHE to another folder"
            raise DataError(found, wanted="room for soft tokens of media", do=do) from None


def _fingerprint(gemma: Gemma4, dtype: mx.Dtype) -> str:
    """Of all that soft tokens depend on beside files: weights of the encoders, and our code."""
    digest = hashlib.sha256(f"{dtype} {gemma.media}".encode())
    digest.update(Path(media_code.__file__).read_bytes())
    for name, value in sorted(flat(gemma.backbone.parameters()).items()):
        if name.split(".")[0] in gemma.plan.encoders:
            digest.update(f"{name} {value.shape} {value.dtype}".encode())
            digest.update(np.array(value.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()[:16]
