"""Settings that fit a memory: what `--fit 16GB` and `python -m mlx_gemma4.fit` choose.

>>> from mlx_gemma4.memory.choose import choose
>>> from mlx_gemma4.memory.estimate import StepSettings
>>> from mlx_gemma4.model.plan import Plan, read_config
>>> plan = Plan.from_config(read_config(tiny))
>>> settings, accumulated = choose(plan, 1e9, StepSettings(batch_size=4, length=128))
>>> settings.batch_size, settings.remat_layers, accumulated
(4, 0, 1)
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from ..config import DataConfig, LoraConfig, TrainConfig
from ..config.schema import wrong
from ..errors import ConfigError
from ..model.plan import Plan
from ..model.quantize import Packing, Policy, require_full_precision, stored_quantization
from ..storage import size
from .estimate import DTYPE_BYTES, MOMENTS, StepSettings, estimate

MARGIN = 0.15
"""How far the formula's step may be off."""

_LEAST_LENGTH = 256

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def choose(
    plan: Plan, memory: float, wanted: StepSettings = StepSettings(), *, may_quantize: bool = False
) -> tuple[StepSettings, int]:
    """The first settings of an order of preference that fit.

    What is given up, in this order: keeping all activations (the fewest layers that are enough
    are rematerialised); rows of a batch (then as many batches are accumulated, so that an
    optimizer step sees the same rows); with `may_quantize` 16 bits, for 8 and then 4; half of the
    length, and half of that, down to 256.

    Args:
        memory: bytes.
        wanted: settings to begin with; its remat_layers are not read.

    Returns:
        (settings that fit, batches whose gradients are summed).

    Raises:
        ConfigError: nothing fits.
    """

    def needed(settings: StepSettings) -> float:
        found = estimate(plan, settings)
        return found.resident + found.step * (1 + MARGIN)

    lengths = [wanted.length]
    while lengths[-1] // 2 >= _LEAST_LENGTH:
        lengths.append(lengths[-1] // 2)
    may_quantize = may_quantize and wanted.packing is None and wanted.lora is not None
    packings = [None, Packing(64, 8), Packing(64, 4)] if may_quantize else [wanted.packing]
    batches = [wanted.batch_size >> halvings for halvings in range(wanted.batch_size.bit_length())]
    every, least = range(len(plan.layers) + 1), float("inf")
    for length, packing in product(lengths, packings):
        given = replace(wanted, length=length, packing=packing)
        lean = needed(replace(given, batch_size=1, remat_layers=every[-1]))
        least = min(least, lean)
        for batch in batches if lean <= memory else ():
            steps = [replace(given, batch_size=batch, remat_layers=number) for number in every]
            # Steps take less with every layer.
            fewest = bisect_left(steps, True, key=lambda settings: needed(settings) <= memory)
            if fewest < len(steps):
                return steps[fewest], math.ceil(wanted.batch_size / batch)
    raise ConfigError(
        f"the least that was tried takes {size(least)}, and {size(memory)} are given",
        wanted="memory for weights, adapters, optimizer and one row of a batch",
        do="take a smaller or a quantized checkpoint, a shorter max_seq_length, or a lower rank",
    )


def step_settings(
    config: Mapping[str, Any],
    length: int,
    train: TrainConfig,
    lora: LoraConfig | None,
    quantize: str | None = None,
) -> StepSettings:
    """The step of a run that keeps all activations.

    Args:
        config: the model's config.json, which says how weights are stored.
        length: positions of a row.
        lora: not read where every weight trains.
        quantize: how weights are quantized while they are loaded.

    Raises:
        ConfigError: config.json has a dtype that is none of weights, every weight is to be
            trained and they are quantized, or `quantize` for weights that are.
    """
    text = config.get("text_config") or {}
    names = (part.get(key) for key in ("dtype", "torch_dtype") for part in (text, config))
    dtype = next(filter(None, names), "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"config.json has dtype {dtype!r}",
            wanted="bfloat16, float16 or float32",
            do="take config.json from the original checkpoint",
        )
    packing, stored = None, stored_quantization(config)
    if quantize is not None:
        require_full_precision(config, "the model")
        packing = Policy.asked_for(quantize).usual
    elif stored is not None:
        packing = Packing(stored["group_size"], stored["bits"], stored.get("mode", "affine"))
    return StepSettings(
        batch_size=train.batch_size,
        length=length,
        attention=train.attention,
        lora=lora if train.fine_tune_type == "lora" else None,
        packing=packing,
        dtype=dtype,
        moments=MOMENTS[train.optimizer],
    )


def fit_settings(
    config: Mapping[str, Any], fit: str, data: DataConfig, train: TrainConfig, lora: LoraConfig
) -> tuple[DataConfig, TrainConfig]:
    """Settings of a run of the model of a config.json that fit a memory such as "16GB".

    batch_size and max_seq_length are chosen; `memory` is set, by which the run then finds how many
    layers it rematerialises. Raises ConfigError where nothing fits.
    """
    wanted = step_settings(config, data.max_seq_length, train, lora)
    plan, memory = Plan.from_config(config), parse_memory(fit)
    settings, accumulated = choose(plan, memory, wanted)
    train = replace(
        train,
        memory=fit,
        batch_size=settings.batch_size,
        grad_accumulation_steps=train.grad_accumulation_steps * accumulated,
    )
    return replace(data, max_seq_length=settings.length), train


def parse_memory(text: str) -> int:
    """Bytes of "16GB", "500 MB", "24GiB" or a bare number of gigabytes.

    Raises:
        ConfigError: no number, or a unit that is not known.

    >>> from mlx_gemma4.memory.choose import parse_memory
    >>> parse_memory("16GB"), parse_memory("0.5 GiB")
    (16000000000, 536870912)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].lower() or "gb" if match else ""
    if not match or unit not in _UNITS or not float(match[1]):
        raise wrong("memory", repr(text), "a number with a unit: 16GB, 24GiB, 800MB")
    return int(float(match[1]) * _UNITS[unit])
