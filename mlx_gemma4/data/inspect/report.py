"""What a person wants to know about a dataset before training on it: counts, lengths, leaks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from ...config import DataConfig
from ..batch.order import BatchOrder
from ..example import Facts
from ..store.arrays import Examples

__all__ = ["of_epoch", "of_splits", "report", "summary"]

_BINS = 12
_BAR = 40


def of_splits(
    source: str,
    formats: Mapping[str, int],
    config: DataConfig,
    facts: Facts,
    splits: Mapping[str, Examples],
) -> dict[str, Any]:
    """What was read and left out, lengths and duplicates: plain numbers, lists and dicts."""
    splits = {name: part for name, part in splits.items() if part}
    kinds = {name: np.unique(part.digests) for name, part in splits.items()}
    return {
        "source": source,
        "formats": dict(formats),
        "shapes": dict(facts.shapes),
        "train_on": config.train_on,
        "thinking": config.thinking,
        "max_seq_length": config.max_seq_length,
        "rows": sum(facts.shapes.values()) + facts.bad,
        "overlong_skipped": facts.skipped,
        "truncated": facts.truncated,
        "bad": facts.bad,
        "bad_rows": list(facts.bad_rows),
        "notes": dict(facts.notes),
        "splits": {name: _of_split(part, kinds[name]) for name, part in splits.items()},
        "across_splits": {
            f"{a} and {b}": len(np.intersect1d(kinds[a], kinds[b], assume_unique=True))
            for a, b in combinations(kinds, 2)
        },
    }


def _of_split(examples: Examples, kinds: np.ndarray) -> dict[str, Any]:
    lengths = examples.lengths
    tokens, targets = int(lengths.sum()), int(examples.targets.sum())
    edges = np.unique(np.ceil(np.linspace(0, lengths.max(), _BINS + 1)).astype(int))
    bins, _ = np.histogram(lengths, edges)
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
            {"up_to": int(edge), "examples": int(count)} for edge, count in zip(edges[1:], bins)
        ],
    }


def of_epoch(order: BatchOrder) -> dict[str, Any]:
    """The batches of an epoch, and the share of their positions that hold no example."""
    batches = order.epoch(0)
    positions = int(order.lengths.sum())
    filled = positions + sum(map(order.padding_of, batches))
    return {
        "batch_size": order.batch_size,
        "packed": order.capacity is not None,
        "batches": len(batches),
        "rows": sum(map(len, batches)),
        "padding": 1 - positions / filled if filled else 0.0,
    }


# ---------------------------------------------------------------- as text


def summary(figures: dict[str, Any]) -> str:
    """A few lines of `of_splits`: what was found, what each split holds, what was left out."""
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in sorted(figures["shapes"].items()))
    formats = ", ".join(sorted(figures["formats"]))
    lines = [
        f"{figures['source']}: {shapes or 'no'} rows{f' ({formats})' if formats else ''}; "
        f"trained on: {figures['train_on']}"
    ]
    lines += [
        f"  {name + ':':6} {part['examples']:,} examples, {part['tokens']:,} tokens, "
        f"{part['targets']:,} targets ({part['target_share']:.0%}), longest {part['longest']:,}"
        for name, part in figures["splits"].items()
    ]
    for key, verb in (("overlong_skipped", "skipped"), ("truncated", "truncated")):
        if count := figures[key]:
            lines.append(f"  {count:,} over {figures['max_seq_length']:,} tokens {verb}")
    if figures["bad"]:
        lines.append(f"  {figures['bad']:,} that cannot be used skipped")
        lines += [f"    {reason}" for reason in figures["bad_rows"][:3]]
    lines += [f"  {count:,} {note}" for note, count in sorted(figures["notes"].items())]
    return "\n".join(lines)


def report(figures: dict[str, Any]) -> str:
    """The summary of `Dataset.stats`, and below it lengths, duplicates and the epoch."""
    train = figures["splits"]["train"]
    lines = [summary(figures), "", "  tokens an example, train:"]
    most, lower = max(part["examples"] for part in train["histogram"]), 0
    for count, edge in ((part["examples"], part["up_to"]) for part in train["histogram"]):
        bar = "█" * -(-count * _BAR // most)
        lines.append(f"  {lower:>6,} - {edge:>6,}  {bar:{_BAR}}  {count:,}")
        lower = edge
    lines.append(
        f"  median {train['median']:,.0f}, longest {train['longest']:,} at {train['longest_at']}"
    )
    repeated = {name: split["duplicates"] for name, split in figures["splits"].items()}
    lines.append("  duplicates: " + ", ".join(f"{n:,} in {s}" for s, n in repeated.items()))
    for pair, count in figures["across_splits"].items():
        leak = "  <- evaluated on what is trained on" if count and "train" in pair else ""
        lines.append(f"  in both {pair}: {count:,}{leak}")
    epoch = figures["epoch"]
    what = "packed rows" if epoch["packed"] else "examples"
    lines.append(
        f"  an epoch: {epoch['batches']:,} steps of {epoch['batch_size']} {what}, "
        f"{epoch['padding']:.1%} padding"
    )
    return "\n".join(lines)
