"""Will it fit? What fine-tuning a Gemma 4 takes, from its config.json alone.

python -m mlx_gemma4.fit google/gemma-4-E2B-it
python -m mlx_gemma4.fit google/gemma-4-31B-it --data my_data/ --memory 64GB
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .config import (
    DataConfig,
    FitConfig,
    LoraConfig,
    Part,
    RunConfig,
    TrainConfig,
    build,
    read_arguments,
)
from .errors import DataError, run_command


def main(arguments: list[str] | None = None) -> None:
    given = read_arguments(
        "mlx_gemma4.fit",
        __doc__,
        [
            Part(
                RunConfig, "what is read", only=("model", "quantize", "data"), positional=("model",)
            ),
            Part(FitConfig, "the answer"),
            Part(DataConfig, "data", only=("max_seq_length",)),
            Part(
                TrainConfig,
                "training",
                only=("memory", "batch_size", "fine_tune_type", "attention"),
            ),
            Part(LoraConfig, "LoRA", only=("rank", "targets", "layers", "num_layers", "use_dora")),
        ],
        arguments,
    )
    groups = [RunConfig, DataConfig, TrainConfig, LoraConfig, FitConfig]
    run, data, train, lora, fit = build(groups, given, "the flags")

    from .memory.choose import parse_memory
    from .memory.report import answer
    from .model.download import fetch_config
    from .nn.budgets import machine_memory

    config = fetch_config(run.model)
    memory = parse_memory(train.memory) if train.memory else machine_memory()
    rows = _longest(run.data) if run.data else None
    if rows:
        limit = data.max_seq_length if "max_seq_length" in given else rows[0]
        data = replace(data, max_seq_length=max(2, min(rows[0], limit)))
    answer(run, data, train, lora, fit, config, memory, rows)


def _longest(data: str) -> tuple[int, int]:
    """(about how many tokens the longest row has, rows), at 3 bytes a token and 8 a turn."""
    from .data.chat.formats import read_rows
    from .data.read.files import find_files

    longest = count = 0
    for files in find_files(data).values():
        for row in (row for file in files for row in read_rows(file.path)):
            turns: Any = row.messages
            nbytes = sum(len(str(turn["content"]).encode()) + 24 for turn in turns)
            longest, count = max(longest, (len(row.text.encode()) + nbytes) // 3 + 1), count + 1
    if not count:
        raise DataError(f"{data} has no rows", wanted="at least one", do="name another file")
    return longest, count


if __name__ == "__main__":
    run_command(main)
