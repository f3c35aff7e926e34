"""`Dataset`, and `read`: files, a Hub dataset or rows in memory -> examples by split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..config import DataConfig
from ..errors import ConfigError, DataError
from ..model.tokenizer import TextSide
from .batch.order import BatchOrder
from .chat.encode import Chunk, Task, encode_chunk
from .example import Example, Examples, Facts, Store
from .inspect import Shown, of_epoch, of_splits, summary
from .read.files import SPLITS
from .read.sources import Input, Source, find_sources
from .store.cache import cached, open_store, tokens_key, write_store
from .store.workers import Workers

if TYPE_CHECKING:
    from ..gemma import Gemma4

SMALL = 8_000_000
"""Files up to this many bytes are read anew every time, in this process."""

_MANY_ROWS = 20_000  # in memory: more are worth starting worker processes
_MANY_BAD = 1000  # rows that cannot be used: more are not counted
_CHUNK_ROWS, _CHUNK_BYTES = 1000, 1 << 20
_BAR: dict[str, Any] = {"unit_scale": True, "disable": None, "leave": False}


@dataclass(repr=False)
class Dataset(Sequence[Example]):
    """Examples by split; indexing and length are those of `train`.

    Attributes:
        source: where the rows came from; `config` is how they became examples.
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

    def show(self, index: int = 0, split: str = "train") -> Shown:
        """An example to look at: targets are marked, special tokens are visible.

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
        return Shown.of(getattr(self, split)[index], self.tokenizer, f"{split}[{index}]")

    def stats(self, batch_size: int = 1, packing: bool = True) -> dict[str, Any]:
        """Counts of everything that was read, as plain numbers, lists and dicts.

        `batch_size` and `packing`, as in TrainConfig, decide padding and steps an epoch.
        """
        order = BatchOrder.of(self.train, self.config.max_seq_length, batch_size, packing)
        return self._figures() | {"epoch": of_epoch(order)}

    @property
    def has_media(self) -> bool:
        """Whether a row of any split has an image or audio."""
        return any(Examples.of(getattr(self, name)).has_media for name in SPLITS)

    def __repr__(self) -> str:
        return summary(self._figures())

    def _figures(self) -> dict[str, Any]:
        splits = {name: Examples.of(getattr(self, name)) for name in SPLITS}
        return of_splits(self.source, self.formats, self.config, self.facts, splits)


def read(source: Input, gemma: Gemma4 | TextSide, config: DataConfig = DataConfig()) -> Dataset:
    """Read rows and turn them into examples for a model.

    Args:
        source: a folder with train (valid, test) files, one file, or the id of a Hub dataset.
            Several, as a list or with commas, are mixed; `chat.jsonl=2` or {"chat.jsonl": 2}
            takes each training row twice an epoch, 0.5 takes half of them. Or rows in memory: a
            list of dicts, a `datasets.Dataset`, or a dict of such by split.
        gemma: whose tokenizer and chat template are used.

    Raises:
        DataError: rows that cannot be used, the first by file and line; or no rows at all.

    >>> import mlx_gemma4 as g4
    >>> gemma = g4.load(tiny)
    >>> data = g4.read(rows, gemma)
    >>> len(data), data[0].num_targets > 0
    (2, True)
    >>> g4.read([{"prompt": "Hi", "completion": "Hello"}], gemma)[0].origin
    'rows[0]'
    """
    limit = gemma.plan.max_positions
    if config.max_seq_length > limit:
        told = f"max_seq_length is {config.max_seq_length}"
        wanted = f"at most {limit}, the model's max_position_embeddings"
        raise DataError(told, wanted=wanted, do="lower max_seq_length")
    weights, found = find_sources(source, config)
    everything = [part for splits in found for parts in splits.values() for part in parts]
    media = gemma.media.with_budget(config.image_tokens)
    task = Task(gemma.tokenizer, gemma.plan.vocab_size, config, media)
    key = tokens_key(task) if sum(part.size for part in everything) > SMALL else None
    with Workers(task) as workers:
        stores = [
            {
                split: [store for part in parts for store in _stores(part, task, workers, key)]
                for split, parts in splits.items()
            }
            for splits in found
        ]
    train, valid, test = (
        Examples([store for splits in stores for store in splits.get(split, ())])
        for split in SPLITS
    )
    facts = Facts()
    for store in (*train.stores, *valid.stores, *test.stores):
        facts.add(store.facts)
    name = ", ".join(weights)
    if config.valid_fraction is not None:
        train, valid = _without_validation(train, valid, config.valid_fraction, name)
    sizes = [sum(map(len, splits["train"])) for splits in stores]
    train = _weighted(train, sizes, list(weights.values()))
    if not train:
        do = "raise the weights, or lower valid_fraction"
        raise DataError(f"{name} leaves no example to train on", wanted="at least one", do=do)
    formats = Counter(part.label for part in everything)
    return Dataset(name, config, train, valid, test, formats, facts, gemma.tokenizer)


def _stores(source: Source, task: Task, workers: Workers, key: str | None) -> list[Store]:
    """The examples of a source; with the key of all that its tokens depend on, from the cache."""
    fingerprint = source.fingerprint() if key else None
    if fingerprint or (source.count or 0) > _MANY_ROWS:
        encoded = _by_workers(source, workers)
    else:
        encoded = (encode_chunk(task, chunk) for chunk in _chunks(source))
    stores = _require_good(encoded, source, task.config.on_bad_row == "skip")
    if not fingerprint:
        return list(stores)
    made_of = json.dumps((key, source.place, source.label, fingerprint))
    entry = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    folder = cached(entry, lambda folder: write_store(stores, folder))
    return [open_store(folder, source.place)]


def _by_workers(source: Source, workers: Workers) -> Iterator[Store]:
    from tqdm import tqdm

    by_bytes = source.label == "jsonl"
    total, unit = (source.size, "B") if by_bytes else (source.count, " rows")
    name = _name_of(source).rsplit("/", 1)[-1]
    with tqdm(desc=f"tokenizing {name}", total=total, unit=unit, **_BAR) as bar:

        def told() -> Iterator[Chunk]:
            for chunk in _chunks(source):
                yield chunk
                bar.update(sum(len(raw) if by_bytes else 1 for _, raw in chunk.rows))

        yield from workers.encode(told())


def _chunks(source: Source) -> Iterator[Chunk]:
    """The raw rows of a source, at most a thousand at a time, or about a megabyte of lines."""
    rows, size = [], 0
    for number, raw in source.records():
        rows.append((number, raw))
        size += len(raw) if isinstance(raw, bytes) else 0
        if len(rows) == _CHUNK_ROWS or size > _CHUNK_BYTES:
            yield Chunk(source.place, source.folder, rows)
            rows, size = [], 0
    if rows:
        yield Chunk(source.place, source.folder, rows)


def _require_good(stores: Iterable[Store], source: Source, skips: bool) -> Iterator[Store]:
    """The stores; after the last an error if rows were bad and not to skip, or none was good."""
    count, facts = 0, Facts()
    for store in stores:
        count += len(store)
        facts.add(store.facts)
        if facts.bad > _MANY_BAD and not skips:
            break
        yield store
    if facts.bad and not skips:
        raise _bad_rows(facts)
    if not count:
        found, do = f"{_name_of(source)} holds no example", "fill the file"
        if facts.skipped or facts.bad:
            found += f" ({facts.skipped} were too long, {facts.bad} cannot be used)"
            do = "mend the rows, or raise max_seq_length"
        raise DataError(found, wanted="at least one row", do=do)


def _bad_rows(facts: Facts) -> DataError:
    """The error for rows that cannot be used: the first three, and how many there are."""
    wanted, do = facts.remedy
    if facts.bad == 1:
        return DataError(facts.bad_rows[0], wanted=wanted, do=do)
    seen = sum(facts.shapes.values()) + facts.bad
    first = "".join(f"\n    {told.splitlines()[0]}" for told in facts.bad_rows[:3])
    found = f"{facts.bad:,} of the {seen:,} rows read cannot be used; the first:{first}"
    do += "; or set on_bad_row to skip"
    return DataError(found, wanted=f"of the first: {wanted}", do=do)


def _name_of(source: Source) -> str:
    """The source without what stands between it and a row's number."""
    return source.place.removesuffix("[").removesuffix("row ").removesuffix(":")


def _without_validation(
    train: Examples, valid: Examples, fraction: float, source: str
) -> tuple[Examples, Examples]:
    """(train, valid): a share of the rows, chosen by content, so that equal rows go together."""
    if valid:
        found = f"valid_fraction is {fraction}, and {source} has valid rows of its own"
        do = "leave out valid_fraction, or remove the valid file"
        raise ConfigError(found, wanted="one of them", do=do)
    kinds = np.unique(train.digests)
    if len(kinds) < 2:
        found, wanted = f"{source} has {len(kinds)} different rows", "two or more, to split them"
        raise DataError(found, wanted=wanted, do="add rows, or leave out valid_fraction")
    count = min(max(round(len(kinds) * fraction), 1), len(kinds) - 1)
    is_valid = train.digests <= kinds[count - 1]
    rest, chosen = train.order[~is_valid], train.order[is_valid]
    return Examples(train.stores, rest), Examples(train.stores, chosen)


def _weighted(train: Examples, sizes: Sequence[int], weights: Sequence[float]) -> Examples:
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
    return Examples(train.stores, np.concatenate(order))
