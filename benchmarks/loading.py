"""What loading a checkpoint with `quantize` takes at its peak, beside its bound.

    python benchmarks/loading.py 31B
    python benchmarks/loading.py 26B-A4B --gb 8 --quantize 4

A sharded bfloat16 checkpoint of random weights is written, of a member's widths and as many of its
layers as make the size, loaded in a process of its own, and removed. The bound: 1.2 times what is
in memory afterwards and the largest tensor of the file.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from memory import CONFIGS

from mlx_gemma4.export.shards import Job, Output, write_shards
from mlx_gemma4.model.checkpoint import read_index
from mlx_gemma4.model.loader import build_backbone, load_backbone
from mlx_gemma4.model.names import flat, text_prefix
from mlx_gemma4.model.plan import Plan
from mlx_gemma4.model.quantize import Policy, described

_BLOCK = 1 << 26


def config_of(member: str, layers: int) -> dict[str, Any]:
    """config.json of a member's first layers."""
    config = CONFIGS[member]
    return config | {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}


def jobs_of(member: str, layers: int) -> list[Job]:
    """Every tensor of the member's first layers, under transformers' names."""
    backbone = build_backbone(Plan.from_config(config_of(member, layers)))
    prefix, shapes = text_prefix(backbone), {}
    for name, value in flat(backbone.parameters()).items():
        name, shape = "model." + name.removeprefix(prefix), value.shape
        if ".switch_glu.up_proj" in name:
            continue
        if ".switch_glu." in name:
            is_gate = ".gate_proj" in name
            name = name.split("switch_glu")[0] + ("gate_up_proj" if is_gate else "down_proj")
            shape = (shape[0], shape[1] * (2 if is_gate else 1), shape[2])
        shapes[name] = shape
    outputs = [Output.of(name, "BF16", shape) for name, shape in shapes.items()]
    return [Job([output], partial(blocks, output.nbytes)) for output in outputs]


def blocks(nbytes: int) -> Iterator[tuple[bytes]]:
    """Random bfloat16 values of a trained weight's size, the same in every block."""
    values = np.random.default_rng(0).normal(0, 0.02, _BLOCK // 2).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for start in range(0, nbytes, _BLOCK):
        yield (block[: nbytes - start],)


def write(folder: Path, member: str, nbytes: float) -> int:
    """Write the checkpoint; returns its number of layers."""
    layers = next(
        count
        for count in range(1, len(CONFIGS[member]["layer_types"]) + 1)
        if sum(job.nbytes for job in jobs_of(member, count)) >= nbytes
    )
    write_shards(folder, jobs_of(member, layers), {"format": "pt"}, 5 * 10**9)
    (folder / "config.json").write_text(json.dumps(config_of(member, layers)))
    return layers


def resident_peak() -> int:
    """The most bytes of memory that the process ever had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux adds to ru_maxrss what the parent had
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load(folder: Path, quantize: str) -> None:
    """Load in this process, and print what it took."""
    policy = Policy.asked_for(quantize)
    index = read_index(folder).values()
    stored, largest = sum(t.nbytes for t in index), max(t.nbytes for t in index)
    mx.eval(mx.zeros(1))
    import mlx_lm.models.gemma4  # noqa: F401

    before, started = resident_peak(), time.perf_counter()
    mx.reset_peak_memory()
    loaded = load_backbone(folder, quantize=policy)
    seconds, peak = time.perf_counter() - started, mx.get_peak_memory()
    quantized = sum(value.nbytes for value in flat(loaded.backbone.parameters()).values())
    print(described(loaded.packings.values()))
    for what, nbytes in {
        "stored": stored,
        "largest tensor": largest,
        "quantized": quantized,
        "bound": 1.2 * quantized + largest,
        "allocator's peak": peak,
        "resident peak": resident_peak(),
        "of which before loading": before,
    }.items():
        print(f"{what:<24}{nbytes / 1e9:8.3f} GB")
    print(f"{'loaded in':<24}{seconds:8.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("member", choices=["31B", "26B-A4B"])
    parser.add_argument("--gb", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--quantize", default="4")
    parser.add_argument("--folder", type=Path, help="load this one, which stays")
    given = parser.parse_args()
    if given.folder:
        load(given.folder, given.quantize)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        if shutil.disk_usage(folder).free < 1.3e9 * given.gb + 5e9:
            raise SystemExit(f"{folder} has too little room")
        layers = write(folder, given.member, given.gb * 1e9)
        print(f"{given.member}'s widths, {layers} layers, quantize {given.quantize}", flush=True)
        words = [given.member, "--quantize", given.quantize, "--folder", str(folder)]
        subprocess.run([sys.executable, __file__, *words], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
