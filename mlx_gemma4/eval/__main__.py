"""How good is a model, and what did its adapter change?

    python -m mlx_gemma4.eval google/gemma-4-E2B-it --adapter runs/1 --data my_data/
    python -m mlx_gemma4.eval google/gemma-4-E2B-it --adapter runs/1 --tasks arc_easy --limit 100

The base and the adapter on it, side by side on the same examples. What came of a run's adapter is
kept in the run's folder, evaluation.json, and shown in its report.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..config import (
    DataConfig,
    EvalConfig,
    Part,
    RunConfig,
    TrainConfig,
    build,
    flatten,
    read_arguments,
    read_yaml,
)
from ..errors import ConfigError, run_command
from .tasks import require_tasks, run_tasks

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..data.example import Example
    from .scores import Evaluation

_GROUPS = [RunConfig, DataConfig, TrainConfig, EvalConfig]


def main(arguments: list[str] | None = None) -> None:
    help_ = {
        "model": "a model folder or id; default: the one that the adapter names",
        "data": "as for training; default: the data of the adapter's run",
    }
    parts = [
        Part(
            RunConfig, "the model and the data", ("model", "quantize", "data"), ("model?",), help_
        ),
        Part(EvalConfig, "what is asked"),
        Part(DataConfig, "data; default: as in the adapter's run"),
        Part(TrainConfig, "batches", ("batch_size",)),
    ]
    usage = "[MODEL] [--adapter RUN_OR_ADAPTER] [--data DATA] [--tasks TASK ...] [settings]"
    given = read_arguments("mlx_gemma4.eval", __doc__, parts, arguments, usage=usage)
    run, data, train, asked = build(_GROUPS, _completed(given), "the flags")
    if not (run.data or asked.tasks):
        found = "neither --data nor --tasks is given"
        raise ConfigError(found, wanted="something to ask", do="give --data or --tasks")
    if not run.model:
        wanted = "a model, or an adapter that names its base"
        raise ConfigError("no model is given", wanted=wanted, do="give one, or --adapter")
    if asked.tasks:
        require_tasks(asked.tasks)
    _evaluate(run, data, train, asked)


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, over what the run of the adapter had: its model, its data, how it read it."""
    from ..lora.state import adapter_folder, base_model_of
    from ..train.folder import CONFIG, run_of

    if not (adapter := given.get("adapter")):
        return given
    folder = run_of(adapter)
    saved = read_yaml(folder / CONFIG) if folder else {}
    asked = {"tasks", "data"} & given.keys()
    same = {"quantize", *flatten(DataConfig()), *([] if asked else ["data"])}
    values = {key: value for key, value in saved.items() if key in same} | given
    return (
        values if "model" in given else {**values, "model": base_model_of(adapter_folder(adapter))}
    )


def _evaluate(
    run: RunConfig,
    data_config: DataConfig,
    train: TrainConfig,
    asked: EvalConfig,
) -> None:
    """Load, ask the base and then the adapter on it, tell, and keep it with the run."""
    from ..data.dataset import read
    from ..gemma import load
    from ..report.page import evaluation_rows
    from ..train.folder import run_of
    from ..train.run import keep_evaluation
    from .scores import evaluate

    gemma = load(str(run.model), quantize=run.quantize)
    data = read(run.data, gemma, data_config) if run.data else None
    split, examples = _chosen(data, asked)
    if data and data.has_media:
        gemma = load(str(run.model), quantize=run.quantize, encoders=True)
    adapter, found, results = asked.adapter, [], []
    for is_adapter in (False, True) if adapter else (False,):
        if adapter and is_adapter:
            gemma.load_adapter(adapter)
        if data:
            result = evaluate(
                gemma,
                examples,
                batch_size=train.batch_size,
                max_seq_length=data_config.max_seq_length,
                answers=asked.answers,
                max_tokens=asked.max_tokens,
            )
            found.append(result)
        if asked.tasks:
            limit, size = asked.limit, train.batch_size
            results.append(run_tasks(gemma, asked.tasks, limit=limit, batch_size=size))
    told = _told(found, results) | {"model": run.model, "adapter": adapter}
    told["data"] = f"{split} of {data.source}: {found[0].counted}" if data else None
    print(*filter(None, [told["data"]]), sep="\n")
    for row in evaluation_rows(told):
        print("".join(f"{cell:<22}" for cell in row).rstrip())
    if adapter and (folder := run_of(adapter)):
        shown = [data.show(i, split) for i in range(min(3, len(examples)))] if data else []
        keep_evaluation(folder, told, shown)
        print(f"kept in {folder}/evaluation.json and report.html")


def _chosen(data: Dataset | None, asked: EvalConfig) -> tuple[str, Sequence[Example]]:
    """The split that is asked for, or the first of test, valid and train that has examples."""
    if data is None:
        return "", []
    there = [name for name in ("test", "valid", "train") if getattr(data, name)]
    split = asked.split or there[0]
    if split not in there:
        wanted = f"one of {', '.join(there)}"
        raise ConfigError(f"{data.source} has no {split}", wanted=wanted, do="change --split")
    return split, getattr(data, split)[: asked.limit]


def _told(found: Sequence[Evaluation], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What evaluation.json says; of two, the base's comes first, then the adapter's."""
    return {
        "figures": [evaluation.figures() for evaluation in found],
        "differences": found[1].against(found[0]) if len(found) == 2 else {},
        "answers": [[asdict(answer) for answer in evaluation.answers] for evaluation in found],
        "tasks": list(results),
    }


if __name__ == "__main__":
    run_command(main)
