"""Settings that fit a memory: what `--fit 16GB` and `python -m mlx_gemma4.fit` choose.

>>> from mlx_gemma4.memory.choose import choose
>>> from mlx_gemma4.memory.estimate import StepSettings
>>> from mlx_gemma4.model.plan import Plan, read_config
>>> plan = Plan.from_config(read_config(tiny))
>>> choice = choose(plan, 1e9, StepSettings(batch_size=4, length=128))
>>> choice.batch_size, choice.settings.remat_layers
(4, 0)
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import DataConfig, LoraConfig, TrainConfig
from ..errors import ConfigError
from ..model.plan import Plan
from ..storage import size
from .estimate import MOMENTS, Estimate, StepSettings, estimate, resident_bytes

__all__ = ["Choice", "choose", "fit_settings", "machine_memory", "parse_memory"]

MARGIN = 0.15
"""How far the formula's step may be off."""

_LEAST_LENGTH = 256

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Choice:
    """Settings that fit, and what they take.

    Attributes:
        settings: of a step.
        grad_accumulation_steps: batches whose gradients are summed, so that an optimizer step
            sees the same number of rows as was asked for.
    """

    settings: StepSettings
    grad_accumulation_steps: int
    estimate: Estimate

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.settings.batch_size

    def flags(self) -> str:
        """Flags of `python -m mlx_gemma4.train`; it finds the number of layers itself."""
        return (
            f"--max-seq-length {self.settings.length} --batch-size {self.batch_size} "
            f"--grad-accumulation-steps {self.grad_accumulation_steps}"
        )


def choose(
    plan: Plan,
    memory: float,
    wanted: StepSettings = StepSettings(),
    *,
    may_quantize: bool = False,
    may_shorten: bool = False,
) -> Choice:
    """The first settings of an order of preference that fit.

    What is given up, in this order: keeping all activations (the fewest layers that are enough
    are rematerialised); rows of a batch (then as many batches are accumulated, so that an
    optimizer step sees the same rows); with `may_quantize` 16 bits, for 8 and then 4; with
    `may_shorten` half of the length, and half of that, down to 256.

    Args:
        memory: bytes.
        wanted: settings to begin with; its remat_layers are not read.

    Raises:
        ConfigError: nothing fits.
    """
    lengths = [wanted.length]
    while may_shorten and lengths[-1] // 2 >= _LEAST_LENGTH:
        lengths.append(lengths[-1] // 2)
    precisions = [wanted.bits]
    if may_quantize and wanted.bits is None and wanted.lora is not None:
        precisions += [8, 4]
    least = float("inf")
    for length in lengths:
        for bits in precisions:
            given = replace(wanted, length=length, bits=bits)
            if (resident := resident_bytes(plan, given)) >= memory:
                least = min(least, resident)
                continue
            for batch, accumulated in _batches(wanted.batch_size):
                found = _fewest_layers(plan, memory, replace(given, batch_size=batch))
                needed = _needed(plan, found)
                least = min(least, needed)
                if needed <= memory:
                    return Choice(found, accumulated, estimate(plan, found))
    raise ConfigError(
        f"the least that was tried takes {size(least)}, and {size(memory)} are given",
        wanted="memory for weights, adapters, optimizer and one row of a batch",
        do="take a smaller or a quantized checkpoint, a shorter max_seq_length, or a lower rank",
    )


def fit_settings(
    plan: Plan,
    fit: str,
    data: DataConfig,
    train: TrainConfig,
    lora: LoraConfig,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str = "bfloat16",
) -> tuple[DataConfig, TrainConfig, str]:
    """Settings of a run that fit a memory such as "16GB", and flags that say what was chosen.

    Rows of a batch and max_seq_length are chosen; `memory` is set, by which the run then finds
    how many layers it rematerialises.

    Raises:
        ConfigError: nothing fits.
    """
    wanted = StepSettings(
        batch_size=train.batch_size,
        length=data.max_seq_length,
        attention=train.attention,
        lora=lora if train.fine_tune_type == "lora" else None,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        moments=MOMENTS[train.optimizer],
    )
    choice = choose(plan, parse_memory(fit), wanted, may_shorten=True)
    train = replace(
        train,
        memory=fit,
        batch_size=choice.batch_size,
        grad_accumulation_steps=train.grad_accumulation_steps * choice.grad_accumulation_steps,
    )
    return replace(data, max_seq_length=choice.settings.length), train, choice.flags()


def _fewest_layers(plan: Plan, memory: float, settings: StepSettings) -> StepSettings:
    """The settings with the fewest rematerialised layers that fit; with all where none does."""

    def fits(number: int) -> bool:
        return _needed(plan, replace(settings, remat_layers=number)) <= memory

    fewest = bisect_left(range(len(plan.layers)), True, key=fits)
    return replace(settings, remat_layers=fewest)


def _needed(plan: Plan, settings: StepSettings) -> float:
    found = estimate(plan, settings)
    return found.resident + found.step * (1 + MARGIN)


def _batches(batch_size: int) -> Iterator[tuple[int, int]]:
    """(batch size, batches accumulated), halved down to one row."""
    batch = batch_size
    while batch >= 1:
        yield batch, -(-batch_size // batch)
        batch //= 2


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
        raise ConfigError(
            f"memory is {text!r}",
            wanted="a number with a unit: 16GB, 24GiB, 800MB",
            do="write it like 16GB",
        )
    return int(float(match[1]) * _UNITS[unit])


def machine_memory() -> int:
    """Bytes that training may use here: what the GPU's driver recommends, or the RAM."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
