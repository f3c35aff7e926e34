"""What `read` is given -> sources of raw rows by split: files, Hub datasets, rows in memory."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...config import DataConfig
from ...errors import ConfigError, DataError
from .files import SPLIT_NAMES, find_files, hash_file
from .records import Raw, without_nulls

__all__ = ["Input", "Source", "find_sources"]

Paths = str | Path | Sequence[str | Path] | Mapping[str, float]
Input = Any
"""`Paths`, or rows: a list of dicts, a `datasets.Dataset`, or a dict of such by split."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)")


class Source(Protocol):
    """Where the rows of a split come from: a `DataFile`, a `HubSplit`, or `MemoryRows`.

    Attributes:
        label: what it is, for the summary: "jsonl.gz", "hub", "rows".
        place: what stands before a row's number in messages.
        folder: where paths of images and audio begin.
        size: bytes of all rows; 0 where that is not known.
        count: how many rows there are; None where that is not known.
    """

    @property
    def label(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def size(self) -> int: ...
    @property
    def count(self) -> int | None: ...

    def records(self) -> Iterator[tuple[int, Raw]]:
        """(number, raw row) of every row."""
        ...

    def fingerprint(self) -> str | None:
        """Changes with the content; None for rows whose tokens are not cached."""
        ...


@dataclass(frozen=True)
class HubSplit:
    """One split of a Hub dataset; its rows stay in Arrow files until they are read.

    Attributes:
        name: "owner/name[train]".
        table: the `datasets.Dataset`.
    """

    name: str
    table: Any

    label = "hub"
    folder = None

    @property
    def place(self) -> str:
        return f"{self.name}:row "

    @property
    def size(self) -> int:
        return self.table.data.nbytes

    @property
    def count(self) -> int:
        return len(self.table)

    def records(self) -> Iterator[tuple[int, Raw]]:
        return enumerate(_rows_of_table(self.table), 1)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.name} {len(self.table)}".encode())
        for file in self.table.cache_files:
            digest.update(hash_file(Path(file["filename"])).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class MemoryRows:
    """Rows that the caller has: a sequence of dicts, or a `datasets.Dataset`. Never cached.

    Attributes:
        name: "rows", or "rows['valid']" of a dict of splits.
        rows: the rows; a row's number is its index.
    """

    name: str
    rows: Any

    label = "rows"
    folder = None
    size = 0

    @property
    def place(self) -> str:
        return f"{self.name}["

    @property
    def count(self) -> int:
        return len(self.rows)

    def records(self) -> Iterator[tuple[int, Raw]]:
        return enumerate(_rows_of_table(self.rows) if _is_table(self.rows) else self.rows)

    def fingerprint(self) -> None:
        return None


def find_sources(
    given: Input, config: DataConfig
) -> tuple[dict[str, float], list[Mapping[str, Sequence[Source]]]]:
    """(name -> weight, the splits of each name) of what `read` was given.

    Raises:
        ConfigError: a weight that is none, or nothing given.
        DataError: a file or dataset that is not there, or no training rows.
    """
    splits = _splits_of_rows(given)
    if splits is not None:
        return {"rows": 1.0}, [splits]
    mix = parse_mix(given)
    return mix, [_splits_of(name, config) for name in mix]


def _splits_of(name: str, config: DataConfig) -> Mapping[str, Sequence[Source]]:
    return find_splits(name, config) if is_hub_source(name, config) else find_files(name)


# ---------------------------------------------------------------- paths and their weights


def parse_mix(source: Paths) -> dict[str, float]:
    """Paths or Hub ids, and their weights.

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


# ---------------------------------------------------------------- rows in memory


def _is_table(rows: Any) -> bool:
    """Whether it is a `datasets.Dataset`; whoever has one has imported the library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(rows, library.Dataset)


def _rows_of_table(table: Any) -> Iterator[dict]:
    """The rows of a `datasets.Dataset` as dicts; images and audio are not decoded."""
    for part in table.with_format("arrow").iter(batch_size=1000):
        yield from map(without_nulls, part.to_pylist())


def _splits_of_rows(given: Any) -> dict[str, list[Source]] | None:
    """The splits of rows in memory; None for paths."""
    if _are_rows(given):
        return {"train": [MemoryRows("rows", given)]}
    if not isinstance(given, Mapping) or not any(_are_rows(rows) for rows in given.values()):
        if isinstance(given, (str, Path, Sequence, Mapping)):
            return None
        raise DataError(
            f"data is a {type(given).__name__}",
            wanted="paths, a Hub id, a list of dicts, a datasets.Dataset, or a dict of splits",
            do="make a list of the rows",
        )
    found: dict[str, list[Source]] = {}
    for name, rows in given.items():
        if name not in SPLIT_NAMES or not (_are_rows(rows) or rows == []):
            raise DataError(
                f"the rows hold the split {name!r}, a {type(rows).__name__}",
                wanted=f"lists of dicts or datasets under the names {', '.join(SPLIT_NAMES)}",
                do="rename the split, or leave it out",
            )
        if rows:
            found[SPLIT_NAMES[name]] = [MemoryRows(f"rows[{name!r}]", rows)]
    if "train" not in found:
        raise DataError(
            f"the rows hold the splits {', '.join(given)}, and no row to train on",
            wanted="a split of the name train, with rows",
            do="name the training rows train",
        )
    return found


def _are_rows(given: Any) -> bool:
    if _is_table(given):
        return True
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    return is_list and len(given) > 0 and isinstance(given[0], Mapping)


# ---------------------------------------------------------------- the Hub


def is_hub_source(source: str, config: DataConfig) -> bool:
    """Whether `datasets` is to read it: a Hub id, or a folder that asks for a config or split."""
    path = Path(source).expanduser()
    if path.is_dir():
        return bool(config.dataset_config or config.dataset_split)
    return not path.exists() and _ID.fullmatch(source) is not None


def find_splits(source: str, config: DataConfig) -> dict[str, list[HubSplit]]:
    """The train, valid and test splits of a dataset.

    Args:
        source: a Hub id, or a folder with data files and a README.md as on the Hub.
        config: its dataset_config and dataset_split.

    Raises:
        DataError: no such dataset, configuration or split; or no `train` among its splits.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    try:
        loaded = datasets.load_dataset(
            str(path) if path.is_dir() else source,
            config.dataset_config,
            split=config.dataset_split,
        )
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise DataError(
            f"the dataset {source} cannot be loaded: {' '.join(str(error).split())}",
            wanted="a path on this machine, or the id of a Hub dataset with its configuration",
            do="check the name, dataset_config, dataset_split, and the connection",
        ) from None
    if config.dataset_split:
        return {"train": [HubSplit(f"{source}[{config.dataset_split}]", loaded)]}
    found = {
        SPLIT_NAMES[name]: [HubSplit(f"{source}[{name}]", table)]
        for name, table in loaded.items()
        if name in SPLIT_NAMES
    }
    if "train" not in found:
        raise DataError(
            f"the dataset {source} has the splits {', '.join(loaded)}",
            wanted="one of the name train",
            do="name the split to train on: dataset_split",
        )
    return found
