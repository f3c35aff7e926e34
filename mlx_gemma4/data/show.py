"""An example for the eye, and a whole dataset as a page: in text, with colour, in HTML."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .batches import Example
from .report import epoch_line

if TYPE_CHECKING:
    from .dataset import Dataset

__all__ = ["Shown", "page"]

_GREEN, _DIM, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters as their pictures: a terminal must not obey what data says."""

_STYLE = """
.g4 { font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere; border: 1px solid #8886; border-radius: 6px; padding: 10px 12px;
      margin: 6px 0 18px; }
.g4 .learned { background: #2da44e33; border-bottom: 2px solid #2da44e; }
.g4 .special { color: #8250df; opacity: .85; }
.g4 .head { color: #888; margin-bottom: 6px; }
"""
_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 32px auto; padding: 0 16px; }
h1 { font-size: 22px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin-top: 32px; }
table { border-collapse: collapse; } td, th { padding: 3px 16px 3px 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr + tr { border-top: 1px solid #8884; }
.bar { display: inline-block; height: 12px; background: #2da44e; border-radius: 2px; }
.lengths td:nth-child(2) { width: 420px; text-align: left; }
li { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Shown:
    """An example as pieces of text.

    Attributes:
        title: which example it is.
        pieces: (text, whether it is learned, whether it is one special token).
    """

    title: str
    pieces: tuple[tuple[str, bool, bool], ...]

    @classmethod
    def of(cls, example: Example, tokenizer: Any, name: str) -> Shown:
        """The pieces of an example."""
        if tokenizer is None:
            raise DataError(
                "these examples came without a tokenizer",
                wanted="one, to turn tokens into text",
                do="read the rows with mlx_gemma4.read",
            )
        special = np.isin(example.tokens, sorted(tokenizer.all_special_ids))
        special |= np.isin(example.tokens, sorted(tokenizer.added_tokens_decoder))
        kinds = np.stack([example.mask, special], 1)
        cuts = np.flatnonzero((kinds[1:] != kinds[:-1]).any(1) | special[1:]) + 1
        pieces = []
        for ids, kind in zip(np.split(example.tokens, cuts), np.split(kinds, cuts)):
            text = tokenizer.decode(
                ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            pieces.append((text, bool(kind[0, 0]), bool(kind[0, 1])))
        title = f"{name} {example.origin}, {len(example)} tokens, {example.num_targets} targets"
        return cls(title, tuple(pieces))

    def text(self, *, colour: bool = False) -> str:
        """The example; ⟦ and ⟧ stand around what is learned."""
        lines, learning = [self.title + "\n"], False
        for text, learned, special in self.pieces:
            if learned != learning:
                lines.append("⟦" if learned else "⟧")
                learning = learned
            text = text.translate(_CONTROLS)
            paint = (_DIM if special else "") + (_GREEN if learned else "")
            lines.append(f"{paint}{text}{_END}" if colour and paint else text)
        return "".join(lines) + ("⟧" if learning else "")

    def html(self) -> str:
        """The example as an HTML fragment, all content escaped."""
        spans = []
        for text, learned, special in self.pieces:
            names = " ".join(filter(None, ["learned" * learned, "special" * special]))
            safe = html.escape(text.translate(_CONTROLS))
            spans.append(f'<span class="{names}">{safe}</span>' if names else safe)
        head = f'<div class="head">{html.escape(self.title)}</div>'
        return f'<div class="g4">{head}{"".join(spans)}</div>'

    def __repr__(self) -> str:
        return self.text()

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return f"<style>{_STYLE}</style>{self.html()}"


def page(dataset: Dataset, figures: dict[str, Any], count: int) -> str:
    """A whole page: figures, lengths, and the first examples of every split.

    It needs nothing from elsewhere, holds no script, and forbids its browser to fetch or run any.
    """
    train = figures["splits"]["train"]
    most, lower, bars = max(b["examples"] for b in train["histogram"]), 0, []
    for bin_ in train["histogram"]:
        bar = f'<span class="bar" style="width:{bin_["examples"] / most * 400:.1f}px"></span>'
        bars.append(_cells(f"{lower:,} – {bin_['up_to']:,}", bar, f"{bin_['examples']:,}"))
        lower = bin_["up_to"]
    shown = [
        dataset.show(i, split).html()
        for split in figures["splits"]
        for i in range(min(count, len(getattr(dataset, split))))
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(dataset.source)}</title><style>{_PAGE_STYLE}{_STYLE}</style></head><body>
<h1>{html.escape(dataset.source)}</h1>
<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in _facts(figures))}</ul>
<table>{_split_table(figures)}</table>
<h2>Tokens an example, train</h2><table class="lengths">{"".join(bars)}</table>
<h2>Examples</h2><p class="g4" style="border:0;padding:0"><span class="learned">learned</span> \
<span class="special">&lt;special&gt;</span></p>
{"".join(shown)}
</body></html>
"""


def _cells(*cells: str, tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _split_table(figures: dict[str, Any]) -> str:
    names = ("examples", "tokens", "targets", "target_share", "median", "longest", "duplicates")
    rows = [_cells("", *(name.replace("_", " ") for name in names), tag="th")]
    for split, values in figures["splits"].items():
        cells = [f"{values[n]:.0%}" if n == "target_share" else f"{values[n]:,.0f}" for n in names]
        rows.append(_cells(split, *cells))
    return "".join(rows)


def _facts(figures: dict[str, Any]) -> list[str]:
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in figures["shapes"].items())
    return [
        f"{figures['rows']:,} rows ({', '.join(figures['formats'])}): {shapes}",
        f"trained on: {figures['train_on']}; thinking: {figures['thinking']}",
        f"over {figures['max_seq_length']:,} tokens: {figures['overlong_skipped']:,} skipped, "
        f"{figures['truncated']:,} truncated",
        f"{figures['bad']:,} rows that cannot be used",
        *figures["bad_rows"][:5],
        *(f"{count:,} {note}" for note, count in figures["notes"].items()),
        *(f"in both {pair}: {n:,}" for pair, n in figures["across_splits"].items()),
        epoch_line(figures["epoch"]),
    ]
