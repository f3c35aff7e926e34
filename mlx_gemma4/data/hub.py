"""Datasets of the Hugging Face Hub, and folders laid out like them, through `datasets`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import DataError
from .files import SPLIT_NAMES, hash_file
from .records import Raw, without_nulls

__all__ = ["HubSplit", "find_splits", "is_hub_source"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)")


@dataclass(frozen=True)
class HubSplit:
    """One split of a Hub dataset; its rows stay in Arrow files until they are read.

    Attributes:
        name: "owner/name[train]".
        table: the `datasets.Dataset`.
    """

    name: str
    table: Any

    kind = label = "hub"
    folder = None

    @property
    def place(self) -> str:
        """What stands before a row's number."""
        return f"{self.name}:row "

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.table.data.nbytes

    def records(self) -> Iterator[tuple[int, Raw]]:
        """(number, raw row) of every row; images and audio are not decoded."""
        number = 0
        for part in self.table.with_format("arrow").iter(batch_size=1000):
            for record in part.to_pylist():
                number += 1
                yield number, without_nulls(record)

    def fingerprint(self) -> str:
        """Changes with the content."""
        digest = hashlib.sha256(f"{self.name} {len(self.table)}".encode())
        for file in self.table.cache_files:
            digest.update(hash_file(Path(file["filename"])).encode())
        return digest.hexdigest()


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

    try:
        loaded = datasets.load_dataset(
            str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source,
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
