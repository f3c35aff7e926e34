"""The records of contestants as a table, with ratios to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["table"]

# heading, key of the record, digits, whether a ratio follows
_DENSE = [
    ("loss", "loss", 5, False),
    ("step s", "step_seconds", 2, True),
    ("tokens/s", "real_tokens_per_second", 0, False),
    ("resident MB", "resident_mb", 0, False),
    ("peak MB", "peak_minus_resident_mb", 0, True),
    ("RSS MB", "rss_peak_mb", 0, False),
]
_SHORT = [
    ("loss", "loss", 5, False),
    ("steps", "steps_per_epoch", 0, False),
    ("tokens/s", "real_tokens_per_second", 0, True),
    ("1st epoch", "first_epoch_real_tokens_per_second", 0, False),
    ("targets/s", "target_tokens_per_second", 0, False),
    ("resident MB", "resident_mb", 0, False),
    ("peak MB", "peak_minus_resident_mb", 0, True),
    ("RSS MB", "rss_peak_mb", 0, False),
]


def table(results: Sequence[dict[str, Any]], against: str | None, short: bool) -> str:
    """One line per contestant, and a line of notes for each that has any.

    Args:
        results: records of contestant.py that were not left out.
        against: the contestant that ratios are taken to; the first if it is None or left out.
        short: throughput by epoch, in place of seconds by step.
    """
    base = next((row for row in results if row["name"] == against), results[0])
    columns = _SHORT if short else _DENSE
    lines = [f"{base['load']}, {base['dtype']}; ratios to {base['name']}"]
    heads = [
        f"{head:>{_width(head)}}" + (f" {'ratio':>6}" if ratio else "")
        for head, _, _, ratio in columns
    ]
    lines.append(" ".join([f"{'':20}", *heads]))
    for row in results:
        cells = [f"{row['name']:20}"]
        for head, key, digits, ratio in columns:
            cells.append(f"{row[key]:{_width(head)}.{digits}f}")
            if ratio:
                cells.append(f"{row[key] / base[key]:6.2f}")
        lines.append(" ".join(cells))
    lines += [f"  {row['name']}: {note}" for row in results for note in row["notes"]]
    sets = {row["trainable_parameters"] for row in results}
    if len(sets) > 1:
        lines.append(f"  trainable parameters differ: {sorted(sets)}")
    return "\n".join(lines)


def _width(head: str) -> int:
    return max(len(head), 8)
