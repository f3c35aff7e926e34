"""What loop, callbacks and report.html add to the bare compiled step, on the same batches.

python benchmarks/overhead.py

Both are timed in turns. What is added is time of the main thread, which says more than the clock
where a machine does other work too: the device and the building of batches have other threads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_gemma4 as g4
from mlx_gemma4.data import stdlib
from mlx_gemma4.data.batch.order import BatchOrder
from mlx_gemma4.model.tiny import build_tiny
from mlx_gemma4.train.optim import make_optimizer
from mlx_gemma4.train.prefetch import Progress, training_steps
from mlx_gemma4.train.step import CompiledStep


def clocks() -> np.ndarray:
    """(the clock, CPU time of this thread), in seconds."""
    return np.array([time.perf_counter(), time.thread_time()])


def bare(model: Path, data: g4.Dataset, config: g4.TrainConfig, steps: int) -> np.ndarray:
    """Seconds a step of the step alone, as `clocks`; batches are there before."""
    gemma = g4.load(model)
    gemma.add_lora()
    optimizer = make_optimizer(config, steps, gemma.backbone.trainable_parameters())
    order = BatchOrder.of(data.train, data.config.max_seq_length, config.batch_size)
    taken = [s.batches for s in training_steps(gemma, data.train, order, Progress(), steps + 2)]
    step = CompiledStep(gemma, optimizer)
    gemma.backbone.train()
    for number, batches in enumerate(taken):
        if number == 2:
            since = clocks()
        sums, _ = step(batches, mx.random.key(number))
        mx.eval(vars(sums), gemma.backbone.trainable_parameters(), optimizer.state)
    return (clocks() - since) / steps


class Between(g4.Callback):
    """The clocks from the second step to the last."""

    def advance(self, step: int, loss: float) -> None:
        if step == 2:
            self.since = clocks()
        self.spent = clocks() - self.since if step > 2 else None


def whole(
    model: Path, data: g4.Dataset, config: g4.TrainConfig, steps: int, output: Path
) -> np.ndarray:
    """The same of a run with all that it writes but checkpoints."""
    between = Between()
    with contextlib.redirect_stdout(io.StringIO()):
        g4.finetune(g4.load(model), data, config, output=output, callbacks=[between])
    return between.spent / steps


def first_step(model: Path, root: Path) -> tuple[float, float]:
    """(seconds to the line of its first step, CPU seconds in all) of a run of one step, 8 rows."""
    (root / "few").mkdir()
    rows = (root / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:8]
    (root / "few" / "train.jsonl").write_text("".join(rows))
    words = ["--model", model, "--data", root / "few", "--output", root / "first", "--iters", "1"]
    began = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mlx_gemma4.train", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1 of 1"):
                seconds = time.perf_counter() - began[0]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, spent.ru_utime + spent.ru_stime - began[1].ru_utime - began[1].ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stdlib.write_chat_rows(root / "data")
        texts = [f"{signature}: {answer}\n" for _, signature, answer in stdlib.docstrings()]
        model = build_tiny(root / "model", texts[:500])
        seconds, cpu = first_step(model, root)
        print(f"a process to its first step: {seconds:.1f} s; CPU of the whole run {cpu:.1f} s")
        settings = g4.DataConfig(max_seq_length=given.length, overlong="truncate")
        data = g4.read(str(root / "data"), g4.load(model), settings)
        data.valid, data.test = [], []
        config = g4.TrainConfig(iters=given.steps + 2, report_every=10, save_every=10**6)
        found = []
        for number in range(given.rounds):
            alone = bare(model, data, config, given.steps)
            full = whole(model, data, config, given.steps, root / str(number))
            found.append((alone, full))
            told = [f"{1000 * seconds:.1f}" for seconds in (*alone, *full)]
            print("bare {} ms (thread {}), run {} ms (thread {})".format(*told), flush=True)
        alone, full = np.min(found, axis=0)
        added = full[1] - alone[1]
        print(f"added: {1000 * added:.1f} ms, {added / alone[0]:.1%} of the bare step")


if __name__ == "__main__":
    main()
