"""A look at a dataset before training on it: counts, lengths, leaks; examples in text and HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import DataError
from ..media.file import MediaFile, is_unchanged
from ..media.image import thumbnail
from .batch.order import BatchOrder
from .example import Example, Examples, Facts

_MEDIA = ("<|image|>", "<|audio|>")
_BINS = 12
_BAR = 40
_GREEN, _DIM, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters as their pictures: a terminal must not obey what data says."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a page lets its browser load: nothing but the pictures that it holds."""

STYLE = """
.g4 { font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere; border: 1px solid #8886; border-radius: 6px; padding: 10px 12px;
      margin: 6px 0 18px; }
.g4 .target { background: #2da44e33; border-bottom: 2px solid #2da44e; }
.g4 .special { color: #8250df; opacity: .85; }
.g4 img { display: block; max-width: 192px; border-radius: 4px; }
.g4 .head { color: #888; margin-bottom: 6px; }
"""
_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 32px auto; padding: 0 16px; }
pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; }
"""


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
        "empty": facts.empty,
        "empty_rows": list(facts.empty_rows),
        "notes": dict(facts.notes),
        "prompts": next(iter(facts.prompts), ""),
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
    if figures["empty"]:
        places = ", ".join(figures["empty_rows"][:3]) + ", ..." * (figures["empty"] > 3)
        lines.append(f"  warning: {figures['empty']:,} with an empty answer: {places}")
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
    longest = f"{train['longest']:,} at {train['longest_at']}"
    lines.append(f"  median {train['median']:,.0f}, longest {longest}")
    repeated = [f"{s['duplicates']:,} in {name}" for name, s in figures["splits"].items()]
    lines.append("  duplicates: " + ", ".join(repeated))
    for pair, count in figures["across_splits"].items():
        leak = "  <- evaluated on what is trained on" if count and "train" in pair else ""
        lines.append(f"  in both {pair}: {count:,}{leak}")
    epoch = figures["epoch"]
    steps = f"{epoch['batches']:,} steps of {epoch['batch_size']}"
    what = "packed rows" if epoch["packed"] else "examples"
    lines.append(f"  an epoch: {steps} {what}, {epoch['padding']:.1%} padding")
    lines += [f"  {figures['prompts']}"] * bool(figures["prompts"])
    return "\n".join(lines)


@dataclass(frozen=True)
class Shown:
    """An example as pieces: (text, whether it is a target, whether it is a special token).

    The tokens of an image are one piece, "<|image|> x 256 a.png".

    Attributes:
        media: by the index of their pieces.
    """

    title: str
    pieces: tuple[tuple[str, bool, bool], ...]
    media: Mapping[int, MediaFile] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Example, tokenizer: Any, name: str) -> Shown:
        if tokenizer is None:
            do = "read the rows with mlx_gemma4.read"
            raise DataError("these examples came without a tokenizer", wanted="one", do=do)
        known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        special = np.isin(example.tokens, sorted(known))
        kinds = np.stack([example.mask, special], 1)
        differs = example.tokens[1:] != example.tokens[:-1]
        cuts = np.flatnonzero((kinds[1:] != kinds[:-1]).any(1) | special[1:] & differs) + 1
        how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        pieces = [
            (
                tokenizer.decode(ids[: 1 if kind[0, 1] else None].tolist(), **how)
                + f" x {len(ids)}" * bool(kind[0, 1] and len(ids) > 1),
                bool(kind[0, 0]),
                bool(kind[0, 1]),
            )
            for ids, kind in zip(np.split(example.tokens, cuts), np.split(kinds, cuts))
        ]
        places = [i for i, piece in enumerate(pieces) if piece[0].startswith(_MEDIA)]
        media = dict(zip(places, example.media))
        for i, file in media.items():
            pieces[i] = (f"{pieces[i][0]} {Path(file.path).name}", *pieces[i][1:])
        title = f"{name} {example.origin}, {len(example)} tokens, {example.num_targets} targets"
        return cls(title, tuple(pieces), media)

    def text(self, *, colour: bool = False) -> str:
        """The example; ⟦ and ⟧ stand around targets."""
        parts, before = [self.title + "\n"], False
        for text, target, special in self.pieces:
            if target != before:
                parts.append("⟦" if target else "⟧")
                before = target
            text = text.translate(_CONTROLS)
            paint = (_DIM if special else "") + (_GREEN if target else "")
            parts.append(f"{paint}{text}{_END}" if colour and paint else text)
        return "".join(parts) + ("⟧" if before else "")

    def html(self) -> str:
        """The example as an HTML fragment, all content escaped."""
        spans = []
        for i, (text, target, special) in enumerate(self.pieces):
            names = " ".join(filter(None, ["target" * target, "special" * special]))
            safe = safe_html(text)
            spans.append(f'<span class="{names}">{safe}</span>' if names else safe)
            if i in self.media and self.media[i].kind == "image":
                spans.append(_picture(self.media[i]))
        head = f'<div class="head">{safe_html(self.title)}</div>'
        return f'<div class="g4">{head}{"".join(spans)}</div>'

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{self.html()}"


@lru_cache(maxsize=256)
def _picture(file: MediaFile) -> str:
    """An image element that holds the picture; nothing if the file is not as it was."""
    try:
        content = thumbnail(file.path) if is_unchanged(file) else b""
    except DataError:
        content = b""
    data = base64.b64encode(content).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">' if content else ""


def safe_html(text: str) -> str:
    """Text that a page may hold: escaped, with control characters as their pictures."""
    return html.escape(text.translate(_CONTROLS))


def page(figures: dict[str, Any], shown: Iterable[Shown]) -> str:
    """The report as an HTML page, with examples.

    It needs nothing from elsewhere, holds no script, and forbids its browser to fetch or run any.
    """
    told = safe_html(report(figures))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(figures["source"])}</title><style>{_PAGE_STYLE}{STYLE}</style></head><body>
<pre>{told}</pre>
<p class="g4" style="border:0;padding:0"><span class="target">targets</span> \
<span class="special">&lt;special tokens&gt;</span></p>
{"".join(example.html() for example in shown)}
</body></html>
"""
