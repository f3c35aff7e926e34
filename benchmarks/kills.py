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
    "--iters 40 --save-every 3 --eval-every 4 --report-every 1 --lora-rank 4 --batch-size 1 "
    "--max-seq-length 64 --overlong truncate --grad-accumulation-steps 2 --lora-dropout 0.1 "
    "--warmup-steps 9 --lr-schedule cosine --learning-rate 3e-3 --val-batches 2 --patience 4"
)
_LOADING = 0.25
"""The share of kills before the first step."""


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
    due = {3: "saving or stepping", 4: "evaluating"}
    return next((what for every, what in due.items() if int(steps[-1]) % every == 0), "stepping")


def killed(words: list[str], log: Path, number: signal.Signals) -> tuple[int, bool, str]:
    """(exit code, whether it was killed, what it printed) of a run that gets a signal some time."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    if random.random() < _LOADING:
        time.sleep(random.uniform(0.1, 6))
    else:
        steps = random.randint(1, 9)
        while process.poll() is None and log.read_text().count("\nstep ") < steps:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.5))
    alive = process.poll() is None
    process.send_signal(number)
    return process.wait(), alive, log.read_text()


def chain(model: Path, data: Path, whole: Path, number: signal.Signals, count: int) -> None:
    seen: Counter[str] = Counter()
    tracebacks = differ = runs = 0
    while seen.total() < count:
        runs, output = runs + 1, whole.parent / f"{number.name}-{runs}"
        words, code = command(model, data, output), -1
        while code and seen.total() < count:
            code, alive, told = killed(words, whole.parent / "log", number)
            seen[moment(output, told)] += alive
            tracebacks += "Traceback" in told and "KeyboardInterrupt" not in told
            if code not in (0, 130, -number):
                raise SystemExit(told)
        subprocess.run(words, check=True, capture_output=True)
        adapter = "adapter/adapters.safetensors"
        differ += (output / adapter).read_bytes() != (whole / adapter).read_bytes()
    told = {"kills": dict(seen), "runs": runs, "differ": differ, "tracebacks": tracebacks}
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
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            chain(root / "model", root / "data", whole, number, given.count)


if __name__ == "__main__":
    main()
