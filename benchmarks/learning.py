"""What is learned from the same rows: our defaults, mlx-lm's choices, mlx_lm.lora.

    python benchmarks/learning.py --seeds 5

Three tasks from text that every machine with Python has, on the embedded small Gemma 4: explain a
function from its signature, name a Unicode character, write a function from its docstring. Each
contestant takes as many steps of the same batch size, rank, scale and learning rate; all are
judged by one evaluation, the loss of the answers' tokens in the validation rows.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev

import mlx.core as mx
import yaml

import mlx_gemma4 as g4
from mlx_gemma4.data import stdlib
from mlx_gemma4.train import embedded
from mlx_gemma4.train.evaluate import evaluate

Rows = Iterator[tuple[str, str]]
TARGETS = [f"self_attn.{n}_proj" for n in "qkvo"] + [
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
]
RANK, ALPHA = 8, 16.0


def explained() -> Rows:
    for _, signature, answer in stdlib.docstrings():
        yield f"What does {signature} do?", answer


def named() -> Rows:
    for code in range(0x20, 0x2FFF):
        if name := unicodedata.name(chr(code), "").lower():
            yield f"Which character is {chr(code)}?", name


def written() -> Rows:
    import sysconfig

    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and (told := ast.get_docstring(node)):
                node.body = node.body[1:]
                source = ast.unparse(node) if node.body else ""
                if 0 < len(source) <= 400 and len(told) <= 200:
                    yield f"Write a Python function. {' '.join(told.split())}", source


TASKS: dict[str, Callable[[], Rows]] = {"explain": explained, "name": named, "write": written}


def write_task(folder: Path, rows: Rows) -> Path:
    """train.jsonl, and valid.jsonl of 100 rows that are not trained on."""
    chats = [
        json.dumps({"messages": [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer},
        ]})
        for question, answer in rows
    ]  # fmt: skip
    chats = list(dict.fromkeys(chats))
    random.Random(0).shuffle(chats)
    folder.mkdir(parents=True)
    for name, lines in (("valid", chats[:100]), ("train", chats[100:3100])):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def ours(model: Path, rows: Path, seed: int, given: argparse.Namespace, **choices: object) -> float:
    gemma = g4.load(model)
    data = g4.read(rows, gemma, g4.DataConfig(max_seq_length=256))
    config = g4.TrainConfig(
        iters=given.steps, batch_size=given.batch, learning_rate=given.rate, seed=seed,
        eval_every=10**6, **choices,
    )  # fmt: skip
    lora = g4.LoraConfig(rank=RANK, alpha=ALPHA)
    g4.finetune(gemma, data, config, lora=lora, console=False)
    return evaluate(gemma, data.valid, data.config, config)


def of_mlx_lm(model: Path, rows: Path, seed: int, given: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        scale = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": TARGETS}
        config.write_text(yaml.safe_dump({"lora_parameters": scale}))
        flags = {
            "model": model, "data": rows, "adapter-path": f"{folder}/adapter", "iters": given.steps,
            "batch-size": given.batch, "learning-rate": given.rate, "num-layers": -1, "seed": seed,
            "max-seq-length": 256, "val-batches": 1, "config": config,
        }  # fmt: skip
        command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--mask-prompt"]
        command += [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        subprocess.run(command, check=True, capture_output=True)
        gemma = g4.load(model, adapter=f"{folder}/adapter")
        data = g4.read(rows, gemma, g4.DataConfig(max_seq_length=256))
        return evaluate(gemma, data.valid, data.config, g4.TrainConfig())


CONTESTANTS: dict[str, Callable[..., float]] = {
    "ours": ours,
    "ours, mlx-lm's choices": lambda *values: ours(*values, packing=False),
    "ours, bias_correction": lambda *values: ours(*values, bias_correction=True),
    "mlx_lm.lora": of_mlx_lm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    given = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        model, _ = embedded.prepare()
    print(f"{given.steps} steps of {given.batch} rows, rank {RANK}, rate {given.rate}")
    print(f"validation loss, mean and standard deviation over {given.seeds} seeds")
    print(f"{'':24}" + "".join(f"{task:>18}" for task in given.tasks), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: write_task(Path(folder) / name, TASKS[name]()) for name in given.tasks}
        for name in given.only:
            print(f"{name:24}", end="", flush=True)
            for task in given.tasks:
                with contextlib.redirect_stdout(sys.stderr):
                    losses = [
                        CONTESTANTS[name](model, rows[task], seed, given)
                        for seed in range(given.seeds)
                    ]
                spread = stdev(losses) if len(losses) > 1 else 0.0
                print(f"{mean(losses):>11.3f} ±{spread:.3f}", end="", flush=True)
                mx.clear_cache()
            print(flush=True)


if __name__ == "__main__":
    main()
