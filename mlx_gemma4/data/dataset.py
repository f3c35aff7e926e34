"""`read`: files or a Hub dataset -> examples with tokens and loss masks, by split."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from ..config import DataConfig
from ..errors import ConfigError, DataError
from .batches import Example
from .cache import cached
from .examples import Examples
from .files import SPLITS, DataFile, find_files
from .formats import column_map
from .hub import HubSplit, find_splits, is_hub_source
from .mix import held_out, parse_mix, weighted
from .records import read_records
from .store import Encoded, Facts, Store, StoreWriter
from .tokenizing import Chunk, Task, Workers, chunks, encode_chunk

if TYPE_CHECKING:
    from ..model.plan import Plan
    from .show import Shown

__all__ = ["Dataset", "read"]

SMALL = 8_000_000
"""Up to this many bytes are read anew every time, here and now; more goes through the cache."""

_SETTINGS = (
    *("train_on", "thinking", "max_seq_length", "overlong", "truncate_from"),
    *("on_bad_row", "columns", "media_anywhere"),
)


class ReadsText(Protocol):
    """What `read` needs of a model: a loaded Gemma4 has it, and so has its text side alone."""

    @property
    def plan(self) -> Plan: ...
    @property
    def tokenizer(self) -> Any: ...


@dataclass(repr=False)
class Dataset:
    """Examples by split; indexing and length are those of `train`.

    Attributes:
        source: where the rows came from.
        config: how they became examples.
        train, valid, test: examples in the order of the files.
        formats: how many files of each format were read.
        facts: what was seen on the way: shapes of rows, what was left out or cut, and why.
        tokenizer: turns tokens into text again, for `show`.
    """

    source: str
    config: DataConfig
    train: Sequence[Example] = field(default_factory=Examples)
    valid: Sequence[Example] = field(default_factory=Examples)
    test: Sequence[Example] = field(default_factory=Examples)
    formats: Counter[str] = field(default_factory=Counter)
    facts: Facts = field(default_factory=Facts)
    tokenizer: Any = None

    def __len__(self) -> int:
        return len(self.train)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index):
        return self.train[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.train)

    def show(self, index: int = 0, split: str = "train") -> Shown:
        """An example for the eye: what is learned is marked, special tokens are visible.

        A notebook displays it in colour; `print` works everywhere.

        >>> import mlx_gemma4 as g4
        >>> print(g4.read(rows, g4.load(tiny)).show(0))  # doctest: +ELLIPSIS
        train[0] .../train.jsonl:1, 29 tokens, 7 targets
        <bos><|turn>user
        What is a list?<turn|>
        <|turn>model
        ⟦A list holds values.<turn|>⟧
        <BLANKLINE>
        """
        from .show import Shown

        return Shown.of(getattr(self, split)[index], self.tokenizer, f"{split}[{index}]")

    def stats(self, batch_size: int = 1, packing: bool = True) -> dict[str, Any]:
        """Counts of everything that was read, as plain numbers, lists and dicts.

        Args:
            batch_size, packing: as in TrainConfig, for padding and steps an epoch.
        """
        from .report import stats

        return stats(self, batch_size, packing)

    def __repr__(self) -> str:
        from .report import summary

        return summary(self)


def read(
    source: str | Path | Sequence[str | Path] | Mapping[str, float],
    gemma: ReadsText,
    config: DataConfig = DataConfig(),
) -> Dataset:
    """Read rows and turn them into examples for a model.

    Args:
        source: a folder with train (valid, test) files, one file, or the id of a Hub dataset.
            Several, as a list or with commas, are mixed; `chat.jsonl=2` or {"chat.jsonl": 2}
            takes each training row twice an epoch, 0.5 takes half of them.
        gemma: whose tokenizer and chat template are used.
        config: which tokens are learned, and what is done with long or bad rows.

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
    column_map(config.columns)
    mix = parse_mix(source)
    found = [_find(name, config) for name in mix]
    everything = [part for splits in found for parts in splits.values() for part in parts]
    dataset = Dataset(", ".join(mix), config, tokenizer=gemma.tokenizer)
    dataset.formats.update(part.label for part in everything)
    task = Task(gemma.tokenizer, gemma.plan.vocab_size, config)
    small = sum(part.size for part in everything) <= SMALL
    with _Reader(task, in_memory=small) as reader:
        stores = [
            {split: [reader.store(part) for part in parts] for split, parts in splits.items()}
            for splits in found
        ]
    for splits in stores:
        for store in (store for stores in splits.values() for store in stores):
            dataset.facts.add(store.facts)
    for split in SPLITS:
        setattr(dataset, split, Examples([s for splits in stores for s in splits.get(split, [])]))
    sizes = [sum(map(len, splits["train"])) for splits in stores]
    _choose(dataset, sizes, list(mix.values()))
    if not dataset.train:
        raise DataError(
            f"{dataset.source} leaves no example to train on",
            wanted="at least one",
            do="raise the weights, or lower valid_fraction",
        )
    return dataset


def _choose(dataset: Dataset, sizes: Sequence[int], weights: Sequence[float]) -> None:
    """Hold rows out, and weigh the rest."""
    fraction, train = dataset.config.valid_fraction, dataset.train
    assert isinstance(train, Examples)
    if fraction is not None:
        if dataset.valid:
            raise ConfigError(
                f"valid_fraction is {fraction}, and {dataset.source} has valid rows of its own",
                wanted="one of them",
                do="leave out valid_fraction, or remove the valid file",
            )
        train, dataset.valid = held_out(train, fraction, dataset.source)
    dataset.train = weighted(train, sizes, weights)


def _find(source: str, config: DataConfig) -> Mapping[str, Sequence[DataFile | HubSplit]]:
    return find_splits(source, config) if is_hub_source(source, config) else find_files(source)


class _Reader:
    """Makes the stores of a run, through the cache or in memory."""

    def __init__(self, task: Task, *, in_memory: bool):
        self._task, self._in_memory = task, in_memory
        self._workers: Workers | None = None
        self._key = "" if in_memory else _key(task)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._workers:
            self._workers.__exit__(*exception)

    def store(self, source: DataFile | HubSplit) -> Store:
        """The examples of one file or split."""
        if self._in_memory:
            jobs = _jobs(source)
            return self._filled(
                StoreWriter(None), source, (encode_chunk(self._task, job) for job in jobs)
            )
        parts = (self._key, source.place, source.kind, source.fingerprint())
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return Store.open(cached(key, lambda folder: self._build(folder, source)), source.place)

    def _build(self, folder: Path, source: DataFile | HubSplit) -> None:
        from tqdm import tqdm

        self._workers = self._workers or Workers(self._task)
        plain = source.label == "jsonl"
        rows = len(source.table) if isinstance(source, HubSplit) else None
        with tqdm(
            desc=f"tokenizing {source.place.rsplit('/', 1)[-1].split(':')[0]}",
            total=source.size if plain else rows,
            unit="B" if plain else " rows",
            unit_scale=True,
            disable=None,
            dynamic_ncols=True,
            leave=False,
        ) as bar:

            def handed_out() -> Iterator[Chunk]:
                for job in _jobs(source):
                    yield job
                    sizes = (len(raw) if isinstance(raw, bytes) else 0 for _, raw in job.rows)
                    bar.update(sum(sizes) if plain else len(job.rows))

            self._filled(StoreWriter(folder), source, self._workers.encode(handed_out()))

    def _filled(
        self,
        writer: StoreWriter,
        source: DataFile | HubSplit,
        encoded: Iterable[Encoded],
    ) -> Store:
        count = 0
        for part in encoded:
            writer.add(part)
            count += len(part.lengths)
        if not count:
            facts = writer.facts
            long = f"{facts.skipped} were too long" if facts.skipped else ""
            bad = f"{facts.bad} cannot be used" if facts.bad else ""
            why = ", ".join(filter(None, [long, bad]))
            where = source.place.rstrip(":").removesuffix(":row ")
            raise DataError(
                f"{where} holds no example" + (f" ({why})" if why else ""),
                wanted="at least one row",
                do="fill the file, or raise max_seq_length" if long else "fill the file",
            )
        return writer.finish(source.place)


def _jobs(source: DataFile | HubSplit) -> Iterator[Chunk]:
    records = source.records() if isinstance(source, HubSplit) else read_records(source)
    return chunks(source.place, source.folder, records)


def _key(task: Task) -> str:
    """What examples depend on besides their rows: tokenizer, template, settings, and this code."""
    tokenizer = task.tokenizer
    libraries = ("transformers", "tokenizers", "jinja2", "pyarrow", "numpy")
    made_of = [
        tokenizer.backend_tokenizer.to_str(),
        repr(tokenizer.chat_template),
        repr(sorted(tokenizer.special_tokens_map.items(), key=repr)),
        str(task.vocab_size),
        repr([(name, getattr(task.config, name)) for name in _SETTINGS]),
        repr([importlib.metadata.version(name) for name in libraries]),
        *(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))),
    ]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()
