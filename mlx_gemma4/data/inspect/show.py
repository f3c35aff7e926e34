"""An example to look at, in text, with colour, in HTML; and a whole dataset as a page."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DataError
from ..example import Example
from .report import report

__all__ = ["Shown", "page"]

_GREEN, _DIM, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters as their pictures: a terminal must not obey what data says."""

_STYLE = """
.g4 { font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere; border: 1px solid #8886; border-radius: 6px; padding: 10px 12px;
      margin: 6px 0 18px; }
.g4 .target { background: #2da44e33; border-bottom: 2px solid #2da44e; }
.g4 .special { color: #8250df; opacity: .85; }
.g4 .head { color: #888; margin-bottom: 6px; }
"""
_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 32px auto; padding: 0 16px; }
pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; }
"""


@dataclass(frozen=True)
class Shown:
    """An example as pieces: (text, whether it is a target, whether it is one special token)."""

    title: str
    pieces: tuple[tuple[str, bool, bool], ...]

    @classmethod
    def of(cls, example: Example, tokenizer: Any, name: str) -> Shown:
        if tokenizer is None:
            do = "read the rows with mlx_gemma4.read"
            raise DataError("these examples came without a tokenizer", wanted="one", do=do)
        known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        special = np.isin(example.tokens, sorted(known))
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
        for text, target, special in self.pieces:
            names = " ".join(filter(None, ["target" * target, "special" * special]))
            safe = html.escape(text.translate(_CONTROLS))
            spans.append(f'<span class="{names}">{safe}</span>' if names else safe)
        head = f'<div class="head">{html.escape(self.title)}</div>'
        return f'<div class="g4">{head}{"".join(spans)}</div>'

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return f"<style>{_STYLE}</style>{self.html()}"


def page(figures: dict[str, Any], shown: Iterable[Shown]) -> str:
    """The report as an HTML page, with examples.

    It needs nothing from elsewhere, holds no script, and forbids its browser to fetch or run any.
    """
    told = html.escape(report(figures).translate(_CONTROLS))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(figures["source"])}</title><style>{_PAGE_STYLE}{_STYLE}</style></head><body>
<pre>{told}</pre>
<p class="g4" style="border:0;padding:0"><span class="target">targets</span> \
<span class="special">&lt;special tokens&gt;</span></p>
{"".join(example.html() for example in shown)}
</body></html>
"""
