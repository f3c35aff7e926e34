"""The allocator's own figures of training steps of small models, and the settings to look at.

`measured` is the one place that knows how a model is built and a step is run.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from shapes import SHAPES

from mlx_gemma4.config import LoraConfig
from mlx_gemma4.data.batch.collate import collate
from mlx_gemma4.data.example import Example
from mlx_gemma4.gemma import Gemma4
from mlx_gemma4.memory.estimate import StepSettings
from mlx_gemma4.model.capability import inspect_backbone
from mlx_gemma4.model.loader import LoadedBackbone, build_backbone
from mlx_gemma4.model.names import PLE_TABLE, flat, text_model
from mlx_gemma4.model.plan import FULL, SLIDING, Plan
from mlx_gemma4.model.quantize import Packing
from mlx_gemma4.nn.batch import StepOptions
from mlx_gemma4.train.masters import with_masters
from mlx_gemma4.train.step import CompiledStep, gradients, loss_and_grads, train_step

SIZE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 128,
    "vocab_size": 4096,
    "vocab_size_per_layer_input": 4096,
    "model_type": "gemma4_text",
}
OWN = {"e2b": {"hidden_size_per_layer_input": 32}, "e4b": {"hidden_size_per_layer_input": 32},
       "moe": {"moe_intermediate_size": 128}}  # fmt: skip


def plan_of(shape: str, layers: int | None = None, **changes: Any) -> Plan:
    """The plan of a model with all features of a family member whose steps take 100 MB."""
    config: dict[str, Any] = {**SHAPES[shape], **SIZE, **OWN.get(shape, {}), **changes}
    if shape == "unified":
        config["model_type"] = "gemma4_unified_text"
        config.pop("hidden_size_per_layer_input")
    if layers is not None:
        # The last of each kind shares keys and values where the member does that.
        kinds = ([SLIDING, FULL] * layers)[:layers]
        shared = min(layers - 2, config["num_kv_shared_layers"])
        config |= {"num_hidden_layers": layers, "layer_types": kinds}
        config |= {"num_kv_shared_layers": max(0, shared)}
    return Plan.from_config(config)


def build_model(
    plan: Plan, settings: StepSettings, *, constant: bool = False
) -> tuple[Gemma4, optim.Optimizer]:
    """A model with random weights as `load` and `add_lora` leave it, and its optimizer.

    Args:
        constant: fill the weights with one value, which is quicker for large ones.
    """
    backbone = build_backbone(plan)
    text_model(backbone).pop(PLE_TABLE, None)
    if constant:
        small = [(n, mx.full(v.shape, 0.02)) for n, v in flat(backbone.parameters()).items()]
        backbone.load_weights(small)
    backbone.set_dtype(getattr(mx, settings.dtype))
    if settings.packing is not None:
        _quantize(backbone, settings.packing)
    backbone.freeze()
    loaded = LoadedBackbone(backbone, plan, {}, None, inspect_backbone(backbone), 0, 0)
    gemma = Gemma4("random", loaded, None, None, frozenset())
    if settings.lora is None:
        gemma.train_all()
    else:
        gemma.add_lora(settings.lora)
    backbone.train()
    trainable = backbone.trainable_parameters()
    optimizer = with_masters(optim.Adam(1e-4, bias_correction=True), trainable)
    optimizer.init(trainable)
    mx.eval(backbone.parameters(), optimizer.state)
    return gemma, optimizer


def _quantize(backbone: nn.Module, packing: Packing) -> None:
    """Quantize what mlx_lm.convert quantizes."""
    own = getattr(backbone, "quant_predicate", None)

    def settings(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % packing.group_size:
            return False
        return own(path, module) if own else True

    nn.quantize(backbone, **packing.settings, class_predicate=settings)


def make_batch(plan: Plan, settings: StepSettings):
    """A batch as `collate` makes it, of random tokens."""
    T, random = settings.length, np.random.default_rng(0)
    mask = np.arange(T + 1) >= (T + 1) * (1 - settings.targets)
    rows = [
        Example(random.integers(3, plan.vocab_size, T + 1).astype(np.int32), mask, "random")
        for _ in range(settings.batch_size)
    ]
    batch = collate(rows)
    changes: Mapping[str, Any] = {}
    if plan.ple is not None:
        shape = (*batch.tokens_BT.shape, len(plan.layers), plan.ple.width)
        changes = {"ple_BTLP": mx.zeros(shape, getattr(mx, settings.dtype))}
    if settings.longest is not None:
        segments = np.broadcast_to(np.arange(T, dtype=np.int32) // settings.longest,
                                   batch.tokens_BT.shape)  # fmt: skip
        changes |= {"segments_BT": mx.array(segments), "longest": settings.longest}
    return dataclasses.replace(batch, **changes)


def measured(
    plan: Plan, settings: StepSettings, built: Any = None, *, gradients_alone: bool = False
) -> tuple[int, int]:
    """(resident, step) in bytes as the allocator says: the step's peak beside what was resident.

    Args:
        built: of `build_model`, to be used again.
        gradients_alone: loss and gradients, without mx.compile and update.
    """
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    gemma, optimizer = built or build_model(plan, settings)
    gc.collect()
    mx.clear_cache()
    resident = mx.get_active_memory()
    batch = make_batch(plan, settings)
    mx.eval([value for value in batch.fields().values() if isinstance(value, mx.array)])
    options = StepOptions(settings.remat_layers, settings.attention)
    mx.clear_cache()
    mx.reset_peak_memory()
    if gradients_alone:
        sums, grads = gradients(gemma, batch, options=options)
        mx.eval(sums.loss, grads)
    elif settings.compiled:
        sums, norm = CompiledStep(gemma, optimizer, options=options)([batch])
    else:
        sums, norm = train_step(gemma, optimizer, [batch], options=options)
    if not gradients_alone:
        mx.eval(sums.loss, norm, gemma.backbone.trainable_parameters(), optimizer.state)
    return resident - (0 if built else before), mx.get_peak_memory() - resident


def held_after_forward(plan: Plan, settings: StepSettings) -> int:
    """Bytes that the graph of the gradients holds when the loss is known."""
    gemma, optimizer = build_model(plan, settings)
    del optimizer
    batch = make_batch(plan, settings)
    mx.eval([value for value in batch.fields().values() if isinstance(value, mx.array)])
    gc.collect()
    before = mx.get_active_memory()
    loss, _, grads = loss_and_grads(gemma, batch, attention=settings.attention)
    mx.eval(loss)
    held = mx.get_active_memory() - before
    del grads
    return held


def setting(shape: str, length: int, attention: str = "blockwise", layers: int = 4, **changes):
    """(shape, layers, plan changes, StepSettings); capital letters are the plan's."""
    of_plan = {k: changes.pop(k) for k in list(changes) if k in SHAPES["e2b"] or k in SIZE}
    given = {"dtype": "float32", "lora": LoraConfig(rank=8), **changes}
    return shape, layers, of_plan, StepSettings(length=length, attention=attention, **given)


FAST = [
    setting("e2b", 1024, layers=3),
    setting("e2b", 1024, remat_layers=3, layers=3, vocab_size=40960),
    setting("dense", 768, "plain", layers=2, compiled=False),
    setting(
        "dense", 1664, remat_layers=2, layers=2, batch_size=2, intermediate_size=768, compiled=False
    ),
    setting("moe", 640, layers=3, compiled=False),
    setting("unified", 1024, longest=128, layers=3, compiled=False),
    setting("e4b", 1024, targets=0.3, layers=3, compiled=False),
    setting("dense", 512, "plain", layers=2, batch_size=2, compiled=False),
    setting("dense", 1024, layers=2, vocab_size=32768, remat_layers=1),
    setting("dense", 256, layers=2, lora=None, hidden_size=512, vocab_size=16384, compiled=False),
]
"""Settings for the tests: a step takes about 100 MB or more, and a second or so. Compiled ones have
large products: where the device is quick, MLX runs ahead of it by less, and takes less memory."""


def grid() -> list:
    """A wider grid, for benchmarks/memory.py."""
    wide = LoraConfig(rank=64)
    return [
        *(
            setting(shape, length, attention, layers=6, remat_layers=layers, compiled=compiled)
            for shape in ("e2b", "e4b", "dense", "moe", "unified")
            for length, attention in ((1024, "plain"), (2048, "blockwise"))
            for layers in (0, 6)
            for compiled in (True, False)
        ),
        setting("e2b", 1024, batch_size=2, remat_layers=4),
        setting("dense", 1024, lora=wide),
        setting("dense", 1024, lora=LoraConfig(targets=("q_proj", "v_proj"))),
        setting("moe", 1024, lora=LoraConfig(rank=4, targets=("q_proj", "router.proj"))),
        setting("moe", 1024, lora=LoraConfig(rank=4, targets=("experts",))),
        setting("dense", 1024, lora=None, vocab_size=32768),
        setting("dense", 1024, lora=None, remat_layers=4, compiled=False),
        setting("e2b", 1024, lora=None, remat_layers=4),
        setting("e4b", 2048, targets=0.3),
        setting("e2b", 2048, longest=256, remat_layers=2),
        setting("dense", 384, "plain", dtype="bfloat16"),
        setting("e2b", 384, "blockwise", dtype="bfloat16", lora=None),
        setting("dense", 384, "plain", packing=Packing(32, 8)),
        setting("e4b", 384, "plain", packing=Packing(32, 4)),
        setting("dense", 1024, layers=12, remat_layers=5),
    ]


def name(case) -> str:
    shape, layers, of_plan, settings = case
    usual = setting(shape, settings.length)[3]
    changed = [
        f"{k}={'full' if v is None else v.targets if k == 'lora' else v}"
        for k, v in vars(settings).items()
        if v != vars(usual)[k] or k == "length"
    ]
    return "-".join([shape, str(layers), *changed, *(f"{k}={v}" for k, v in of_plan.items())])
