"""Media that are broken, hostile or odd: one clear error by file and line each, or a usable row.

`python -m pytest -s` prints the table.
"""

from __future__ import annotations

import base64
import io
import resource
import struct
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_rows
from media import add_processor, picture, sound, wav
from PIL import Image

import mlx_gemma4 as g4
from mlx_gemma4.media import audio
from mlx_gemma4.model.tokenizer import text_side

ANSWER = {"role": "assistant", "content": "A list of values."}
SOUND = sound(4000)
WAV = wav(SOUND)


def saved(kind: str, image: Any = None, **how: Any) -> bytes:
    file = io.BytesIO()
    (image or picture(90, 70)).save(file, kind, **how)
    return file.getvalue()


def png_of(width: int, height: int, body: bytes = b"\0" * 1000) -> bytes:
    """A PNG whose header promises so many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [head, b"IDAT" + zlib.compress(body), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in parts
    )


def riff(form: tuple[int, ...] = (1, 1, 16000, 32000, 2, 16), data: bytes = bytes(8000)) -> bytes:
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *form) + b"data"
    body += struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def floats(*values: float) -> bytes:
    return audio.as_file(np.array([*SOUND, *values], np.float32)) or b""


def url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved("JPEG", exif=exif)


FINE = ""
JPEG, PNG = saved("JPEG"), saved("PNG")
GIF = saved("GIF", save_all=True, append_images=[picture(90, 70, seed=1)] * 3)
UNREAD = "cannot be read"
RATE = FINE if find_spec("soxr") else 'pip install "mlx-gemma4[audio]"'
ODD = FINE if find_spec("soundfile") else 'pip install "mlx-gemma4[audio]"'  # it reads this
EXTRA = UNREAD if find_spec("soundfile") else 'pip install "mlx-gemma4[audio]"'

FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("image", b"", UNREAD),
    "text": ("image", b"hello" * 99, UNREAD),
    "zeros": ("image", bytes(5000), UNREAD),
    "truncated JPEG": ("image", JPEG[:-300], UNREAD),
    "half a JPEG": ("image", JPEG[: len(JPEG) // 2], UNREAD),
    "a JPEG's header": ("image", JPEG[:30], UNREAD),
    "truncated PNG": ("image", PNG[:-300], UNREAD),
    "PNG, a byte turned": ("image", PNG[:60] + b"\xff" + PNG[61:], UNREAD),
    "truncated WebP": ("image", saved("WEBP")[:-200], UNREAD),
    "truncated GIF": ("image", saved("GIF")[:-300], UNREAD),
    "animated GIF": ("image", GIF, FINE),
    "CMYK": ("image", saved("JPEG", picture(90, 70).convert("CMYK")), FINE),
    "16 bits grey": ("image", saved("PNG", picture(90, 70).convert("I;16")), FINE),
    "palette with transparency": (
        "image", saved("PNG", picture(90, 70).convert("P"), transparency=3), FINE),
    "1 x 1": ("image", saved("PNG", picture(1, 1)), FINE),
    "20,000 x 20": ("image", saved("PNG", picture(20_000, 20)), FINE),
    "1 x 5,000": ("image", saved("PNG", picture(1, 5000)), FINE),
    "decompression bomb": ("image", png_of(60_000, 60_000), UNREAD),
    "bomb below Pillow's limit": ("image", png_of(9_000, 9_000), "9,000 x 9,000 pixels"),
    "a header of 0 pixels": ("image", png_of(0, 10), UNREAD),
    "fewer rows than promised": ("image", png_of(400, 400), UNREAD),
    "a WAV as image": ("image", WAV, UNREAD),
    "EPS": ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNREAD),
    "SVG": ("image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNREAD),
    "PDF": ("image", b"%PDF-1.4\n1 0 obj\n", UNREAD),
    "PPM": ("image", saved("PPM"), UNREAD),
    "ICO": ("image", saved("ICO"), UNREAD),
    "a script": ("image", b"#!/bin/sh\ntouch RAN\n", UNREAD),
    "a pickle": ("image", b"cos\nsystem\n(S'touch RAN'\ntR.", UNREAD),
    "EXIF turned": ("image", with_exif(8), FINE),
    "EXIF of nonsense": ("image", with_exif(77), FINE),
    "PNG behind a JPEG's name": ("image", PNG, FINE),
    "empty audio": ("audio", b"", UNREAD),
    "zero-length WAV": ("audio", wav(SOUND[:0]), "has 0 samples"),
    "a hundredth of a second": ("audio", wav(SOUND[:160]), "has 160 samples"),
    "the shortest": ("audio", wav(SOUND[:161]), FINE),
    "truncated WAV": ("audio", WAV[:-1000], "ends too early"),
    "a WAV's header": ("audio", WAV[:30], UNREAD),
    "a WAV without data": ("audio", WAV[:36], "no samples"),
    "a chunk of 4 GB": ("audio", WAV[:36] + b"LIST\xff\xff\xff\xff", "no samples"),
    "odd bytes at the end": ("audio", riff(data=bytes(8001)), FINE),
    "NaN samples": ("audio", floats(float("nan")), "no numbers"),
    "infinite samples": ("audio", floats(float("inf")), "no numbers"),
    "samples of 1e30": ("audio", floats(1e30), FINE),
    "0 Hz": ("audio", riff((1, 1, 0, 0, 2, 16)), "1 channels at 0 Hz"),
    "4 GHz": ("audio", riff((1, 1, 4_000_000_000, 0, 2, 16)), "4000000000 Hz"),
    "60,000 channels": ("audio", riff((1, 60_000, 16000, 0, 2, 16), bytes(120_000)), "channels"),
    "0 channels": ("audio", riff((1, 0, 16000, 0, 2, 16)), EXTRA),
    "7 bits": ("audio", riff((1, 1, 16000, 0, 2, 7)), ODD),
    "8 kHz stereo": ("audio", wav(np.stack([SOUND] * 2, 1), 8000), RATE),
    "8 bits": ("audio", wav(SOUND, bits=8), FINE),
    "a JPEG as audio": ("audio", JPEG, UNREAD),
    "FLAC of zeros": ("audio", b"fLaC" + bytes(99), EXTRA),
    "MP3 of zeros": ("audio", b"ID3" + bytes(99), EXTRA),
}  # fmt: skip

LINKED, ELSEWHERE = "link.png", "../outside.png"
PLACE = {"type": "image"}
ROWS: dict[str, tuple[dict, str]] = {
    "missing file": ({"image": "nowhere.png"}, "no such file"),
    "a folder": ({"image": "."}, "no such file"),
    "path traversal": ({"image": ELSEWHERE}, "outside of"),
    "traversal and back": ({"image": "../data/../outside.png"}, "outside of"),
    "an absolute path": ({"image": "/etc/hostname"}, "outside of"),
    "a link that leaves": ({"image": LINKED}, "outside of"),
    "file:// of another place": ({"audio": "file:///etc/hostname"}, "outside of"),
    "a name of 5,000 letters": ({"image": "a" * 5000}, "no such file"),
    "a NUL in the name": ({"image": "a\0.png"}, ""),
    "an address": ({"image": "https://example.org/a.png"}, "nothing is downloaded"),
    "another scheme": ({"audio": "ftp://example.org/a.wav"}, "nothing is downloaded"),
    "a number": ({"image": 3}, "the path of a file"),
    "more images than places": ({"images": ["a.png"] * 2, "at": [PLACE]}, "2 images, and 1 places"),
    "more places than recordings": (
        {"audio": "a.wav", "at": [{"type": "audio"}] * 2}, "1 recordings, and 2 places"),
    "a place alone": ({"at": [PLACE]}, "has the image None"),
    "base64 with a hole": ({"image": "data:image/png;base64,iVBO*"}, "not base64"),
    "base64 of text": ({"audio": url("audio/wav", b"RIFFhello")}, ""),
    "percent-encoded": ({"image": "data:image/png,%89PNG"}, "not base64"),
    "the token in the text": ({"said": "<|audio|>", "audio": "a.wav"}, "tokens of media"),
    "a video": ({"at": [{"type": "video", "video": "a.mp4"}]}, "a part of type 'video'"),
}  # fmt: skip
SHOWN = {**FILES, **ROWS}


@pytest.fixture(scope="module")
def side(checkpoints, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("side") / "e2b"
    shutil.copytree(checkpoints["e2b"], folder)
    return text_side(add_processor(folder))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    home = write_rows(tmp_path / "data")
    (tmp_path / "outside.png").write_bytes(PNG)
    (home / "a.png").write_bytes(PNG)
    (home / "a.wav").write_bytes(WAV)
    (home / LINKED).symlink_to(tmp_path / "outside.png")
    return home


def row_of(name: str, data: Path) -> tuple[dict, str]:
    said, parts = "What is it?", []
    if name in ROWS:
        fields, wanted = dict(ROWS[name][0]), ROWS[name][1] or "train.jsonl:1"
        said, parts = fields.pop("said", said), fields.pop("at", [])
    else:
        kind, content, wanted = FILES[name]
        (data / "file.jpg").write_bytes(content)
        fields = {kind: "file.jpg"}
    content = [*parts, {"type": "text", "text": said}]
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}, wanted


def test_there_are_enough():
    assert len(SHOWN) >= 60


@pytest.mark.parametrize("name", SHOWN)
def test_one_clear_line_or_a_row(name, side, data, capsys):
    row, wanted = row_of(name, data)
    write_rows(data, train=[row])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if wanted == FINE:
        [example] = g4.read(data, side)
        assert (
            example.media[0].num_tokens
            == (example.tokens == 111).sum() + (example.tokens == 114).sum()
        )
        told = f"{example.media[0].num_tokens} tokens"
    else:
        with pytest.raises((g4.DataError, g4.ConfigError)) as error:
            g4.read(data, side)
        told = str(error.value)
        assert wanted in told and "Traceback" not in told
        assert all(len(line) < 500 for line in told.splitlines()) and len(told.splitlines()) <= 3
        assert isinstance(error.value, g4.ConfigError) or "train.jsonl:1: " in told
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000 * (1024 if sys.platform == "darwin" else 1)
    assert not list(data.parent.rglob("RAN"))
    with capsys.disabled():
        if "-s" in sys.argv:
            print(f"{name:30} {told.splitlines()[0][-100:]}")
