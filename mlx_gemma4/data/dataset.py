"""`read`: a folder or file -> examples with tokens and loss masks, by split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from ..config import DataConfig
from ..errors import DataError
from .batches import Example
from .chat import encode
from .formats import find_files, read_rows

if TYPE_CHECKING:
    from ..gemma import Gemma4

__all__ = ["Dataset", "read"]


@dataclass(repr=False)
class Dataset:
    """Examples by split; indexing and length are those of `train`.

    Attributes:
        source: where the rows came from.
        config: how they became examples.
        train, valid, test: examples in the order of the files.
        shapes: how many rows of each shape were read.
        skipped, truncated: how many examples over max_seq_length were; an example of which
            truncation would leave nothing to learn is skipped.
    """

    source: str
    config: DataConfig
    train: list[Example] = field(default_factory=list)
    valid: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.train)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index):
        return self.train[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.train)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{count} {shape}" for shape, count in sorted(self.shapes.items()))
        lines = [f"{self.source}: {shapes} rows; trained on: {self.config.train_on}"]
        for name in ("train", "valid", "test"):
            examples = getattr(self, name)
            if examples:
                tokens = sum(map(len, examples))
                targets = sum(example.num_targets for example in examples)
                longest = max(map(len, examples))
                lines.append(
                    f"  {name + ':':6} {len(examples):,} examples, {tokens:,} tokens, "
                    f"{targets:,} targets ({targets / tokens:.0%}), longest {longest:,}"
                )
        for verb in ("skipped", "truncated"):
            if count := getattr(self, verb):
                lines.append(f"  {count:,} over {self.config.max_seq_length:,} tokens {verb}")
        return "\n".join(lines)


def read(source: str | Path, gemma: Gemma4, config: DataConfig = DataConfig()) -> Dataset:
    """Read rows and turn them into examples for a model.

    Args:
        source: a folder with train.jsonl (valid.jsonl, test.jsonl), or one .jsonl file.
        gemma: whose tokenizer and chat template are used.
        config: which tokens are learned, and what is done with long rows.

    Raises:
        DataError: the first row that cannot be used, by file and line; or no rows at all.

    >>> import mlx_gemma4 as g4
    >>> data = g4.read(rows, g4.load(tiny))
    >>> len(data), data[0].num_targets > 0
    (2, True)
    """
    limit = gemma.plan.max_positions
    if config.max_seq_length > limit:
        raise DataError(
            f"max_seq_length is {config.max_seq_length}",
            wanted=f"at most {limit}, the model's max_position_embeddings",
            do="lower max_seq_length",
        )
    dataset = Dataset(str(source), config)
    for split, path in find_files(source).items():
        examples: list[Example] = getattr(dataset, split)
        skipped_before = dataset.skipped
        for row in read_rows(path):
            example = encode(row, gemma.tokenizer, config.train_on)
            _require_known(example, gemma)
            dataset.shapes[row.shape] += 1
            if len(example) > config.max_seq_length:
                fitted = _fit(example, config)
                if fitted is None:
                    dataset.skipped += 1
                    continue
                dataset.truncated += 1
                example = fitted
            examples.append(example)
        if not examples:
            long = dataset.skipped - skipped_before
            raise DataError(
                f"{path} holds no example" + (f" ({long} were too long)" if long else ""),
                wanted="at least one row",
                do="fill the file, or raise max_seq_length" if long else "fill the file",
            )
    return dataset


def _fit(example: Example, config: DataConfig) -> Example | None:
    """The example within max_seq_length, or None to skip it."""
    if config.overlong == "skip":
        return None
    if config.overlong == "error":
        raise DataError(
            f"{example.origin} has {len(example):,} tokens",
            wanted=f"at most max_seq_length, {config.max_seq_length:,}",
            do="raise max_seq_length, or set overlong to skip or truncate",
        )
    length = config.max_seq_length
    cut = replace(example, tokens=example.tokens[:length], mask=example.mask[:length])
    return cut if cut.num_targets else None


def _require_known(example: Example, gemma: Gemma4) -> None:
    highest = int(np.max(example.tokens))
    if highest >= gemma.plan.vocab_size:
        raise DataError(
            f"{example.origin} has the token id {highest}",
            wanted=f"ids below {gemma.plan.vocab_size}, the model's vocabulary",
            do="use the tokenizer of the checkpoint",
        )
