"""How much of a PLE table is resident while a model trains: a table of 2 GB on a small model.

    python benchmarks/ple_table.py
    python benchmarks/ple_table.py --ways        # ways of reading rows, beside one another

Figures in MB of 1e6 bytes: what MLX's allocator has in use and had at most; the process's resident
set, now and at most; of it, anonymous memory (its own) and mapped files (pages of the system's
cache, which the system takes back without writing them); and pages of the checkpoint's mappings.
On macOS only the resident set's peak is at hand.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from clock import rss_peak_mb
from middle import MIDDLE
from ple_ways import compare_ways

VOCABULARY = 262144
TABLE = "model.language_model.embed_tokens_per_layer.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the table")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a step, all distinct")
    parser.add_argument("--ways", action="store_true", help="compare ways of reading, no training")
    given = parser.parse_args()
    folder = build(Path("runs/ple"), given.gigabytes)
    rng = np.random.default_rng(0)
    tokens = rng.permutation(np.arange(120, VOCABULARY, dtype=np.int32))
    batches = [tokens[i * given.length : (i + 1) * given.length + 1] for i in range(given.steps)]
    if given.ways:
        compare_ways(folder / "model-table.safetensors", TABLE, batches)
    else:
        watch_training(folder, batches)


def watch_training(folder: Path, batches: list[np.ndarray]) -> None:
    """Load, train a step a batch, and print what is in memory at each point."""
    import mlx_gemma4 as g4
    from mlx_gemma4.data.batch.collate import collate
    from mlx_gemma4.data.example import Example
    from mlx_gemma4.train.step import train_step

    report("before load")
    gemma = g4.load(folder)
    gemma.add_lora(g4.LoraConfig())
    optimizer = optim.Adam(1e-4)
    options = g4.StepOptions(len(gemma.plan.layers))
    mx.eval(gemma.backbone.parameters())
    table = gemma.loaded.ple_rows.nbytes
    report(f"after load (a table of {table / 1e6:.0f} MB)")
    gemma.backbone.train()
    for number, tokens in enumerate(batches, 1):
        example = Example(tokens, np.ones(len(tokens), bool), "")
        start = time.perf_counter()
        batch = collate([example]).with_ple_rows(gemma)
        mx.eval(batch.ple_BTLP)
        seconds = time.perf_counter() - start
        sums, _ = train_step(gemma, optimizer, [batch], options=options)
        mx.eval(sums.loss, gemma.backbone.trainable_parameters(), optimizer.state)
        read = batch.ple_BTLP.nbytes
        del batch
        what = f"after step {number}, {read / 1e6:.0f} MB of rows in {seconds * 1e3:.0f} ms"
        report(f"{what}, loss {float(sums.loss / sums.count):.3f}")


def report(when: str) -> None:
    """Print one line of figures."""
    active, peak = mx.get_active_memory() / 1e6, mx.get_peak_memory() / 1e6
    if sys.platform == "linux":
        now = linux_memory()
        process = (
            f"RSS {now['VmRSS']:5.0f} peak {now['VmHWM']:5.0f} "
            f"(anonymous {now['RssAnon']:4.0f}, files {now['RssFile']:4.0f}, "
            f"of them weights {mapped_mb('.safetensors'):4.0f})"
        )
    else:
        process = f"RSS peak {rss_peak_mb():5.0f}"
    print(f"allocator {active:5.0f} peak {peak:5.0f} | {process} | {when}", flush=True)


def linux_memory() -> dict[str, float]:
    """The memory lines of /proc/self/status, in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        words[0].rstrip(":"): int(words[1]) * 1024 / 1e6 for words in lines if words[-1:] == ["kB"]
    }


def mapped_mb(suffix: str) -> float:
    """Resident MB of this process's mappings of files with this suffix."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counts = words[-1].endswith(suffix)
        elif counts and words[0] == "Rss:":
            total += int(words[1])
    return total * 1024 / 1e6


def build(folder: Path, gigabytes: float) -> Path:
    """A small float32 model whose PLE table has this size in bfloat16, unless it is there."""
    from mlx_gemma4.model import tiny
    from mlx_gemma4.model.loader import build_backbone
    from mlx_gemma4.model.names import PLE_TABLE, flat, text_prefix
    from mlx_gemma4.model.plan import Plan

    layers = MIDDLE["num_hidden_layers"]
    text = MIDDLE | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": round(gigabytes * 1e9 / 2 / VOCABULARY / layers),
    }
    config_path = folder / "config.json"
    if config_path.exists() and json.loads(config_path.read_text())["text_config"] == text:
        return folder
    config = json.loads((tiny.build_tiny(folder, ["a b c " * 9]) / "config.json").read_text())
    config_path.unlink()
    config |= {"text_config": text, "vocab_size": VOCABULARY}
    backbone = build_backbone(Plan.from_config(config))
    small = {}
    for name, value in flat(backbone.parameters()).items():
        if PLE_TABLE not in name:
            stored = "model.language_model." + name.removeprefix(text_prefix(backbone))
            is_matrix = value.ndim > 1
            small[stored] = mx.random.normal(value.shape) * 0.05 if is_matrix else value
    mx.save_safetensors(str(folder / "model.safetensors"), small, {"format": "pt"})
    columns = layers * text["hidden_size_per_layer_input"]
    write_table(folder / "model-table.safetensors", TABLE, VOCABULARY, columns)
    config_path.write_text(json.dumps(config))
    return folder


def write_table(path: Path, name: str, rows: int, columns: int) -> None:
    """Random bfloat16 numbers of size 1/128 to 1/64, written straight into a safetensors file."""
    entry: dict[str, Any] = {"dtype": "BF16", "shape": [rows, columns]}
    entry["data_offsets"] = [0, 2 * rows * columns]
    header = json.dumps({name: entry}).encode()
    header += b" " * (-len(header) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, rows, 4096):
            bits = rng.integers(0, 1 << 16, (min(4096, rows - start), columns), np.uint16)
            # Sign and mantissa are random, the exponent is not: no number is huge or NaN.
            file.write(((bits & 0x807F) | (120 << 7)).tobytes())


if __name__ == "__main__":
    main()
