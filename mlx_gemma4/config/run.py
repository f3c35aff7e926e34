"""What a run reads, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass

from .schema import Settings, setting

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig(Settings):
    """What a run reads and where it writes."""

    model: str | None = setting(
        None,
        "a model folder or a Hugging Face id, such as google/gemma-4-E2B-it; "
        "without it a small Gemma 4 that is built on this machine is trained",
    )
    data: str | None = setting(
        None,
        "a folder with train (valid, test) files, one file, or a Hub dataset; "
        "several are mixed: chat.jsonl=2,code.parquet=0.5",
    )
    output: str | None = setting(
        None, "folder for the adapter, checkpoints and metrics; default: runs/1, runs/2, ..."
    )
    fit: str | None = setting(
        None,
        "choose settings that fit a memory, such as 16GB: rematerialize, then batch_size, "
        "then max_seq_length",
    )
    resume: bool = setting(False, "go on from the newest checkpoint in the output folder")
