"""What `python -m mlx_gemma4.fit` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import DataConfig, FitConfig, LoraConfig, RunConfig, TrainConfig
from ..errors import ConfigError
from ..model.plan import Plan
from ..model.quantize import stored_quantization
from ..storage import size
from .choose import Choice, choose
from .estimate import DTYPE_BYTES, MOMENTS, StepSettings, estimate

__all__ = ["answer", "stored_weights"]

_LENGTHS = (1024, 2048, 4096, 8192)


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
    full = train.fine_tune_type == "full"
    stored = stored_weights(config)
    wanted = StepSettings(
        batch_size=train.batch_size,
        length=data.max_seq_length,
        attention=train.attention,
        lora=None if full else lora,
        moments=MOMENTS[train.optimizer],
        **stored | ({"bits": fit.bits} if fit.bits else {}),
    )
    where = "given" if train.memory else "of this machine"
    print(f"Gemma 4 {plan.member} ({plan.model_type}) in {size(memory)} {where}")
    what = "every weight" if full else f"LoRA rank {lora.rank} on {', '.join(lora.targets)}"
    print(f"trained: {what}")
    if rows:
        print(f"data: the longest of {rows[1]} rows has about {rows[0]} tokens")
    if fit.table:
        _print_table(plan, wanted, memory)
    choice = choose(plan, memory, wanted, may_quantize=not fit.bits, may_shorten=True)
    _print_choice(choice, run, train, lora, data, stored["bits"], len(plan.layers))


def stored_weights(config: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """How a checkpoint stores its weights: bits, group_size and dtype of `StepSettings`.

    Args:
        dtype: of the weights in memory; None is what config.json says.

    Raises:
        ConfigError: a dtype that is none of weights.
    """
    text = config.get("text_config") or {}
    names = (text.get("dtype"), config.get("dtype"), text.get("torch_dtype"))
    dtype = dtype or next((n for n in (*names, config.get("torch_dtype")) if n), "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"config.json has dtype {dtype!r}",
            wanted="bfloat16, float16 or float32",
            do="take config.json from the original checkpoint",
        )
    quantization = stored_quantization(config) or {"bits": None, "group_size": 64}
    return {"dtype": dtype, **{key: quantization[key] for key in ("bits", "group_size")}}


def _print_table(plan: Plan, wanted: StepSettings, memory: int) -> None:
    """Peaks by length and precision, of a batch of one row."""
    alone = wanted.bits is not None or wanted.lora is None
    precisions = [wanted.bits] if alone else [None, 8, 4]
    heads = "".join(f"{f'{bits}-bit' if bits else wanted.dtype:>12}" for bits in precisions)
    print("\npeak with batch_size 1 (* does not fit)")
    print(f"{'max_seq_length':>14}    rematerialize{heads}")
    for layers in (0, len(plan.layers)):
        for length in _LENGTHS:
            given = replace(wanted, batch_size=1, length=length, remat_layers=layers)
            peaks = [estimate(plan, replace(given, bits=bits)).peak for bits in precisions]
            cells = "".join(f"{size(n) + ('*' if n > memory else ' '):>12}" for n in peaks)
            print(f"{length:>14}  {'all' if layers else 'none':>15}{cells}")


def _print_choice(
    choice: Choice,
    run: RunConfig,
    train: TrainConfig,
    lora: LoraConfig,
    data: DataConfig,
    bits: int | None,
    layers: int,
) -> None:
    """The best that fits, and the command that trains so."""
    settings, usual = choice.settings, LoraConfig()
    print(f"\nbest that fits: {choice.estimate}")
    print(f"{settings.remat_layers} of {layers} layers rematerialised")
    if settings.length < data.max_seq_length:
        print(f"max_seq_length is {settings.length}: {data.max_seq_length} tokens do not fit")
    model = str(run.model)
    if settings.bits is not None and settings.bits != bits:
        model = f"{Path(model).name}-{settings.bits}bit"
        print(f"first: mlx_lm.convert --hf-path {run.model} --mlx-path {model} "
              f"-q --q-bits {settings.bits}")  # fmt: skip
    words = [f"--model {model}", f"--data {run.data or 'my_data/'}"]
    if settings.lora is None:
        words.append("--fine-tune-type full")
    else:
        words.append(f"--lora-rank {lora.rank}")
        if lora.targets != usual.targets:
            words.append(f"--lora-targets {' '.join(lora.targets)}")
        if lora.num_layers != usual.num_layers:
            words.append(f"--num-layers {lora.num_layers}")
        if lora.use_dora:
            words.append("--use-dora")
    words += [f"--memory {train.memory}"] if train.memory else []
    words += [f"--attention {train.attention}"] if train.attention != "auto" else []
    words.append(choice.flags())
    print(f"python -m mlx_gemma4.train {' '.join(words)}")
