"""What a person wants to know about a dataset before training on it: counts, lengths, leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .batches import padded_length
from .examples import Examples
from .files import SPLITS
from .order import BatchOrder

if TYPE_CHECKING:
    from .dataset import Dataset

__all__ = ["epoch_line", "report", "stats", "summary"]

_BINS = 12
_BAR = 40


def stats(dataset: Dataset, batch_size: int, packing: bool) -> dict[str, Any]:
    """All figures of a dataset, fit for JSON."""
    capacity = dataset.config.max_seq_length if packing else None
    facts, splits = dataset.facts, {name: _examples(dataset, name) for name in SPLITS}
    seen = {name: np.unique(part.digests) for name, part in splits.items()}
    return {
        "source": dataset.source,
        "formats": dict(dataset.formats),
        "shapes": dict(facts.shapes),
        "train_on": dataset.config.train_on,
        "thinking": dataset.config.thinking,
        "max_seq_length": dataset.config.max_seq_length,
        "rows": sum(facts.shapes.values()) + facts.bad,
        "overlong_skipped": facts.skipped,
        "truncated": facts.truncated,
        "bad": facts.bad,
        "bad_rows": list(facts.bad_rows),
        "notes": dict(facts.notes),
        "splits": {name: _split(part, seen[name]) for name, part in splits.items() if part},
        "across_splits": {
            f"{a} and {b}": len(np.intersect1d(seen[a], seen[b], assume_unique=True))
            for a, b in (("train", "valid"), ("train", "test"), ("valid", "test"))
            if splits[a] and splits[b]
        },
        "epoch": _epoch(splits["train"].lengths, batch_size, capacity),
    }


def _examples(dataset: Dataset, split: str) -> Examples:
    part = getattr(dataset, split)
    return part if isinstance(part, Examples) else Examples.of(part)


def _split(examples: Examples, kinds: np.ndarray) -> dict[str, Any]:
    lengths = examples.lengths
    tokens, targets = int(lengths.sum()), int(examples.targets.sum())
    edges = np.unique(np.ceil(np.linspace(0, lengths.max(), _BINS + 1)).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {
        "examples": len(examples),
        "tokens": tokens,
        "targets": targets,
        "target_share": targets / tokens,
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "longest_at": examples[int(lengths.argmax())].origin,
        "duplicates": len(examples) - len(kinds),
        "histogram": [
            {"up_to": int(edge), "examples": int(count)} for edge, count in zip(edges[1:], counts)
        ],
    }


def _epoch(lengths: np.ndarray, batch_size: int, capacity: int | None) -> dict[str, Any]:
    """Batches of an epoch and the share of padding in them, as `finetune` makes them."""
    figures = {"batch_size": batch_size, "packed": capacity is not None, "batches": 0, "rows": 0}
    if not len(lengths):
        return {**figures, "padding": 0.0}
    positions = lengths - 1
    batches = BatchOrder(positions, batch_size, 0, capacity).epoch(0)
    filled = sum(
        len(rows) * padded_length(max(int(positions[row].sum()) for row in rows))
        for rows in batches
    )
    figures |= {"batches": len(batches), "rows": sum(map(len, batches))}
    return {**figures, "padding": 1 - int(positions.sum()) / filled}


def epoch_line(epoch: dict[str, Any]) -> str:
    """An epoch in a sentence."""
    what = "packed rows" if epoch["packed"] else "examples"
    return (
        f"an epoch: {epoch['batches']:,} steps of {epoch['batch_size']} {what}, "
        f"{epoch['padding']:.1%} padding"
    )


def summary(dataset: Dataset) -> str:
    """A few lines: what was found, what each split holds, what was left out."""
    facts, config = dataset.facts, dataset.config
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in sorted(facts.shapes.items()))
    formats = ", ".join(sorted(dataset.formats))
    lines = [
        f"{dataset.source}: {shapes or 'no'} rows{f' ({formats})' if formats else ''}; "
        f"trained on: {config.train_on}"
    ]
    for name in SPLITS:
        part = _examples(dataset, name)
        if part:
            tokens, targets = int(part.lengths.sum()), int(part.targets.sum())
            lines.append(
                f"  {name + ':':6} {len(part):,} examples, {tokens:,} tokens, "
                f"{targets:,} targets ({targets / tokens:.0%}), longest {part.lengths.max():,}"
            )
    for verb in ("skipped", "truncated"):
        if count := getattr(facts, verb):
            lines.append(f"  {count:,} over {config.max_seq_length:,} tokens {verb}")
    if facts.bad:
        lines.append(f"  {facts.bad:,} that cannot be used skipped")
        lines += [f"    {reason}" for reason in facts.bad_rows[:3]]
    lines += [f"  {count:,} {note}" for note, count in sorted(facts.notes.items())]
    return "\n".join(lines)


def report(dataset: Dataset, figures: dict[str, Any]) -> str:
    """The summary, and below it lengths, duplicates and the epoch."""
    lines = [summary(dataset), "", "  tokens an example, train:"]
    most = max(bin_["examples"] for bin_ in figures["splits"]["train"]["histogram"])
    lower = 0
    for bin_ in figures["splits"]["train"]["histogram"]:
        count, edge = bin_["examples"], bin_["up_to"]
        bar = "█" * -(-count * _BAR // most)
        lines.append(f"  {lower:>6,} - {edge:>6,}  {bar:{_BAR}}  {count:,}")
        lower = edge
    train = figures["splits"]["train"]
    lines.append(
        f"  median {train['median']:,.0f}, longest {train['longest']:,} at {train['longest_at']}"
    )
    repeated = {name: split["duplicates"] for name, split in figures["splits"].items()}
    lines.append("  duplicates: " + ", ".join(f"{n:,} in {s}" for s, n in repeated.items()))
    for pair, count in figures["across_splits"].items():
        lines.append(f"  in both {pair}: {count:,}" + ("  <- held-out rows leak" if count else ""))
    lines.append("  " + epoch_line(figures["epoch"]))
    return "\n".join(lines)
