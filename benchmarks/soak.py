"""A long run of small steps: does memory stay flat, and is every file closed?

python benchmarks/soak.py --steps 2000

With evaluation, answers to sample prompts, saving and report.html. Resident memory and open files
are read at every report; memory has to stay within 5% of what it was after the first tenth.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import mlx_gemma4 as g4
from mlx_gemma4.data import stdlib
from mlx_gemma4.model.tiny import build_tiny


def resident() -> float:
    """MB of this process; where /proc is not there, the most it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        scale = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


class Watch(g4.Callback):
    """Memory and open files at every report."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, int]] = []

    def report(self, metrics) -> None:
        gc.collect()
        self.seen.append((metrics["step"], resident(), open_files()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stdlib.write_chat_rows(root / "data")
        texts = [f"{signature}: {answer}\n" for _, signature, answer in stdlib.docstrings()]
        gemma = g4.load(build_tiny(root / "model", texts[:500]))
        (root / "prompts.txt").write_text("What is a list?\n")
        data = g4.read(root / "data", gemma, g4.DataConfig(max_seq_length=64, overlong="truncate"))
        config = g4.TrainConfig(
            iters=steps, eval_every=50, save_every=50, report_every=10, val_batches=2,
            sample_prompts=str(root / "prompts.txt"),
        )  # fmt: skip
        data.test = []
        before, watch, since = open_files(), Watch(), time.perf_counter()
        lora = g4.LoraConfig(rank=4)
        output = root / "run"
        g4.finetune(gemma, data, config, lora=lora, output=output, callbacks=[watch], console=False)
        seconds, after = time.perf_counter() - since, open_files()
    settled = [entry for entry in watch.seen if entry[0] >= steps // 10]
    for step, memory, files in settled[:: max(1, len(settled) // 10)]:
        print(f"step {step}: {memory:.1f} MB resident, {files} files open")
    first = settled[0][1]
    most, least = max(m for _, m, _ in settled), min(m for _, m, _ in settled)
    files = sorted({files for _, _, files in settled})
    print(f"{steps} steps in {seconds:.0f} s; after step {settled[0][0]}: {first:.1f} MB")
    print(f"from there {least / first - 1:+.1%} to {most / first - 1:+.1%}")
    print(f"files open: {before} before, {files} at reports, {after} after")
    if most > 1.05 * first or after > before or len(files) > 1:
        raise SystemExit("memory or open files grew")


if __name__ == "__main__":
    main()
