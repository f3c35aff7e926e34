"""What `python -m mlx_gemma4.fit` prints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import DataConfig, FitConfig, LoraConfig, RunConfig, TrainConfig, flatten
from ..model.plan import Plan
from ..model.quantize import Packing
from ..storage import size
from .choose import choose, step_settings
from .estimate import StepSettings, estimate


def answer(
    run: RunConfig,
    data: DataConfig,
    train: TrainConfig,
    lora: LoraConfig,
    fit: FitConfig,
    config: Mapping[str, Any],
    memory: int,
    rows: tuple[int, int] | None,
) -> None:
    """Print what a model takes, a table of peaks, the best settings that fit, and the command.

    Args:
        config: the model's config.json.
        memory: bytes that there are.
        rows: (about how many tokens the longest row has, rows) of the data, if any was named.
    """
    plan = Plan.from_config(config)
    wanted = step_settings(config, data.max_seq_length, train, lora, run.quantize)
    where = "given" if train.memory else "of this machine"
    print(f"Gemma 4 {plan.member} ({plan.model_type}) in {size(memory)} {where}")
    what = f"LoRA rank {lora.rank} on {', '.join(lora.targets)}" if wanted.lora else "every weight"
    print(f"trained: {what}")
    if rows:
        print(f"data: the longest of {rows[1]} rows has about {rows[0]} tokens")
    if fit.table:
        _print_table(plan, wanted, memory)
    settings, accumulated = choose(plan, memory, wanted, may_quantize=True)
    print(f"\nbest that fits: {estimate(plan, settings)}")
    print(f"{settings.remat_layers} of {len(plan.layers)} layers rematerialised")
    if settings.length < wanted.length:
        print(f"max_seq_length is {settings.length}: {wanted.length} tokens do not fit")
    quantize: Any = run.quantize
    if settings.packing != wanted.packing:
        assert settings.packing is not None
        quantize = str(settings.packing.bits)
        print(f"quantized to {quantize} bits while loading: as it is stored it does not fit")
    run = replace(run, quantize=quantize, data=run.data or "my_data/")
    of_lora = [lora] if wanted.lora else []
    given, usual = flatten(run, train, *of_lora), flatten(RunConfig(), TrainConfig(), LoraConfig())
    words = {key: value for key, value in given.items() if value != usual[key]} | {
        "max_seq_length": settings.length,
        "batch_size": settings.batch_size,
        "grad_accumulation_steps": accumulated,
    }
    flags = [word for key, value in words.items() for word in _flag(key, value)]
    print("python -m mlx_gemma4.train", shlex.join(flags))


def _flag(key: str, value: Any) -> list[str]:
    """One setting as a command line has it: `--lora-rank 4`, `--use-dora`."""
    values = value if isinstance(value, list) else [value]
    return ["--" + key.replace("_", "-"), *(str(v) for v in values if v is not True)]


def _print_table(plan: Plan, wanted: StepSettings, memory: int) -> None:
    """Peaks by length and precision, of a batch of one row."""
    alone = wanted.packing is not None or wanted.lora is None
    precisions = [wanted.packing] if alone else [None, Packing(64, 8), Packing(64, 4)]
    heads = "".join(f"{f'{one.bits}-bit' if one else wanted.dtype:>12}" for one in precisions)
    print("\npeak with batch_size 1 (* does not fit)")
    print(f"{'max_seq_length':>14}    rematerialize{heads}")
    for layers in (0, len(plan.layers)):
        for length in (1024, 2048, 4096, 8192):
            given = replace(wanted, batch_size=1, length=length, remat_layers=layers)
            peaks = [estimate(plan, replace(given, packing=one)).peak for one in precisions]
            cells = "".join(f"{size(n) + ('*' if n > memory else ' '):>12}" for n in peaks)
            print(f"{length:>14}  {'all' if layers else 'none':>15}{cells}")
