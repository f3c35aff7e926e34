"""Fine-tune Gemma 4.

    python -m mlx_gemma4.train --model google/gemma-4-E2B-it --data my_data/

Without arguments it trains a small Gemma 4 that is built on this machine, on the docstrings of
the Python standard library: nothing is downloaded.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import (
    DataConfig,
    LoraConfig,
    Part,
    RunConfig,
    TrainConfig,
    build,
    flatten,
    read_arguments,
    read_yaml,
)
from ..errors import ConfigError, run_command

if TYPE_CHECKING:
    from .embedded import Task
    from .folder import RunFolder

_PARTS = [
    Part(RunConfig, "what is read and written"),
    Part(DataConfig, "data"),
    Part(TrainConfig, "training"),
    Part(LoraConfig, "LoRA"),
]
_GROUPS = [part.group for part in _PARTS]


def main(arguments: list[str] | None = None) -> None:
    settings, data_config, config, lora, of_lora = _settings(arguments)

    from ..export.fuse import with_quantized_model
    from .folder import claim
    from .parallel import Ranks
    from .run import Run

    ranks = Ranks.join()
    if not ranks.is_first:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            _train(None, with_quantized_model(settings), data_config, config, lora, of_lora)
        return
    with claim(settings.output, settings.resume or False) as folder:
        settings = with_quantized_model(settings)
        own = config.fine_tune_type == "lora" and settings.init_from is None
        of_run = flatten(settings, data_config, config, *[lora] * own)
        if not folder.resumed:
            folder.note({key: of_run[key] for key in of_run if key not in ("output", "resume")})
        try:
            _train(folder, settings, data_config, config, lora, of_lora)
        except KeyboardInterrupt:
            print(f"to go on: {Run(output=folder.path).to_resume}", flush=True)
            raise


_NO_MODEL = (
    "no --model given: training a small Gemma 4 made on this machine, on the docstrings "
    "of Python's standard library\nfor a real one: python -m mlx_gemma4.train "
    "--model google/gemma-4-E2B-it --data my_data/"
)


def _train(
    folder: RunFolder | None,
    settings: RunConfig,
    data_config: DataConfig,
    config: TrainConfig,
    lora: LoraConfig,
    of_lora: Sequence[str],
) -> None:
    """Load, read, train and tell, in a folder that is claimed; `of_lora` are the keys given.

    Ranks but the first have no folder.
    """
    from ..data.dataset import read
    from ..gemma import load
    from .evaluate import read_prompts
    from .finetune import finetune
    from .loggers import make_loggers

    # What is wrong with these shows before gigabytes are read.
    make_loggers(config.report_to, {})
    if config.sample_prompts:
        read_prompts(config.sample_prompts)
    model, data_folder = settings.model, settings.data
    task = _task(settings, folder is None or folder.resumed)
    if task:
        model, data_folder = task.model, data_folder or task.data
    loaded = partial(load, str(model), settings.init_from, quantize=settings.quantize)
    gemma = loaded()
    print(gemma)
    if gemma.lora:
        _require_no_other(flatten(gemma.lora), flatten(lora), of_lora, settings.init_from)
        lora = gemma.lora
    if config.verbose:
        print(f"  shared K/V: {gemma.loaded.verdict}")
    if settings.fit:
        data_config, config = _fitted(settings.fit, gemma.loaded.config, data_config, config, lora)
    data = read(data_folder, gemma, data_config)
    print(data)
    if data.has_media:
        del gemma
        gemma = loaded(encoders=True)
        print("the rows have images or audio: loaded with the encoders")
    before = task.ask(gemma) if task and folder else None
    given = lora if config.fine_tune_type == "lora" and settings.init_from is None else None
    run = finetune(gemma, data, config, lora=given, output=folder)
    if folder is None:
        return
    if task:
        print(f"asked:  {task.prompt}")
        print(f"before: {before!r}")
        print(f"after:  {task.ask(gemma)!r}")
    more = ["--quantize", settings.quantize] if settings.quantize else []
    more += task.flags if task else []
    _tell(run.summary, task.prompt if task else "...", more, config.verbose)


def _task(settings: RunConfig, resumed: bool) -> Task | None:
    """What is learned where no model is named."""
    from . import demo, embedded

    if settings.demo:
        return demo.prepare(settings.demo)
    if settings.model not in (None, str(embedded.model_folder())):
        return None
    if not resumed:
        print(_NO_MODEL, flush=True)
    return embedded.task()


def _fitted(
    memory: str, model: Mapping[str, Any], data: DataConfig, train: TrainConfig, lora: LoraConfig
) -> tuple[DataConfig, TrainConfig]:
    from ..memory.choose import fit_settings

    data, train = fit_settings(model, memory, data, train, lora)
    chosen = f"--max-seq-length {data.max_seq_length} --batch-size {train.batch_size}"
    accumulated = f"--grad-accumulation-steps {train.grad_accumulation_steps}"
    print(f"--fit {memory} chooses {chosen} {accumulated}", flush=True)
    return data, train


def _require_no_other(
    own: Mapping[str, Any], asked: Mapping[str, Any], keys: Sequence[str], adapter: str | None
) -> None:
    """Refuse settings that were given and are not those of the adapter that trains further."""
    other = [key for key in keys if asked[key] != own[key]]
    if other:
        differ = ", ".join(f"{key} {own[key]}, not {asked[key]}" for key in other)
        raise ConfigError(
            f"the adapter {adapter} has {differ}",
            wanted="the adapter's own settings of LoRA",
            do=f"leave out {', '.join(other)}",
        )


def _tell(summary: Mapping[str, Any], prompt: str, more: list[str], verbose: bool) -> None:
    """What came of the run; `more` is what generate is told besides."""
    if summary["val_loss"] is not None:
        print(f"validation loss: {summary['val_loss_before']:.3f} -> {summary['val_loss']:.3f}")
    if summary["best_step"] not in (None, summary["steps"]):
        print(f"lowest at step {summary['best_step']}: export it with --which best")
    if summary["test_loss"] is not None:
        print(f"test loss: {summary['test_loss']:.3f}")
    print(f"peak memory: {summary['peak_memory_gb']:.3f} GB")
    if verbose:
        print(
            f"  forecast: {summary['forecast_peak_gb']:.3f} GB; resident before the first step: "
            f"{summary['resident_before_gb']:.3f} GB; the step was compiled "
            f"{summary['compilations']} times"
        )
    output = Path(summary["adapter"]).parent
    words = ["--adapter", str(output), *more, "--prompt", prompt]
    print(f"adapter: {summary['adapter']}")
    print(f"report: {output / 'report.html'}")
    print(f"try it: python -m mlx_gemma4.generate {shlex.join(words)}")


def _settings(arguments: list[str] | None) -> tuple[Any, ...]:
    """The settings of each group, and the keys of LoRA's that were given."""
    values = read_arguments(
        "mlx_gemma4.train",
        __doc__,
        _PARTS,
        arguments,
        usage="[--model MODEL --data DATA] [--config FILE] [settings]",
        yaml_groups=_GROUPS,
        merge=_over,
    )
    if values.get("resume"):
        from .parallel import Ranks

        ranks = Ranks.join()  # the first of which has the folder
        with ranks.together():
            values = ranks.told(_resumed(values) if ranks.is_first else None)
    of_lora = sorted(values.keys() & flatten(LoraConfig()).keys())
    if values.get("fine_tune_type") == "full" and of_lora:
        raise ConfigError(
            f"fine_tune_type is full, and {', '.join(of_lora)} given",
            wanted="LoRA or full fine-tuning",
            do="leave out the settings of LoRA, or set fine_tune_type lora",
        )
    if values.get("fine_tune_type") == "full" and values.get("quantize"):
        raise ConfigError(
            f"fine_tune_type is full and quantize is {values['quantize']}",
            wanted="full precision: quantized weights have no gradient",
            do="leave out one of them",
        )
    if values.get("demo"):
        from .demo import defaults

        if given := [name for name in ("model", "data") if values.get(name)]:
            found = f"--demo is given, and --{given[0]}"
            raise ConfigError(found, wanted="one of them", do="leave one out")
        values = _over(defaults(values["demo"]), values)
    elif values.get("model") is None:
        from .embedded import DEFAULTS

        values = _over(DEFAULTS, values)
    elif values.get("data") is None:
        raise ConfigError(
            f"--model is {values['model']} and --data is not given",
            wanted="a folder with train.jsonl, or a .jsonl file",
            do="give --data",
        )
    return *build(_GROUPS, values, "the flags"), of_lora


def _over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, where the second wins; of iters and epochs one takes the other's place."""
    length = {"iters", "epochs"}
    replaced = length if any(over.get(key) is not None for key in length) else set()
    return {**{key: value for key, value in under.items() if key not in replaced}, **over}


def _resumed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run in the output folder or the newest, and what is given beside them."""
    from .checkpoint import require_same
    from .finetune import may_change
    from .folder import CONFIG, newest_run

    output = given.get("output") or newest_run()
    if output is None and given["resume"] != "auto":
        found = "--resume without --output, and runs/ holds no run"
        raise ConfigError(found, wanted="the folder of the run", do="give --output")
    given = {**given, "output": output}
    path = Path(output or "") / CONFIG
    if output is None or not path.is_file():
        return given

    saved = read_yaml(path)
    values = _over(saved, given)
    of_run = [build(_GROUPS, settings, str(path)) for settings in (saved, values)]
    free = may_change(of_run[0][2]) | flatten(RunConfig()).keys() - {"quantize"}
    then, now = (
        {key: value for key, value in flatten(*settings).items() if key not in free}
        for settings in of_run
    )
    require_same(then, now, path)
    return values


if __name__ == "__main__":
    run_command(main)
