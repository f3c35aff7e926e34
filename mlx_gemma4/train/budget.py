"""What a run may keep: as many layers are rematerialised as the memory asks for, and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..config import DataConfig, LoraConfig, TrainConfig
from ..data.batches import longest_bound, padded_length
from ..data.dataset import Dataset
from ..data.examples import lengths_of
from ..errors import Gemma4Error
from ..gemma import Gemma4
from ..model.names import text_model
from ..model.quantize import stored_quantization
from .choose import MARGIN, choose, machine_memory, parse_memory
from .memory import Forecast, forecast, size

__all__ = ["Budget", "fit_settings", "plan_run"]


@dataclass(frozen=True)
class Budget:
    """The memory of a run, foreseen.

    Attributes:
        memory: bytes that it may take.
        layers: how many are rematerialised, from the first.
        forecast: of its largest step; None where it cannot be made.
        note: what there is to say of it.
    """

    memory: int
    layers: int
    forecast: Forecast | None
    note: str


def plan_run(gemma: Gemma4, data: Dataset, config: TrainConfig) -> Budget:
    """How many layers are rematerialised, and what the run's largest step takes then.

    With `rematerialize: auto` none is if all fits; else as few as are enough, by the forecast; all
    where there is none.
    """
    memory = parse_memory(config.memory) if config.memory else machine_memory()
    count = len(gemma.plan.layers)
    layers = 0 if config.rematerialize == "none" else count
    try:
        step = _step_of(gemma, data, config)
        if config.rematerialize == "auto":
            layers = _fewest_layers(gemma, memory, step)
        # As `forward` counts: all layers of a model are True.
        found = forecast(gemma.plan, rematerialize=layers == count or layers, **step)
    except Gemma4Error as error:
        return Budget(memory, layers, None, f"memory is not foreseen: {error.found}")
    note = f"forecast: {found}; {layers} of {count} layers rematerialised"
    if found.peak > memory:
        note += f"\nmore than the {size(memory)} there are: a shorter max_seq_length takes less"
    return Budget(memory, layers, found, note)


def _fewest_layers(gemma: Gemma4, memory: int, step: dict[str, Any]) -> int:
    """How many layers are enough; each spares about the same."""
    count = len(gemma.plan.layers)
    whole = forecast(gemma.plan, rematerialize=False, **step)
    excess = whole.resident + whole.step * (1 + MARGIN) - memory
    if excess <= 0:
        return 0
    lean = forecast(gemma.plan, rematerialize=True, **step)
    spared = max(1.0, (whole.step - lean.step) * (1 + MARGIN) / count)
    return min(count, math.ceil(excess / spared))


def fit_settings(
    gemma: Gemma4, fit: str, data: DataConfig, train: TrainConfig, lora: LoraConfig
) -> tuple[DataConfig, TrainConfig, str]:
    """Settings that fit a memory such as "16GB", and the flags that say what was chosen.

    Raises:
        ConfigError: nothing fits.
    """
    choice = choose(
        gemma.plan,
        parse_memory(fit),
        max_seq_length=data.max_seq_length,
        batch_size=train.batch_size,
        fine_tune_type=train.fine_tune_type,
        lora=lora,
        may_shorten=True,
        **_weights_of(gemma),
    )
    chosen = choice.settings()
    data = replace(data, max_seq_length=chosen.pop("max_seq_length"))
    chosen["grad_accumulation_steps"] *= train.grad_accumulation_steps
    return data, replace(train, memory=fit, **chosen), choice.flags()


def _weights_of(gemma: Gemma4) -> dict[str, Any]:
    """How the weights are stored, in the words of `forecast`."""
    stored = stored_quantization(gemma.loaded.config)
    dtype = str(text_model(gemma.backbone).norm.weight.dtype).rpartition(".")[2]
    return {"dtype": dtype, **{k: stored[k] for k in ("bits", "group_size") if stored}}


def _step_of(gemma: Gemma4, data: Dataset, config: TrainConfig) -> dict[str, Any]:
    """The largest step of a run, in the words of `forecast`."""
    positions = lengths_of(data.train) - 1
    longest = int(positions.max())
    length = padded_length(longest)
    if config.packing:
        filled = min(max(data.config.max_seq_length, longest), int(positions.sum()))
        length = padded_length(filled)
    bound = longest_bound(longest, length) if config.packing else None
    return {
        "batch_size": min(config.batch_size, len(positions)),
        "length": length,
        "longest": bound,
        "targets": _share_of_targets(data),
        "fine_tune_type": config.fine_tune_type,
        "lora": gemma.lora or LoraConfig(),
        "attention": config.attention,
        **_weights_of(gemma),
    }


def _share_of_targets(data: Dataset) -> float:
    """Of a sample, where examples would have to be made to know."""
    some = data.train[:1000]
    return sum(e.num_targets for e in some) / max(1, sum(len(e) - 1 for e in some))
