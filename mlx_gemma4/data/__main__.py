"""Look at what would be trained on.

    python -m mlx_gemma4.data --model google/gemma-4-E2B-it --data my_data/ --show 3

It prints what was found, counted and left out; no weights are read. The settings are those of
python -m mlx_gemma4.train, also from its YAML file.
"""

from __future__ import annotations

import json
import os
import sys

from ..config import (
    DataConfig,
    LoraConfig,
    Part,
    RunConfig,
    ShowConfig,
    TrainConfig,
    build,
    read_arguments,
)
from ..errors import ConfigError, run_command
from ..model.tokenizer import text_side
from ..storage import write_text

_SHOWN = 20  # examples of each split on the page, at least


def main(arguments: list[str] | None = None) -> None:
    of_a_run = [RunConfig, DataConfig, TrainConfig, LoraConfig]
    parts = [
        Part(RunConfig, "what is read", only=("model", "data")),
        Part(ShowConfig, "what is shown"),
        Part(DataConfig, "data"),
        Part(TrainConfig, "batches", only=("batch_size", "packing")),
    ]
    usage = "--model MODEL --data DATA [--show N] [settings]"
    values = read_arguments(
        "mlx_gemma4.data", __doc__, parts, arguments, usage=usage, yaml_groups=of_a_run
    )
    run, config, train, _, look = build([*of_a_run, ShowConfig], values, "the flags")
    if run.model is None or run.data is None:
        found = f"--model is {run.model} and --data is {run.data}"
        wanted = "a model, for its tokenizer and template, and data"
        raise ConfigError(found, wanted=wanted, do="give both")

    from .dataset import read
    from .inspect import page, report

    data = read(run.data, text_side(run.model), config)
    figures = data.stats(train.batch_size, train.packing)
    if look.html:
        shown = [
            data.show(index, split)
            for split, part in figures["splits"].items()
            for index in range(min(max(look.show, _SHOWN), part["examples"]))
        ]
        try:
            write_text(look.html, page(figures, shown))
        except OSError as error:
            found = f"cannot write {look.html}: {error}"
            raise ConfigError(found, wanted="a file to write", do="change --html") from None
    if look.json:
        print(json.dumps(figures, indent=2))
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(report(figures))
    for index in range(min(look.show, len(data))):
        print("\n" + data.show(index).text(colour=colour))


if __name__ == "__main__":
    run_command(main)
