"""How rows become examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .schema import Settings, setting, wrong


@dataclass(frozen=True)
class DataConfig(Settings):
    """How rows become examples."""

    train_on: Literal["assistant", "last", "all", "completion"] = setting(
        "assistant",
        "the tokens that are learned: every assistant turn, the last one only, all tokens, "
        "or the completion of a prompt",
    )
    thinking: Literal["keep", "drop", "mask"] = setting(
        "keep", "thoughts of assistant turns: learn them, leave them out, or show without learning"
    )
    answer_start: Literal["prompt", "template"] = setting(
        "prompt",
        "how a learned answer begins: as the generation prompt begins it, with the empty thought "
        "that larger models have there, or as the chat template renders it",
    )
    max_seq_length: int = setting(2048, "the most tokens of an example", at_least=2)
    overlong: Literal["skip", "error", "truncate"] = setting(
        "skip", "what to do with an example over max_seq_length; skipping and cutting are counted"
    )
    truncate_from: Literal["end", "start"] = setting(
        "end", "the side that overlong: truncate cuts; the first token stays either way"
    )
    on_bad_row: Literal["error", "skip"] = setting(
        "error", "what to do with a row that cannot be used; skipped ones are counted and listed"
    )
    valid_fraction: float | None = setting(
        None, "share of the training rows to hold out, where there is no valid file", at_least=0.0
    )
    columns: Mapping[str, str] | None = setting(
        None, "names of columns: prompt=question completion=answer"
    )
    dataset_config: str | None = setting(None, "the configuration of a Hub dataset")
    dataset_split: str | None = setting(None, "the part of a Hub dataset, such as train[:1000]")
    image_tokens: Literal["70", "140", "280", "560", "1120"] | None = setting(
        None, "the most tokens of an image; by default what the model's processor says"
    )
    media_anywhere: bool = setting(False, "let rows name files outside the folder of their own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid_fraction is not None and not 0 < self.valid_fraction < 1:
            raise wrong("valid_fraction", self.valid_fraction, "between 0 and 1")
