"""Ways of reading rows of a large table from disk: time, and what stays in the resident set.

Each way reads the same rows in a process of its own, once with the file out of the system's cache
and once with all of it there. Linux only, where the cache can be emptied for a file.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["compare_ways"]

WAYS = ("mapped", "mapped, random", "mapped, released", "random, released", "read")


def compare_ways(path: Path, name: str, batches: list[np.ndarray]) -> None:
    """Print a line for each way and state of the cache."""
    offset, rows, columns = _place(path, name)
    where = [str(path), str(offset), str(rows), str(columns)]
    counts = [str(len(batches)), str(len(batches[0]))]
    print(f"{len(batches)} x {len(batches[0])} distinct rows of {2 * columns} bytes")
    for cached in ("cold", "warm"):
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, way, cached, *where, *counts],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            print(f"  {way:18} {cached}: {done.stdout.strip()}", flush=True)


def _place(path: Path, name: str) -> tuple[int, int, int]:
    from mlx_gemma4.model.checkpoint import read_index

    stored = read_index(path.parent)[name]
    return stored.offset, *stored.shape


def _reader(way: str, path: str, offset: int, shape: tuple[int, int]) -> Callable:
    """A function from row numbers to rows."""
    if way == "read":
        file, width = os.open(path, os.O_RDONLY), 2 * shape[1]

        def read(rows: np.ndarray) -> np.ndarray:
            picked = np.empty((len(rows), shape[1]), np.uint16)
            for out, row in zip(picked, rows.tolist()):
                out[:] = np.frombuffer(os.pread(file, width, offset + row * width), np.uint16)
            return picked

        return read
    memory = np.memmap(path, np.uint16, "r", offset, shape)
    mapping = memory._mmap
    if "random" in way:
        mapping.madvise(mmap.MADV_RANDOM)

    def pick(rows: np.ndarray) -> np.ndarray:
        picked = np.asarray(memory[rows])
        if "released" in way:
            mapping.madvise(mmap.MADV_DONTNEED)
        return picked

    return pick


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _cached_mb(path: str) -> float:
    """How much of the file is in the system's cache."""
    words = ["fincore", "-b", "-n", "-o", "RES", path]
    said = subprocess.run(words, capture_output=True, text=True)
    return int(said.stdout) / 1e6 if said.returncode == 0 else float("nan")


def main() -> None:
    way, cached, path = sys.argv[1:4]
    offset, rows, columns, count, length = map(int, sys.argv[4:])
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached == "warm":
            while file.read(1 << 24):
                pass
    read = _reader(way, path, offset, (rows, columns))
    order = np.random.default_rng(0).permutation(rows)
    before, peak, seconds = _status_mb("RssFile"), _status_mb("VmHWM"), []
    for i in range(count):
        wanted = np.sort(order[i * length : (i + 1) * length])
        start = time.perf_counter()
        read(wanted)
        seconds.append(time.perf_counter() - start)
    print(
        f"{np.median(seconds) * 1e3:6.1f} ms a batch (first {seconds[0] * 1e3:6.1f}), "
        f"resident set {_status_mb('VmHWM') - peak:5.0f} MB higher at its peak, "
        f"{_status_mb('RssFile') - before:5.0f} MB of mapped pages left, "
        f"{_cached_mb(path):5.0f} MB in the system's cache"
    )


if __name__ == "__main__":
    main()
