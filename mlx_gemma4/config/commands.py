"""What a run reads and writes, and what single commands have beside that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .schema import Settings, setting


@dataclass(frozen=True)
class RunConfig(Settings):
    """What a run reads and where it writes."""

    model: str | None = setting(
        None,
        "a model folder or a Hugging Face id, such as google/gemma-4-E2B-it; "
        "without it a small Gemma 4 that is built on this machine is trained",
    )
    quantize: Literal["4", "5", "6", "8", "mxfp4", "nvfp4", "mxfp8", "q4_0"] | None = setting(
        None,
        "quantize the model while it is loaded: bits, a mode of MLX, or q4_0 for the grid of QAT "
        "checkpoints, which 4 finds by itself",
    )
    save_quantized: str | None = setting(
        None, "with quantize: write the quantized model to this folder first, and use that"
    )
    init_from: str | None = setting(
        None,
        "train an adapter further: of ours, mlx-lm, mlx-vlm or PEFT; its rank, alpha, targets and "
        "dropout stay",
    )
    data: str | None = setting(
        None,
        "a folder with train (valid, test) files, one file, or a Hub dataset; "
        "several are mixed: chat.jsonl=2,code.parquet=0.5",
    )
    demo: Literal["images", "audio"] | None = setting(
        None, "instead of model and data: a small model learns digits drawn here, or tones"
    )
    output: str | None = setting(
        None, "folder for the adapter, checkpoints and metrics; default: runs/1, runs/2, ..."
    )
    fit: str | None = setting(
        None,
        "choose settings that fit a memory, such as 16GB: rematerialize, then batch_size, "
        "then max_seq_length",
    )
    resume: Literal["always", "auto"] | None = setting(
        None,
        "go on with the run in the output folder, or without one the newest in runs/, with its "
        "settings; no other flag is needed. auto: start if there is none",
        bare="always",
    )


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """`python -m mlx_gemma4.generate`."""

    adapter: str | None = setting(
        None, "a run's folder, such as runs/1, one of its checkpoints, or any adapter folder"
    )
    prompt: Sequence[str] | None = setting(
        None,
        "what the user says, - for standard input; several are answered one by one, each without "
        "the others",
    )
    conversation: str | None = setting(
        None, 'a JSON file: a list of messages, or {"messages": [...], "tools": [...]}'
    )
    image: Sequence[str] | None = setting(None, "image files that a prompt shows")
    audio: Sequence[str] | None = setting(None, "audio files that a prompt has")
    tools: str | None = setting(None, "a JSON file: a list of tools, in OpenAI's form")
    system: str | None = setting(None, "what the system turn says")
    thinking: bool = setting(False, "let the model think before it answers")
    max_tokens: int = setting(256, "the most tokens of an answer", at_least=1)
    temperature: float = setting(0.0, "0 takes the likeliest token each time", at_least=0.0)
    top_p: float = setting(
        1.0, "sample among the likeliest tokens of this share", above=0.0, at_most=1.0
    )


@dataclass(frozen=True)
class ExportConfig(Settings):
    """`python -m mlx_gemma4.export`."""

    source: str | None = setting(
        None, "the output folder of a run, or an adapter of ours, mlx-lm, mlx-vlm or PEFT"
    )
    which: str = setting(
        "last", "of a run: the checkpoint last, best (by validation loss) or step-N"
    )
    format: str = setting("mlx-lm", "which library the export is for")
    verify: bool = setting(True, "load the export in that library and compare logits")
    push: str | None = setting(None, "upload it to the Hub as USER/NAME, private by default")
    public: bool = setting(False, "make the repository for everyone to see")
    quantize: str | None = setting(
        None, "fused: as where a model is loaded, or base for the base's own"
    )
    group_size: int | None = setting(
        None, "fused: weights that share a scale, where bits are given; default: 64", at_least=1
    )
    floor: float = setting(0.5, "fused: the least cosine of a change that is kept")
    force: bool = setting(False, "fused: write it below the floor too")


@dataclass(frozen=True)
class FitConfig(Settings):
    """`python -m mlx_gemma4.fit`."""

    table: bool = setting(True, "print peaks by length and precision too")


@dataclass(frozen=True)
class ShowConfig(Settings):
    """`python -m mlx_gemma4.data`."""

    show: int = setting(0, "print the first N examples", at_least=0)
    html: str | None = setting(None, "write the same as a page, with examples")
    json: bool = setting(False, "print the figures as JSON")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """`python -m mlx_gemma4.eval`."""

    adapter: str | None = setting(
        None, "a run's folder, such as runs/1, one of its checkpoints, or any adapter folder"
    )
    split: Literal["test", "valid", "train"] | None = setting(
        None, "the examples that are asked; default: test, valid or train, the first there is"
    )
    answers: int = setting(
        0, "let the first N examples be answered, and count exact matches", at_least=0
    )
    max_tokens: int = setting(256, "the most tokens of an answer", at_least=1)
    tasks: Sequence[str] | None = setting(
        None, "tasks of lm-evaluation-harness, or .yaml files of your own"
    )
    limit: int | None = setting(
        None, "the first N examples, and questions of each task, only", at_least=1
    )


@dataclass(frozen=True)
class ReportConfig(Settings):
    """`python -m mlx_gemma4.report`."""

    runs: Sequence[str] | None = setting(None, "output folders of runs, such as runs/*")
