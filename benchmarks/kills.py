"""Runs that are killed again and again: is the adapter in the end that of a run left alone?

python benchmarks/kills.py --count 30

One chain of `--resume auto` for each of kill -9, Ctrl-C and SIGTERM, sent at random moments of a
run with packing, accumulation, dropout, warmup and early stopping in play.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mlx_gemma4.data import stdlib
from mlx_gemma4.model.tiny import build_tiny

SETTINGS = (
    "--iters 400 --save-every 3 --eval-every 4 --report-every 2 --lora-rank 4 --batch-size 2 "
    "--max-seq-length 128 --overlong truncate --grad-accumulation-steps 2 --lora-dropout 0.1 "
    "--warmup-steps 20 --lr-schedule cosine --learning-rate 3e-3 --val-batches 2 --patience 40"
)


def command(model: Path, data: Path, output: Path) -> list[str]:
    words = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return [sys.executable, "-m", "mlx_gemma4.train", *words, *SETTINGS.split(), "--resume", "auto"]


def moment(output: Path, told: str) -> str:
    """What a run was doing when it was killed, as far as its traces tell."""
    if list((output / "checkpoints").glob(".partial*")):
        return "saving"
    steps = re.findall(r"^step (\d+) of", told, re.MULTILINE)
    if not steps:
        return "loading"
    return "evaluating or saving" if (int(steps[-1]) + 1) % 4 == 0 else "stepping"


def chain(model: Path, data: Path, whole: Path, number: signal.Signals, count: int) -> None:
    seen: Counter[str] = Counter()
    tracebacks = unequal = finished = 0
    output = whole.parent / f"{number.name}-0"
    adapter = "adapter/adapters.safetensors"
    while seen.total() < count or not (output / "summary.json").exists():
        words = command(model, data, output)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, **pipes)
        alive = True
        if seen.total() < count:
            time.sleep(random.uniform(0.5, 12))
            alive = process.poll() is None
            if alive:
                process.send_signal(number)
        told, wrong = process.communicate()
        tracebacks += "Traceback" in wrong
        if alive and seen.total() < count:
            seen[moment(output, told)] += 1
        elif process.returncode == 0:
            finished += 1
            unequal += (output / adapter).read_bytes() != (whole / adapter).read_bytes()
            if seen.total() >= count:
                break
            output = whole.parent / f"{number.name}-{finished}"
        elif process.returncode not in (130, -number):
            raise SystemExit(wrong)
    told = {"kills": dict(seen), "runs": finished, "differ": unequal, "tracebacks": tracebacks}
    print(number.name, json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stdlib.write_chat_rows(root / "data")
        texts = [f"{signature}: {answer}\n" for _, signature, answer in stdlib.docstrings()]
        build_tiny(root / "model", texts[:500])
        whole = root / "whole"
        began = time.perf_counter()
        subprocess.run(
            command(root / "model", root / "data", whole), check=True, capture_output=True
        )
        steps = json.loads((whole / "summary.json").read_text())["steps"]
        print(f"left alone: {steps} steps in {time.perf_counter() - began:.0f} s", flush=True)
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
            chain(root / "model", root / "data", whole, number, given.count)


if __name__ == "__main__":
    main()
