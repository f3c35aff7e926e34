"""What is done with media of either kind: a file's size in tokens, its encoder inputs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, row_error
from ..model.processor import AudioSettings, MediaSettings
from ..storage import cache_folder, hash_file, new_file
from . import audio, image
from .file import MediaFile, is_unchanged, stamp, told

_KINDS = {"image": image, "audio": audio}
_INPUTS = {
    "image": ("pixel_values", "image_position_ids"),
    "audio": ("input_features", "input_features_mask"),
}


def media_file(
    kind: str, path: str, settings: MediaSettings, notes: Counter[str] | None = None
) -> MediaFile:
    """What an example keeps of a medium, after all of it was decoded once.

    Args:
        notes: what a person should know is counted here.

    Raises:
        DataError: a file that is none of its kind, not whole, or too large.
        ConfigError: the model does not take the kind, or a package to read it is not installed.
    """
    own = settings.of(kind)
    columns, rows = _KINDS[kind].grid(path, own)
    if kind == "audio" and notes is not None and columns * 40 >= 1000 * audio.LONGEST:
        notes[f"recordings cut at {audio.LONGEST} s"] += audio.is_cut(path, own)
    with told(f"{kind} {path}", _KINDS[kind].WANTED):
        digest = hash_file(Path(path))[:16]
        return MediaFile(kind, path, columns, rows, digest, *stamp(path))


def kept(kind: str, content: bytes) -> Path:
    """The file in the cache that has this content; made if it is not there.

    Raises:
        DataError: it is no file of the kind, or the cache cannot be written.
    """
    if kind == "image":
        image.seen_size(content)
    else:
        audio.samples(content, AudioSettings(-1), longest=1)
    path = cache_folder("media") / hashlib.sha256(content).hexdigest()[:32]
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as partial:
                partial.write_bytes(content)
    except OSError as error:
        do = "free some space, or set MLX_GEMMA4_CACHE to another folder"
        found = f"cannot keep the {kind} of the row in {path.parent}: {error}"
        raise DataError(found, wanted="room for media that rows hold", do=do) from None
    return path


def content_of(kind: str, value: Any) -> bytes | None:
    """The content of a file, of an image or audio in memory or of bytes; None for anything else.

    Raises:
        DataError: what cannot be written as a file.
    """
    return value if isinstance(value, bytes) else _KINDS[kind].as_file(value)


def features(file: MediaFile, settings: MediaSettings) -> tuple[np.ndarray, np.ndarray]:
    """What an encoder takes of a medium: patches and their positions, or frames and a mask.

    Raises:
        DataError: the file is not as it was when the rows were read.
    """
    if not is_unchanged(file):
        found = f"the {file.kind} {file.path} has changed since the rows were read"
        raise row_error(found, "files that stay as they are", "begin again")
    if file.kind == "image":
        return image.patches(file, settings.of("image"))
    return audio.frames(file, settings.of("audio"))


def encoder_inputs(
    files: Sequence[MediaFile],
    settings: MediaSettings,
    room: Mapping[str, tuple[int, int]],
    read: Any = features,
) -> dict[str, np.ndarray]:
    """`Media`'s inputs of the encoders, by name.

    Args:
        files: in the order of their tokens.
        room: by kind how many media of how many soft tokens the arrays hold; the rest is padding.
        read: `features`, or what gives the same of a file and the settings.
    """
    inputs: dict[str, np.ndarray] = {}
    for kind, (values_name, beside_name) in _INPUTS.items():
        own = [file for file in files if file.kind == kind]
        if not own:
            continue
        count, tokens = room[kind]
        steps, width = settings.of(kind).inputs
        values = np.zeros((count, tokens * steps, width), np.float32)
        beside = np.zeros(values.shape[:2], bool)
        if kind == "image":
            beside = np.full((*values.shape[:2], 2), -1, np.int32)
        for i, file in enumerate(own):
            found, at = read(file, settings)
            values[i, : len(found)], beside[i, : len(at)] = found, at
        inputs |= {values_name: values, beside_name: beside}
    return inputs
