"""What `read` is given -> sources of raw rows by split: files, Hub datasets, rows in memory."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import DataConfig
from ...errors import ConfigError, DataError
from ...extras import import_extra
from .files import SPLIT_NAMES, DataFile, find_files, hash_file
from .records import Raw, without_nulls

Input = Any
"""Paths or Hub ids, or a dict of their weights; or rows: dicts or a Dataset, or a dict by split."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)")


@dataclass(frozen=True)
class Table:
    """Rows that the caller has, dicts or a Dataset, or a split ("hub") that stays in Arrow files.

    `place` stands before a row's number in messages: "rows[", "owner/name[train]:row ".
    """

    place: str
    rows: Any
    label: str = "rows"

    folder = None

    @property
    def size(self) -> int:
        """Bytes of all rows; 0 for those of the caller."""
        return self.rows.data.nbytes if self.label == "hub" else 0

    @property
    def count(self) -> int:
        return len(self.rows)

    def records(self) -> Iterator[tuple[int, Raw]]:
        """(number, raw row) of every row; those of the caller are counted from 0.

        Images and audio of a `datasets.Dataset` are not decoded.
        """
        rows = self.rows
        if _is_table(rows):
            batches = rows.with_format("arrow").iter(batch_size=1000)
            rows = (without_nulls(row) for batch in batches for row in batch.to_pylist())
        return enumerate(rows, 1 if self.label == "hub" else 0)

    def fingerprint(self) -> str | None:
        """Changes with the content; None for the caller's rows, whose tokens are not cached."""
        if self.label != "hub":
            return None
        files = [hash_file(Path(file["filename"])) for file in self.rows.cache_files]
        return hashlib.sha256("\0".join([str(self.count), *files]).encode()).hexdigest()


Source = DataFile | Table
"""Where the rows of a split come from."""


def find_sources(
    given: Input, config: DataConfig
) -> tuple[dict[str, float], list[Mapping[str, Sequence[Source]]]]:
    """(name -> weight, the splits of each name) of what `read` was given.

    Raises:
        ConfigError: a weight that is none, or nothing given.
        DataError: a file or dataset that is not there, or no training rows.
    """
    if _are_rows(given):
        return {"rows": 1.0}, [{"train": [Table("rows[", given)]}]
    if isinstance(given, Mapping) and any(map(_are_rows, given.values())):
        return {"rows": 1.0}, [_splits_of_rows(given)]
    if not isinstance(given, (str, Path, Sequence, Mapping)):
        found = f"data is a {type(given).__name__}"
        wanted = "paths, a Hub id, a list of dicts, a datasets.Dataset, or a dict of splits"
        raise DataError(found, wanted=wanted, do="make a list of the rows")
    mix = parse_mix(given)
    return mix, [_splits_of(name, config) for name in mix]


def parse_mix(source: Input) -> dict[str, float]:
    """Paths or Hub ids, and their weights.

    >>> parse_mix("chat.jsonl=2, code.parquet")
    {'chat.jsonl': 2.0, 'code.parquet': 1.0}
    """
    if isinstance(source, (str, Path)):
        whole = Path(source).expanduser().exists()
        source = [source] if whole else [part.strip() for part in str(source).split(",")]
    pairs = source.items() if isinstance(source, Mapping) else map(_weight, map(str, source))
    mix = {str(name): weight for name, weight in pairs}
    for name, weight in mix.items():
        if not (isinstance(weight, (int, float)) and 0 < weight <= 1000):
            wanted = "a number above 0: 2 takes every row twice, 0.5 half of the rows"
            raise ConfigError(f"{name} has the weight {weight}", wanted=wanted, do="change it")
    if not mix:
        raise ConfigError("data names no source", wanted="a file or folder", do="name one")
    return mix


def _weight(source: str) -> tuple[str, float]:
    name, sign, weight = source.rpartition("=")
    if sign and not Path(source).expanduser().exists():
        with contextlib.suppress(ValueError):
            return name, float(weight)
    return source, 1.0


def _splits_of(source: str, config: DataConfig) -> Mapping[str, Sequence[Source]]:
    """Of a Hub id, or a folder of which a configuration or split is asked for, by `datasets`."""
    path = Path(source).expanduser()
    is_named = config.dataset_config or config.dataset_split
    if (path.is_dir() and is_named) or (not path.exists() and _ID.fullmatch(source)):
        return _splits_of_dataset(source, config)
    return find_files(source)


def _is_table(rows: Any) -> bool:
    """Whether it is a `datasets.Dataset`; whoever has one has imported the library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(rows, library.Dataset)


def _are_rows(given: Any) -> bool:
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    return _is_table(given) or (is_list and len(given) > 0 and isinstance(given[0], Mapping))


def _splits_of_rows(given: Mapping[str, Any]) -> dict[str, list[Source]]:
    for name, rows in given.items():
        if name not in SPLIT_NAMES or not (_are_rows(rows) or rows == []):
            found = f"the rows hold the split {name!r}, a {type(rows).__name__}"
            wanted = f"lists of dicts or datasets under the names {', '.join(SPLIT_NAMES)}"
            raise DataError(found, wanted=wanted, do="rename the split, or leave it out")
    tables = {name: Table(f"rows[{name!r}][", rows) for name, rows in given.items() if rows}
    return _by_split(tables, f"the rows hold the splits {', '.join(given)}, and no row to train on")


def _by_split(tables: Mapping[str, Table], found: str) -> dict[str, list[Source]]:
    """Tables under our names of splits; others are left out, and train must be there."""
    splits: dict[str, list[Source]] = {
        SPLIT_NAMES[name]: [table] for name, table in tables.items() if name in SPLIT_NAMES
    }
    if "train" not in splits:
        do = "name the training rows train, or set dataset_split"
        raise DataError(found, wanted="a split of the name train", do=do)
    return splits


def _splits_of_dataset(name: str, config: DataConfig) -> dict[str, list[Source]]:
    datasets = import_extra("datasets", "data", at_least=4)  # which runs no loading scripts
    part = config.dataset_split
    try:
        path = str(Path(name).expanduser())
        loaded = datasets.load_dataset(path, config.dataset_config, split=part)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        found = f"the dataset {name} cannot be loaded: {' '.join(str(error).split())}"
        wanted = "a path on this machine, or the id of a Hub dataset with its configuration"
        do = "check the name, dataset_config, dataset_split, and the connection"
        raise DataError(found, wanted=wanted, do=do) from None
    splits = {"train": loaded} if part else loaded
    tables = {s: Table(f"{name}[{part or s}]:row ", splits[s], "hub") for s in splits}
    return _by_split(tables, f"the dataset {name} has the splits {', '.join(tables)}")
