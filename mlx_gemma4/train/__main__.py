"""Fine-tune Gemma 4.

    python -m mlx_gemma4.train --model google/gemma-4-E2B-it --data my_data/

Without arguments it trains a small Gemma 4 that is built on this machine, on the docstrings of
the Python standard library: nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ..config import (
    DataConfig,
    LoraConfig,
    Part,
    RunConfig,
    TrainConfig,
    build,
    flatten,
    read_arguments,
)
from ..errors import ConfigError, run_command

_GROUPS = {
    RunConfig: "what is read and written",
    DataConfig: "data",
    TrainConfig: "training",
    LoraConfig: "LoRA",
}


def main(arguments: list[str] | None = None) -> None:
    run_config, data_config, train_config, lora_config = _settings(arguments)

    from ..data.dataset import read
    from ..gemma import load
    from ..memory.choose import fit_settings
    from . import embedded
    from .finetune import finetune

    own = run_config.model is None
    if own:
        print(
            "no --model given: training a small Gemma 4 made on this machine, on the docstrings "
            "of Python's standard library\nfor a real one: python -m mlx_gemma4.train "
            "--model google/gemma-4-E2B-it --data my_data/",
            flush=True,
        )
        model, data_folder = embedded.prepare()
    else:
        model, data_folder = run_config.model, run_config.data
    gemma = load(model)
    print(gemma)
    if run_config.fit:
        data_config, train_config = fit_settings(
            gemma.loaded.config, run_config.fit, data_config, train_config, lora_config
        )
        print(
            f"--fit {run_config.fit} chooses --max-seq-length {data_config.max_seq_length} "
            f"--batch-size {train_config.batch_size} "
            f"--grad-accumulation-steps {train_config.grad_accumulation_steps}",
            flush=True,
        )
    data = read(run_config.data or data_folder, gemma, data_config)
    print(data)
    before = gemma.generate(embedded.PROMPT, max_tokens=40) if own else None
    run = finetune(
        gemma,
        data,
        train_config,
        lora=lora_config if train_config.fine_tune_type == "lora" else None,
        output=run_config.output,
        resume=run_config.resume,
    )
    if own:
        print(f"asked:  {embedded.PROMPT}")
        print(f"before: {before!r}")
        print(f"after:  {gemma.generate(embedded.PROMPT, max_tokens=40)!r}")
    _tell(run.summary, str(model))


def _tell(summary: Mapping[str, Any], model: str) -> None:
    """What came of the run."""
    if summary["val_loss"] is not None:
        print(f"validation loss: {summary['val_loss_before']:.3f} -> {summary['val_loss']:.3f}")
    if summary["test_loss"] is not None:
        print(f"test loss: {summary['test_loss']:.3f}")
    print(
        f"peak memory: {summary['peak_memory_gb']:.3f} GB (forecast "
        f"{summary['forecast_peak_gb']:.3f}), of which {summary['resident_before_gb']:.3f} GB were "
        f"resident before the first step; the step was compiled {summary['compilations']} times"
    )
    print(f"adapter: {summary['adapter']}")
    print(
        f"try it: python -m mlx_gemma4.generate --model {model} "
        f'--adapter {summary["adapter"]} --prompt "..."'
    )


def _settings(arguments: list[str] | None) -> tuple[Any, ...]:
    values = read_arguments(
        "mlx_gemma4.train",
        __doc__,
        [Part(group, title) for group, title in _GROUPS.items()],
        arguments,
        usage="[--model MODEL --data DATA] [--config FILE] [settings]",
        yaml_groups=list(_GROUPS),
    )
    of_lora = sorted(values.keys() & flatten(LoraConfig()).keys())
    if values.get("fine_tune_type") == "full" and of_lora:
        raise ConfigError(
            f"fine_tune_type is full, and {', '.join(of_lora)} given",
            wanted="LoRA or full fine-tuning",
            do="leave out the settings of LoRA, or set fine_tune_type lora",
        )
    if values.get("model") is None:
        from .embedded import DEFAULTS

        replaced = {"iters"} if "epochs" in values else set()
        values = {k: v for k, v in DEFAULTS.items() if k not in replaced} | values
    elif values.get("data") is None:
        raise ConfigError(
            f"--model is {values['model']} and --data is not given",
            wanted="a folder with train.jsonl, or a .jsonl file",
            do="give --data",
        )
    run_config, *rest = build(list(_GROUPS), values, "the flags")
    if run_config.output is None:
        if run_config.resume:
            raise ConfigError(
                "--resume without --output", wanted="the folder of the run", do="give --output"
            )
        free = next(name for name in map("runs/{}".format, count(1)) if not Path(name).exists())
        run_config = dataclasses.replace(run_config, output=free)
    return run_config, *rest


if __name__ == "__main__":
    run_command(main)
