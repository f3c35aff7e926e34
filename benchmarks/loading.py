"""What loading a checkpoint with `quantize` takes at its peak, beside its bound, and a step on it.

    python benchmarks/loading.py 31B
    python benchmarks/loading.py 26B-A4B --gb 8 --quantize 4
    python benchmarks/loading.py E2B --step 32

A sharded bfloat16 checkpoint of random weights is written, of a member's widths and as many of its
layers as make the size (all, where layers share keys and values), loaded in a process of its own,
and removed. The bound: 1.2 times what is in memory afterwards and the largest tensor of the file.
The PLE table stays in the file. A step is one of LoRA, rank 8, on every linear module but the
router, with every layer rematerialised and Adam.
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
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from memory import CONFIGS

from mlx_gemma4.config import LoraConfig, TrainConfig
from mlx_gemma4.export.shards import Job, Output, write_shards
from mlx_gemma4.gemma import Gemma4
from mlx_gemma4.memory.estimate import StepSettings, estimate
from mlx_gemma4.model.checkpoint import read_index
from mlx_gemma4.model.loader import LoadedBackbone, build_backbone, load_backbone
from mlx_gemma4.model.names import PLE_TABLE, flat, text_prefix
from mlx_gemma4.model.plan import Plan
from mlx_gemma4.model.quantize import Packing, Policy, described
from mlx_gemma4.nn.batch import Batch, StepOptions
from mlx_gemma4.train.optim import make_optimizer
from mlx_gemma4.train.step import CompiledStep

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


@cache
def block() -> bytes:
    """Random bfloat16 values of a trained weight's size."""
    values = np.random.default_rng(0).normal(0, 0.02, _BLOCK // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def blocks(nbytes: int) -> Iterator[tuple[bytes]]:
    """As many of them as a tensor has, the same in every block."""
    for start in range(0, nbytes, _BLOCK):
        yield (block()[: nbytes - start],)


def write(folder: Path, member: str, nbytes: float) -> int:
    """Write the checkpoint; returns its number of layers."""
    every = len(CONFIGS[member]["layer_types"])
    counts = range(every if CONFIGS[member]["num_kv_shared_layers"] else 1, every)
    enough = (n for n in counts if sum(job.nbytes for job in jobs_of(member, n)) >= nbytes)
    layers = next(enough, every)
    write_shards(folder, jobs_of(member, layers), {"format": "pt"}, 5 * 10**9)
    (folder / "config.json").write_text(json.dumps(config_of(member, layers)))
    return layers


def resident_peak() -> int:
    """The most bytes of memory that the process ever had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux adds to ru_maxrss what the parent had
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load(folder: Path, quantize: str, length: int) -> None:
    """Load in this process, take a step of so many tokens, and print what each took."""
    policy = Policy.asked_for(quantize)
    index = [t for key, t in read_index(folder).items() if PLE_TABLE not in key]
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
    print(f"{'loaded in':<24}{seconds:8.0f} s", flush=True)
    if length:
        step(loaded, length)


def step(loaded: LoadedBackbone, length: int) -> None:
    """One compiled step of LoRA, and what it took."""
    gemma = Gemma4("random", loaded, None, None, frozenset())
    targets = ("all-linear",)
    gemma.add_lora(LoraConfig(rank=8, targets=targets))
    parameters = gemma.backbone.trainable_parameters()
    optimizer = make_optimizer(TrainConfig(), 1, parameters)
    tokens = np.random.default_rng(0).integers(3, loaded.plan.vocab_size, (1, length + 1))
    batch = Batch.from_tokens(tokens).with_ple_rows(gemma)
    settings = StepSettings(
        length=length,
        remat_layers=len(loaded.plan.layers),
        packing=Packing(64, 4),
        lora=LoraConfig(rank=8, targets=targets),
    )
    mx.eval(parameters, optimizer.state, [v for v in batch.fields().values() if v is not None])
    resident, started = mx.get_active_memory(), time.perf_counter()
    mx.reset_peak_memory()
    options = StepOptions(len(loaded.plan.layers))
    sums, norm = CompiledStep(gemma, optimizer, options=options)([batch])
    mx.eval(sums.loss, norm, gemma.backbone.trainable_parameters(), optimizer.state)
    formula = estimate(loaded.plan, settings)
    print(f"loss {float(sums.loss / sums.count):.3f}, norm of the gradient {float(norm):.3f}")
    for what, nbytes in {
        "before the step": resident,
        "by the formula": formula.resident,
        "training peak": mx.get_peak_memory(),
        "by the formula ": formula.peak,
        "resident peak": resident_peak(),
    }.items():
        print(f"{what:<24}{nbytes / 1e9:8.3f} GB")
    print(f"{'step in':<24}{time.perf_counter() - started:8.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("member", choices=list(CONFIGS))
    parser.add_argument("--gb", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--quantize", default="4")
    parser.add_argument("--step", type=int, default=0, help="tokens of a step after it")
    parser.add_argument("--folder", type=Path, help="load this one, which stays")
    given = parser.parse_args()
    if given.folder:
        load(given.folder, given.quantize, given.step)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        if shutil.disk_usage(folder).free < 1.3e9 * given.gb + 5e9:
            raise SystemExit(f"{folder} has too little room")
        layers = write(folder, given.member, given.gb * 1e9)
        print(f"{given.member}'s widths, {layers} layers, quantize {given.quantize}", flush=True)
        words = [given.member, "--quantize", given.quantize, "--folder", str(folder)]
        words += ["--step", str(given.step)]
        subprocess.run([sys.executable, __file__, *words], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
