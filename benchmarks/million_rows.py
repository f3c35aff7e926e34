"""A million short chat rows: how long the first and the second start take, and in how much memory.

    python benchmarks/million_rows.py [--rows 1000000] [--keep FOLDER]

The tokenizer has 262,144 tokens as Gemma 4's has, learned from random words; the rows are made of
the same words. Each start is a process of its own, timed whole and within `read`. Memory is the
resident memory of that process and its workers together, looked at twice a second; pages that they
share are counted for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

_WORDS = 300_000


def words() -> np.ndarray:
    """Made-up words, the same each time."""
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    lengths = random.integers(2, 11, _WORDS)
    picked = letters[np.minimum(random.geometric(0.12, lengths.sum()) - 1, len(letters) - 1)]
    return np.array([part.tobytes().decode() for part in np.split(picked, np.cumsum(lengths)[:-1])])


def build(folder: Path, rows: int) -> None:
    """Write the model folder and the file of rows."""
    from mlx_gemma4.model.tiny import build_tiny

    random, known = np.random.default_rng(1), words()
    if not (folder / "model").exists():
        texts = (" ".join(known[i : i + 1000]) for i in range(0, _WORDS, 1000))
        build_tiny(folder / "model", texts, vocab_size=262_144)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows // 1000):
            lengths = random.integers(4, 24, 2000)
            texts = np.split(random.choice(known, lengths.sum()), np.cumsum(lengths)[:-1])
            for question, answer in zip(texts[::2], texts[1::2]):
                messages = [
                    {"role": "user", "content": " ".join(question)},
                    {"role": "assistant", "content": " ".join(answer)},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")


def start(folder: Path) -> None:
    """What a run does before it trains: load the tokenizer, read the rows, count them."""
    from mlx_gemma4.data.dataset import read
    from mlx_gemma4.model.tokenizer import text_side

    memory = Memory()
    began = time.perf_counter()
    side = text_side(folder / "model")
    loaded, spent = time.perf_counter(), time.process_time()
    data = read(folder / "rows.jsonl", side)
    figures = {
        "examples": len(data),
        "tokens": int(data.train.lengths.sum()),
        "tokenizer_seconds": round(loaded - began, 2),
        "read_seconds": round(time.perf_counter() - loaded, 2),
        "read_cpu_seconds": round(time.process_time() - spent, 2),
        "workers": memory.most - 1,
        "peak_gb": round(memory.peak / 1e6, 3),
    }
    print(json.dumps(figures))


class Memory(threading.Thread):
    """Watches this process and its children.

    Attributes:
        peak: the most kilobytes that were resident at a time, all together.
        most: the most processes that were seen.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.most = 0, 1
        self.start()

    def run(self) -> None:
        while True:
            listed = subprocess.run(
                ["ps", "-A", "-o", "pid=,ppid=,rss=,comm="], capture_output=True
            )
            lines = [line.split(None, 3) for line in listed.stdout.decode().splitlines()]
            ours = [
                int(rss)
                for pid, parent, rss, name in lines
                if str(os.getpid()) in (pid, parent) and name != "ps"
            ]
            self.peak, self.most = max(self.peak, sum(ours)), max(self.most, len(ours))
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="a folder for model, rows and cache")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        return start(options.start)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, options.rows)
        size = (folder / "rows.jsonl").stat().st_size
        print(f"{options.rows:,} rows, {size / 1e6:,.0f} MB", flush=True)
        for name in ("first start", "second start"):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--start", str(folder)],
                env=os.environ | {"MLX_GEMMA4_CACHE": str(folder / "cache")},
                stdout=subprocess.PIPE,
                check=True,
            )
            seconds = time.perf_counter() - began
            print(f"{name}: {seconds:.1f} s in all, {done.stdout.decode().strip()}", flush=True)


if __name__ == "__main__":
    main()
