"""Look at what would be trained on.

    python -m mlx_gemma4.data --model google/gemma-4-E2B-it --data my_data/ --show 3

It prints what was found, counted and left out; no weights are read. The settings are those of
python -m mlx_gemma4.train, also from its YAML file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, LoraConfig, RunConfig, TrainConfig, add_flags, build, read_yaml
from ..errors import ConfigError, run_command
from ..model.plan import Plan, read_config


@dataclass(frozen=True)
class TextSide:
    """A model without its weights."""

    plan: Plan
    tokenizer: Any


def text_side(path_or_hub_id: str | Path) -> TextSide:
    """Plan and tokenizer of a model; its weights are neither downloaded nor read."""
    from ..model.loader import resolve
    from ..model.tokenizer import load_tokenizer

    folder = resolve(path_or_hub_id, weights=False)
    return TextSide(Plan.from_config(read_config(folder)), load_tokenizer(folder))


def main(arguments: list[str] | None = None) -> None:
    options, model, data, config, train = _settings(arguments)

    from .dataset import read
    from .report import report
    from .show import page

    dataset = read(data, text_side(model), config)
    figures = dataset.stats(train.batch_size, train.packing)
    if options["html"]:
        _write(Path(options["html"]), page(dataset, figures, max(options["show"], 20)))
    if options["json"]:
        print(json.dumps(figures, indent=2))
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(report(dataset, figures))
    for index in range(min(options["show"], len(dataset))):
        print("\n" + dataset.show(index).text(colour=colour))


def _settings(
    arguments: list[str] | None,
) -> tuple[dict[str, Any], str, str, DataConfig, TrainConfig]:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_gemma4.data",
        usage="python -m mlx_gemma4.data --model MODEL --data DATA [--show N] [settings]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = argparse.SUPPRESS
    parser.add_argument("-c", "--config", metavar="FILE", help="a YAML file of a run's settings")
    parser.add_argument("--model", default=default, help="a model folder or a Hugging Face id")
    parser.add_argument("--data", default=default, help="files, a folder, or a Hub dataset")
    parser.add_argument("--batch-size", type=int, default=default, help="rows in a batch")
    parser.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="whether examples share rows (default: yes)",
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the first N examples"
    )
    parser.add_argument("--html", metavar="FILE", help="write the same as a page, with examples")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_flags(parser, DataConfig, "data")
    given = vars(parser.parse_args(arguments))
    options = {name: given.pop(name) for name in ("config", "show", "html", "json")}
    groups = [RunConfig, DataConfig, TrainConfig, LoraConfig]
    from_file = read_yaml(options["config"]) if options["config"] else {}
    build(groups, from_file, str(options["config"]))
    run, data, train, _ = build(groups, {**from_file, **given}, "the flags")
    if run.model is None or run.data is None:
        raise ConfigError(
            f"--model is {run.model} and --data is {run.data}",
            wanted="a model, for its tokenizer and template, and data",
            do="give both",
        )
    return options, run.model, run.data, data, train


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}", wanted="a file to write", do="change --html"
        ) from None


if __name__ == "__main__":
    run_command(main)
