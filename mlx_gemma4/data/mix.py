"""Several sources as one: their weights, and rows held out for validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError
from .examples import Examples

__all__ = ["held_out", "parse_mix", "weighted"]


def parse_mix(source: str | Path | Sequence[str | Path] | Mapping[str, float]) -> dict[str, float]:
    """Sources and their weights.

    Raises:
        ConfigError: a weight that is none, or no source.

    >>> parse_mix("chat.jsonl=2, code.parquet")
    {'chat.jsonl': 2.0, 'code.parquet': 1.0}
    """
    if isinstance(source, (str, Path)):
        whole = Path(source).expanduser().exists()
        source = [source] if whole else [part.strip() for part in str(source).split(",")]
    pairs = source.items() if isinstance(source, Mapping) else map(_weight, source)
    mix = {str(name): weight for name, weight in pairs}
    for name, weight in mix.items():
        if not (isinstance(weight, (int, float)) and 0 < weight <= 1000):
            raise ConfigError(
                f"{name} has the weight {weight}",
                wanted="a number above 0: 2 takes every row twice, 0.5 half of the rows",
                do="change the weight",
            )
    if not mix:
        raise ConfigError("data names no source", wanted="a file or folder", do="name one")
    return mix


def _weight(source: str | Path) -> tuple[str, float]:
    text = str(source)
    name, sign, weight = text.rpartition("=")
    if not sign or Path(text).expanduser().exists():
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        return text, 1.0


def held_out(train: Examples, fraction: float, source: str) -> tuple[Examples, Examples]:
    """(train, valid): a share is held out, chosen by content, so that equal rows go together.

    Raises:
        DataError: fewer than two different rows.
    """
    kinds = np.unique(train.digests)
    if len(kinds) < 2:
        raise DataError(
            f"{source} has {len(kinds)} different rows",
            wanted="two or more, to hold some out",
            do="add rows, or leave out valid_fraction",
        )
    count = min(max(round(len(kinds) * fraction), 1), len(kinds) - 1)
    held = train.digests <= kinds[count - 1]
    return train.picked(train.order[~held]), train.picked(train.order[held])


def weighted(train: Examples, sizes: Sequence[int], weights: Sequence[float]) -> Examples:
    """Each source's rows as often as its weight says; a part is drawn, the same each time."""
    if all(weight == 1 for weight in weights):
        return train
    ends = np.cumsum(sizes)
    order = []
    for end, size, weight in zip(ends, sizes, weights):
        own = train.order[(train.order >= end - size) & (train.order < end)]
        whole, part = divmod(weight, 1)
        drawn = np.random.default_rng([0, len(own)]).permutation(len(own))
        order += [own] * int(whole) + [own[np.sort(drawn[: round(part * len(own))])]]
    return train.picked(np.concatenate(order))
