"""Audio files -> mel features or samples: those that transformers' feature extractors make.

WAV files are read here; other formats, and rates other than 16 kHz, take the packages of an extra.

Shapes: F frames, C values of a frame.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import row_error
from ..extras import import_extra
from ..model.processor import AudioSettings
from .file import MediaFile, name_of, told

RATE = 16_000
LONGEST = 30
"""Seconds of audio that become mel features; what is longer is cut, as in transformers."""

MOST_SECONDS = 3600
"""A longer recording is refused: a minute decoded takes 4 MB."""

WANTED = "a WAV, FLAC, Ogg or MP3 file that is whole"
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_HEADS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")
"""How files of these begin, but WAV files."""

_BLOCK = 1 << 18  # frames that are decoded at once
_HOP, _WINDOW, _FFT, _BINS, _FLOOR = 160, 320, 512, 128, 1e-3


def grid(source: str | bytes, settings: AudioSettings) -> tuple[int, int]:
    """(soft tokens, 1) of a recording; errors as of `samples`, and a DataError if it has none."""
    count = len(samples(source, settings))
    frames = _mel_frames(count) if settings.samples is None else -(-count // settings.samples)
    if not frames:
        raise row_error(
            f"the audio {name_of(source)} has {count} samples at {RATE // 1000} kHz",
            "at least 161, a hundredth of a second",
        )
    return -(-frames // settings.inputs[0]), 1


def is_cut(source: str | bytes, settings: AudioSettings) -> bool:
    """Whether a recording is longer than what becomes mel features."""
    return settings.samples is None and len(samples(source, settings, LONGEST + 1)) > LONGEST * RATE


def frames(file: MediaFile, settings: AudioSettings) -> tuple[np.ndarray, np.ndarray]:
    """Frames (F, C), float32, and for each (F) that it is of the recording."""
    found = samples(file.path, settings)
    if settings.samples is None:
        made = mel_features(found)
    else:
        made = np.pad(found, (0, -len(found) % settings.samples)).reshape(-1, settings.samples)
    return made, np.ones(len(made), bool)


def samples(source: str | bytes, settings: AudioSettings, longest: int = LONGEST) -> np.ndarray:
    """The samples of a recording at 16 kHz, mono, float32; `longest` seconds for mel features.

    Raises:
        DataError: what is no audio, not whole, or too long.
        ConfigError: a package to read it is not installed.
    """
    what = f"audio {name_of(source)}"
    seconds = MOST_SECONDS if settings.samples is not None else longest
    with told(what, WANTED), _opened(source) as (rate, channels, blocks):
        if not (1000 <= rate <= 400_000 and 1 <= channels <= 64):
            raise ValueError(f"{channels} channels at {rate} Hz")
        # A resampler looks a little past the end of what is wanted.
        most, mono, count = (seconds + 1) * rate, [np.zeros(0, np.float32)], 0
        for block in blocks:
            mono.append(block.mean(axis=1, dtype=np.float32) if channels > 1 else block[:, 0])
            count += len(block)
            if count > most:
                break
        found = np.concatenate(mono)
        if not np.isfinite(found).all():
            raise ValueError("it holds samples that are no numbers")
        if rate != RATE:
            soxr = import_extra("soxr", "audio")
            found = soxr.resample(found, rate, RATE, quality="HQ") if len(found) else found
    if settings.samples is not None and len(found) > seconds * RATE:
        raise row_error(f"the {what} is longer than {MOST_SECONDS // 60} minutes", "a part of it")
    return np.ascontiguousarray(found[: seconds * RATE], np.float32)


def mel_features(samples: np.ndarray) -> np.ndarray:
    """Log-mel features (F, 128), of 20 ms every 10 ms, of frames that are wholly of a recording.

    The first is centred on the first sample. A frame reaches one sample further than it reads.
    """
    padded = np.pad(samples, (_WINDOW // 2, 0))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)
    windows = windows[: _mel_frames(len(samples)) * _HOP : _HOP]
    window = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)
    magnitudes = np.abs(np.fft.rfft(windows * window, n=_FFT, axis=-1))
    return np.log(magnitudes @ _mel_filters() + _FLOOR).astype(np.float32)


def _mel_frames(count: int) -> int:
    return max(0, (count - _WINDOW // 2 - 1) // _HOP + 1)


@lru_cache(maxsize=1)
def _mel_filters() -> np.ndarray:
    """(257, 128): triangles between frequencies at equal distances on the mel scale (HTK)."""
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, _BINS + 2) / 2595) - 1)
    slopes = edges[None] - np.linspace(0, RATE // 2, _FFT // 2 + 1)[:, None]
    widths = np.diff(edges)
    down, up = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return np.maximum(0, np.minimum(down, up))


# ---------------------------------------------------------------- files

Opened = tuple[int, int, Iterator[np.ndarray]]
"""Samples a second, channels, and blocks of (frames, channels), float32."""


@contextmanager
def _opened(source: str | bytes) -> Iterator[Opened]:
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if found := _wav(file):
            yield found
            return
        file.seek(0)
        head = file.read(12)
        if not (head.startswith(_HEADS) or head[8:] == b"WAVE"):
            raise ValueError("it does not begin as one")
        file.seek(0)
        soundfile = import_extra("soundfile", "audio")
        with soundfile.SoundFile(file) as opened:
            if opened.format not in _FORMATS:
                raise ValueError(f"it is of the format {opened.format}")
            read = partial(opened.read, _BLOCK, dtype="float32", always_2d=True)
            yield opened.samplerate, opened.channels, _whole(read, opened.frames)


def _whole(read: Callable[[], np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Blocks until they have `count` frames in all; fewer are an error."""
    while count > 0:
        block = read()
        if not len(block):
            raise ValueError("it ends too early")
        count -= len(block)
        yield block


_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN = (0, 0xFFFFFFFF)  # the length that a WAV file has while it is recorded


def _wav(file: IO[bytes]) -> Opened | None:
    """A WAV file of plain numbers; None for any other, of which `file` was read in part."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    form: tuple[int, ...] | None = None
    while len(head := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"fmt ":
            content = file.read(size + size % 2)
            form = struct.unpack_from("<HHIIHH", content)
            if form[0] == _EXTENSIBLE:
                form = struct.unpack_from("<H", content, 24) + form[1:]
        elif name == b"data" and form is not None:
            code, channels, rate, _, _, bits = form
            decode = _DECODERS.get((code, bits))
            if decode is None or not channels:
                return None
            width = bits // 8 * channels
            return rate, channels, _pcm(file, size, width, channels, decode)
        else:
            file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it has no samples")


def _pcm(
    file: IO[bytes], size: int, width: int, channels: int, decode: Any
) -> Iterator[np.ndarray]:
    left = None if size in _UNKNOWN else size
    while left is None or left >= width:
        want = _BLOCK * width if left is None else min(_BLOCK, left // width) * width
        content = file.read(want)
        if left is not None and len(content) < want:
            raise ValueError("it ends too early")
        if not (content := content[: len(content) // width * width]):
            return
        left = None if left is None else left - len(content)
        yield decode(content).reshape(-1, channels)


def _of_24_bits(content: bytes) -> np.ndarray:
    parts = np.frombuffer(content, np.uint8).reshape(-1, 3)
    whole = np.zeros((len(parts), 4), np.uint8)
    whole[:, 1:] = parts
    return (whole.view("<i4")[:, 0] / 2**31).astype(np.float32)


_DECODERS: Mapping[tuple[int, int], Any] = {
    (_PCM, 8): lambda content: (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / 128,
    (_PCM, 16): lambda content: np.frombuffer(content, "<i2").astype(np.float32) / 32768,
    (_PCM, 24): _of_24_bits,
    (_PCM, 32): lambda content: (np.frombuffer(content, "<i4") / 2**31).astype(np.float32),
    (_FLOAT, 32): lambda content: np.frombuffer(content, "<f4").astype(np.float32),
    (_FLOAT, 64): lambda content: np.frombuffer(content, "<f8").astype(np.float32),
}


def as_file(value: Any) -> bytes | None:
    """Samples as the content of a WAV file that has the same values; None for anything else.

    Args:
        value: a numpy array at 16 kHz, or {"array": ..., "sampling_rate": ...} as `datasets` has
            it; of several channels the shorter axis is theirs.
    """
    rate = RATE
    if isinstance(value, dict) and "array" in value:
        rate, value = value.get("sampling_rate") or RATE, np.asarray(value["array"])
    if not isinstance(value, np.ndarray):
        return None
    scale = 1.0 if value.dtype.kind == "f" else 2.0 ** (8 * value.dtype.itemsize - 1)
    if value.ndim not in (1, 2) or value.dtype.kind not in "fi" or not isinstance(rate, int):
        found = f"audio in the row of shape {value.shape}, {value.dtype}, at {rate!r} Hz"
        raise row_error(found, "samples (N,) or (N, channels), and a rate in Hz")
    if value.ndim == 2 and value.shape[0] < value.shape[1]:
        value = value.T
    content = np.ascontiguousarray(value / scale, "<f4").tobytes()
    channels = 1 if value.ndim == 1 else value.shape[1]
    form = struct.pack("<HHIIHH", _FLOAT, channels, rate, 4 * rate * channels, 4 * channels, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body
