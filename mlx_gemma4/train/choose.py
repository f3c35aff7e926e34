"""Settings that fit a memory: what `--fit 16GB` and `python -m mlx_gemma4.fit` choose.

>>> from mlx_gemma4.model.plan import Plan, read_config
>>> from mlx_gemma4.train.choose import choose
>>> choice = choose(Plan.from_config(read_config(tiny)), 1e9, max_seq_length=128)
>>> choice.batch_size, choice.rematerialize
(4, 'none')
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import LoraConfig
from ..errors import ConfigError
from ..model.plan import Plan
from .memory import Forecast, forecast, resident_bytes, size

__all__ = ["Choice", "choose", "machine_memory", "parse_memory"]

MARGIN = 0.15
"""How far a forecast of a step may be off."""

_LEAST_LENGTH = 256

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Choice:
    """Settings of a run, in the words of config.py, and what they take.

    Attributes:
        bits: of the weights; None is the checkpoint as it is.
        rematerialize: none or layer.
    """

    bits: int | None
    max_seq_length: int
    batch_size: int
    grad_accumulation_steps: int
    rematerialize: str
    forecast: Forecast

    def settings(self) -> dict[str, Any]:
        """What goes to DataConfig and TrainConfig."""
        names = ("max_seq_length", "batch_size", "grad_accumulation_steps", "rematerialize")
        return {name: getattr(self, name) for name in names}

    def flags(self) -> str:
        """The same as flags of `python -m mlx_gemma4.train`."""
        return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in self.settings().items())


def choose(
    plan: Plan,
    memory: float,
    *,
    max_seq_length: int = 2048,
    batch_size: int = 4,
    fine_tune_type: str = "lora",
    lora: LoraConfig = LoraConfig(),
    bits: int | None = None,
    may_quantize: bool = False,
    may_shorten: bool = False,
    **how: Any,
) -> Choice:
    """The first settings of an order of preference that fit.

    What is given up, in this order: keeping all activations (then layers are rematerialised);
    rows of a batch (then as many batches are accumulated, so that an optimizer step sees the same
    rows); with `may_quantize`, full precision (8, then 4 bits); with `may_shorten`, length.

    Args:
        memory: bytes.
        max_seq_length, batch_size: what is wanted.
        bits: of the checkpoint's weights; None is full precision.
        may_quantize: consider other checkpoints of the model, of 8 and 4 bits.
        may_shorten: consider half of the length, a quarter, ... down to 256.
        how: other arguments of `forecast`: group_size, dtype, attention, compiled, pace.

    Raises:
        ConfigError: nothing fits.
    """
    adapters = lora if fine_tune_type == "lora" else None
    how |= {"fine_tune_type": fine_tune_type, "lora": lora}
    lengths = [max_seq_length]
    while may_shorten and lengths[-1] // 2 >= _LEAST_LENGTH:
        lengths.append(lengths[-1] // 2)
    precisions = [bits]
    if may_quantize and bits is None and adapters is not None:
        precisions += [8, 4]
    least = float("inf")
    for length in lengths:
        for precision in precisions:
            given = (how.get("group_size", 64), how.get("dtype", "bfloat16"))
            if (resident := resident_bytes(plan, adapters, precision, *given)) >= memory:
                least = min(least, resident)
                continue
            for batch, accumulated, lean in _ways(batch_size):
                found = forecast(
                    plan, batch_size=batch, length=length, bits=precision, rematerialize=lean, **how
                )
                needed = found.resident + found.step * (1 + MARGIN)
                least = min(least, needed)
                if needed <= memory:
                    way = "layer" if lean else "none"
                    return Choice(precision, length, batch, accumulated, way, found)
    raise ConfigError(
        f"the least that was tried takes {size(least)}, and {size(memory)} are given",
        wanted="memory for weights, adapters, optimizer and one row of a batch",
        do="take a smaller or a quantized checkpoint, a shorter max_seq_length, or a lower rank",
    )


def _ways(batch_size: int) -> Iterator[tuple[int, int, bool]]:
    """(batch size, batches accumulated, rematerialised) in order of preference."""
    yield batch_size, 1, False
    batch = batch_size
    while batch >= 1:
        yield batch, -(-batch_size // batch), True
        batch //= 2


def parse_memory(text: str) -> int:
    """Bytes of "16GB", "500 MB", "24GiB" or a bare number of gigabytes.

    Raises:
        ConfigError: no number, or a unit that is not known.

    >>> from mlx_gemma4.train.choose import parse_memory
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
    """Bytes that training may use here: Metal's recommended working set, or the RAM."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
