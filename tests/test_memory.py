"""The forecast of memory against the allocator's own figures, over a grid of small models."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest

from mlx_gemma4.config import LoraConfig
from mlx_gemma4.model.plan import Plan
from mlx_gemma4.model.tiny import SHAPES
from mlx_gemma4.train.memory import forecast
from mlx_gemma4.train.simulator.evaluator import CPU
from mlx_gemma4.train.simulator.skeleton import build_batch, build_skeleton
from mlx_gemma4.train.step import COMPILES, CompiledStep, train_step

TOLERANCE = 0.15

MIDDLE = {
    "hidden_size": 160,
    "intermediate_size": 512,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 96,
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 2048,
    "model_type": "gemma4_text",
}
OWN = {"e2b": {"hidden_size_per_layer_input": 32}, "e4b": {"hidden_size_per_layer_input": 32},
       "moe": {"moe_intermediate_size": 128}}  # fmt: skip


def middle(shape: str) -> Plan:
    """The plan of a model of MBs with all features of a family member."""
    base = "dense" if shape == "text" else shape
    config = {**SHAPES[base], **MIDDLE, **OWN.get(base, {})}
    if shape == "text":
        config |= {"num_hidden_layers": 3, "layer_types": config["layer_types"][:3]}
    if shape == "unified":
        config["model_type"] = "gemma4_unified_text"
        del config["hidden_size_per_layer_input"]
    return Plan.from_config(config)


def measured(plan: Plan, **settings) -> int:
    """What the allocator says of one step: its peak minus what was resident before the batch."""
    how = {"rematerialize": settings["rematerialize"], "attention": settings["attention"]}
    lora = settings["lora"] if settings["fine_tune_type"] == "lora" else None
    dtype = getattr(mx, settings["dtype"])
    model = build_skeleton(plan, lora=lora, bits=settings["bits"], group_size=32, dtype=dtype)
    gemma, optimizer = model.gemma, model.optimizer
    mx.eval(gemma.backbone.parameters(), optimizer.state)
    model.frozen, model.trained, model.state = {}, {}, {}
    mx.clear_cache()
    resident = mx.get_active_memory()
    B, T, longest = settings["batch_size"], settings["length"], settings["longest"]
    batch = build_batch(plan, B, T, longest=longest, targets=settings["targets"], dtype=dtype)
    fields = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    mx.eval([value for value in fields if isinstance(value, mx.array)])
    compiled = CompiledStep(gemma, optimizer, **how)
    mx.clear_cache()
    mx.reset_peak_memory()
    if settings["compiled"]:
        loss, targets = compiled([batch])
    else:
        loss, targets = train_step(gemma, optimizer, [batch], **how)
    mx.eval(loss, targets, gemma.backbone.trainable_parameters(), optimizer.state)
    return mx.get_peak_memory() - resident


def setting(shape: str, length: int = 320, attention: str = "blockwise", **changes):
    defaults = {
        "batch_size": 1, "longest": None, "targets": 1.0, "fine_tune_type": "lora",
        "lora": LoraConfig(rank=8), "bits": None, "dtype": "float32", "rematerialize": False,
        "compiled": False,
    }  # fmt: skip
    return shape, {**defaults, "length": length, "attention": attention, **changes}


GRID = [
    *(
        setting(shape, length, attention, rematerialize=rematerialize)
        for shape in ("e2b", "e4b", "dense", "moe", "text", "unified")
        for length, attention in ((192, "plain"), (320, "blockwise"))
        for rematerialize in (False, True)
    ),
    setting("e2b", 192, batch_size=2),
    setting("e2b", 192, batch_size=2, rematerialize=True),
    setting("dense", lora=LoraConfig(rank=64)),
    setting("dense", lora=LoraConfig(rank=64, targets=("q_proj", "v_proj"))),
    setting("moe", lora=LoraConfig(rank=4, targets=("q_proj", "v_proj", "router.proj"))),
    setting("e2b", 192, "plain", fine_tune_type="full"),
    setting("dense", 192, "plain", fine_tune_type="full"),
    setting("dense", fine_tune_type="full", rematerialize=True),
    setting("e4b", 192, bits=4, rematerialize=True),
    setting("dense", 192, "plain", bits=8),
    setting("dense", 192, "plain", bits=4, batch_size=2, rematerialize=True),
    setting("e4b", targets=0.3),
    setting("unified", 640, longest=128),
    setting("e2b", 640, longest=128, rematerialize=True),
    setting("dense", 192, attention="plain", longest=64),
    setting("text", 160, "plain", dtype="bfloat16"),
    setting("text", 160, compiled=True),
    setting("text", 160, compiled=True, rematerialize=True),
]


def name(case) -> str:
    shape, settings = case
    usual = setting(shape)[1]
    changed = [f"{k}={v}" for k, v in settings.items() if v != usual[k] or k == "length"]
    return "-".join([shape, *(word.replace("LoraConfig", "") for word in changed)])


@pytest.mark.parametrize("case", GRID, ids=map(name, GRID))
def test_the_forecast_is_near_the_allocator(case):
    shape, settings = case
    if settings["compiled"] and not COMPILES:
        pytest.skip("this MLX does not compile the step")
    plan = middle(shape)
    predicted = forecast(plan, group_size=32, pace=CPU, **settings).step
    actual = measured(plan, **settings)
    assert abs(predicted - actual) <= TOLERANCE * actual, (
        f"forecast {predicted / 1e6:.2f} MB, allocator {actual / 1e6:.2f} MB, "
        f"{100 * (predicted / actual - 1):+.1f}%"
    )


def test_the_grid_is_wide():
    assert len(GRID) >= 30
