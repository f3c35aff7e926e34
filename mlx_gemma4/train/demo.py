"""`--demo images` and `--demo audio`: a task that is made on this machine, and a model to learn it.

Digits are drawn near the middle, tones begin at a random time, both of random strength and with
noise. The model begins with random weights; those of its encoders stay, and all others train.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..gemma import Gemma4
from ..media import audio, image
from ..model import tiny
from ..storage import cache_folder, damaged_files, new_folder, parse_json, write_hashes
from .embedded import Task

QUESTIONS = {"images": "Which digit is it?", "audio": "Which tone is it?"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TONES = {"a3": 220, "e4": 330, "a4": 440, "e5": 659, "a5": 880, "e6": 1319, "a6": 1760}
_FONT = (
    "0e11131519110e", "040c040404040e", "0e11010204081f", "1f02040201110e", "02060a121f0202",
    "1f101e0101110e", "0608101e11110e", "1f010204080808", "0e11110e11110e", "0e11110f01020c",
)  # fmt: skip
"""Digits of 5 x 7 dots: a byte each row."""

_ROWS = {"train": 600, "valid": 40, "test": 60}

_DEFAULTS: dict[str, Any] = {
    "fine_tune_type": "full",
    "batch_size": 8,
    "packing": False,
    "learning_rate": 2e-3,
    "bias_correction": True,
    "lr_schedule": "linear",
    "warmup_steps": 20,
    "report_every": 20,
}


def defaults(kind: str) -> dict[str, Any]:
    """Settings of a demo that differ from the defaults for a real model."""
    iters = {"images": 400, "audio": 200}[kind]
    return {**_DEFAULTS, "iters": iters, "eval_every": iters // 4, "save_every": iters // 2}


def prepare(kind: str) -> Task:
    """The demo's model and data in the cache, made if they are not there whole.

    Raises:
        ConfigError: the cache cannot be written.
    """
    made_of = inspect.getsource(tiny) + Path(__file__).read_text("utf-8")
    name = f"demo-{kind}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    folder = cache_folder(name)
    try:
        if damaged_files(folder):
            with new_folder(folder) as new:
                _build(kind, new)
                write_hashes(new)
    except OSError as error:
        found, do = f"cannot write {folder}: {error}", "set MLX_GEMMA4_CACHE to another folder"
        raise ConfigError(found, wanted="a folder to write to", do=do) from None
    data = folder / "data"
    first = parse_json((data / "test.jsonl").read_bytes().splitlines()[0])
    flags = ["--image" if kind == "images" else "--audio", str(data / first[kind][0])]
    ask = partial(accuracy, kind=kind, data=data)
    return Task(str(folder / "model"), str(data), ask, QUESTIONS[kind], flags)


def accuracy(gemma: Gemma4, kind: str, data: Path) -> str:
    """The share of test rows that are answered rightly, for people."""
    rows = [parse_json(line) for line in (data / "test.jsonl").read_bytes().splitlines()]
    right = 0
    for row in rows:
        media: dict[str, Any] = {kind: [data / row[kind][0]]}
        answer = gemma.generate(row["messages"][0]["content"], **media, max_tokens=5)
        right += answer.strip() == row["messages"][1]["content"]
    return f"{right / len(rows):.0%} of {len(rows)} test rows are answered rightly"


def _build(kind: str, folder: Path) -> None:
    data = folder / "data"
    data.mkdir(parents=True)
    make = {"images": _digits, "audio": _tones}[kind]
    for split, count in _ROWS.items():
        random = np.random.default_rng([len(split), count])
        lines = []
        for i, (answer, suffix, content) in zip(range(count), make(random)):
            name = f"{split}-{i}{suffix}"
            (data / name).write_bytes(content)
            asked = {"role": "user", "content": QUESTIONS[kind]}
            messages = [asked, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages, kind: [name]}) + "\n")
        (data / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    texts = [*QUESTIONS.values(), *_DIGITS, *_TONES]
    tiny.build_tiny(folder / "model", texts, text=tiny.TEXT, encoders=True)


def _digits(random: np.random.Generator) -> Iterator[tuple[str, str, bytes]]:
    from PIL import Image

    while True:
        digit = int(random.integers(10))
        dots = np.frombuffer(bytes.fromhex(_FONT[digit]), np.uint8)[:, None] >> np.arange(5)[::-1]
        drawn = np.kron(dots & 1, np.ones((5, 5)))
        paper = np.zeros((48, 48))
        y, x = (np.array(paper.shape) - drawn.shape) // 2 + random.integers(-4, 5, 2)
        paper[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn * random.uniform(150, 255)
        paper = (paper + random.normal(0, 12, paper.shape)).clip(0, 255)
        page = Image.fromarray(paper.astype(np.uint8))
        yield _DIGITS[digit], ".png", image.as_file(page) or b""


def _tones(random: np.random.Generator) -> Iterator[tuple[str, str, bytes]]:
    at = np.arange(audio.RATE // 2) / audio.RATE
    while True:
        name = list(_TONES)[random.integers(len(_TONES))]
        wave = np.sin(2 * np.pi * (_TONES[name] * at + random.uniform()))
        heard = (at > random.uniform(0, 0.2)) * random.uniform(0.1, 0.8)
        samples = wave * heard + random.normal(0, 0.01, len(at))
        yield name, ".wav", audio.as_file(samples.astype(np.float32)) or b""
