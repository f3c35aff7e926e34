"""The memory formula: what the released members take, and how near the allocator it is.

    python benchmarks/memory.py members     peaks of the five members, in seconds
    python benchmarks/memory.py published   the same at 4 bits beside published ones, in seconds
    python benchmarks/memory.py grid        small models of every shape, some minutes
    python benchmarks/memory.py e2b 256     E2B's real dimensions in float32, 10 GB of memory

e2b fills weights with constants in this process: no checkpoint is written or read.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from shapes import SHAPES
from step_memory import build_model, grid, measured, name, plan_of

from mlx_gemma4.memory.estimate import StepSettings, estimate
from mlx_gemma4.model.plan import FULL, SLIDING, Plan
from mlx_gemma4.model.quantize import Packing


def member_config(
    base: str, layers: int, period: int, hidden: int, width: int, heads: int,
    kv_heads: tuple[int, int], window: int, shared: int = 0, ple: int = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """config.json of a released member: `period` - 1 sliding layers before each full one."""
    kinds = ([SLIDING] * (period - 1) + [FULL]) * layers
    return {
        **SHAPES[base],
        "model_type": "gemma4_text",
        "num_hidden_layers": layers,
        "layer_types": kinds[:layers],
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads[0],
        "num_global_key_value_heads": kv_heads[1],
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": window,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": ple,
        "num_kv_shared_layers": shared,
        **more,
    }


MOE = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
CONFIGS = {
    "E2B": member_config("e2b", 35, 5, 1536, 6144, 8, (1, 1), 512, shared=20, ple=256),
    "E4B": member_config("e4b", 42, 6, 2560, 10240, 8, (2, 2), 512, shared=18, ple=256),
    "12B": member_config("dense", 48, 6, 3840, 15360, 16, (8, 1), 1024),
    "26B-A4B": member_config("moe", 30, 6, 2816, 2112, 16, (8, 2), 1024, **MOE),
    "31B": member_config("dense", 60, 6, 5376, 21504, 32, (16, 4), 1024),
}
"""By the table of released sizes; where a released config.json differs, `fit` reads that."""

MEMBERS = {called: Plan.from_config(config) for called, config in CONFIGS.items()}


def members() -> None:
    """Peaks of LoRA rank 8, Adam, batch_size 1, bfloat16, on this device."""
    print("| member | rematerialize | T | bfloat16 | 8-bit | 4-bit |\n|---|---|---|---|---|---|")
    for called, plan in MEMBERS.items():
        for layers in (0, len(plan.layers)):
            for length in (1024, 2048, 4096, 8192):
                given = StepSettings(length=length, remat_layers=layers)
                packings = (None, Packing(64, 8), Packing(64, 4))
                peaks = [estimate(plan, replace(given, packing=p)).peak / 1e9 for p in packings]
                cells = " | ".join(f"{peak:.1f}" for peak in peaks)
                print(f"| {called} | {'all' if layers else 'none'} | {length} | {cells} |")


PUBLISHED = {"E2B": 14.5, "26B-A4B": 20.4, "31B": 41.2}
"""GB on an M3 Max at 4 bits, chat rows of up to 3,320 tokens, by gemma-4-swift-mlx."""


def published() -> None:
    """Peaks at 4 bits and 3,328 positions, as a GPU is reckoned with, beside published ones."""
    print("| member | resident | kept | rematerialised | published |\n|---|---|---|---|---|")
    for called, plan in MEMBERS.items():
        given = StepSettings(length=3328, packing=Packing(64, 4), device="gpu")
        kept, lean = (
            estimate(plan, replace(given, remat_layers=layers)) for layers in (0, len(plan.layers))
        )
        figures = [kept.resident / 1e9, kept.peak / 1e9, lean.peak / 1e9]
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        print(f"| {called} | {cells} | {PUBLISHED.get(called, '')} |")


def compare(label: str, plan: Plan, settings: StepSettings, built: Any = None, **how: Any) -> None:
    """Print the formula's figures beside the allocator's."""
    found = estimate(plan, settings)
    resident, step = measured(plan, settings, built, **how)
    print(
        f"{label}: resident {found.resident / 1e6:.1f} MB, allocator {resident / 1e6:.1f}; "
        f"step {found.step / 1e6:.0f} MB, allocator {step / 1e6:.0f} "
        f"({100 * (found.step / step - 1):+.0f}%; "
        f"peak {100 * (found.peak / (resident + step) - 1):+.1f}%)",
        flush=True,
    )


def real_dimensions(lengths: list[int]) -> None:
    """E2B in float32, every layer rematerialised: loss and gradients, then the compiled step."""
    plan = MEMBERS["E2B"]
    settings = StepSettings(dtype="float32", remat_layers=len(plan.layers))
    built = build_model(plan, settings, constant=True)
    for length in lengths:
        given = replace(settings, length=length)
        alone = replace(given, compiled=False)
        compare(f"T {length}, loss and gradients", plan, alone, built, gradients_alone=True)
        compare(f"T {length}, compiled step with Adam", plan, given, built)


def main() -> None:
    match sys.argv[1:]:
        case ["members"]:
            members()
        case ["published"]:
            published()
        case ["grid"]:
            for shape, layers, of_plan, settings in grid():
                label = name((shape, layers, of_plan, settings))
                compare(label, plan_of(shape, layers, **of_plan), settings)
        case ["e2b", *lengths]:
            real_dimensions([int(length) for length in lengths] or [256])
        case _:
            print(__doc__)


if __name__ == "__main__":
    main()
