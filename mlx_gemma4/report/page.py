"""The page of a run, or of several side by side. Whatever comes from data is escaped."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.inspect import POLICY, STYLE, Shown, safe_html
from .chart import Line, chart, number

_SECONDS = 15
"""Between two looks of a browser at the page of a run that goes on."""

_CHARTS = {
    "loss": "Loss, nats a target token",
    "val_loss": "Validation loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
    "peak_memory_gb": "Peak memory, GB",
}
_COLOURS = 8
_NOTES, _ANSWERS = 30, 10

_STYLE = (
    """
:root { color-scheme: light dark; --back: #fcfcfb; --ink: #1a1a19; --soft: #63625e; --line: #e4e3de;
  --0: #2a78d6; --1: #d9591d; --2: #148f63; --3: #b07800; --4: #c2497c; --5: #5a7d00; --6: #6a4fc4;
  --7: #d03a3a; }
@media (prefers-color-scheme: dark) { :root { --back: #1a1a19; --ink: #f2f1ec; --soft: #a5a49d;
  --line: #3a3936; --0: #4c97f0; --1: #f07d45; --2: #2fb585; --3: #d9a02c; --4: #e57aa6;
  --5: #94b93a; --6: #9d87ec; --7: #ee6a6a; } .g4 .special { color: #b79bf2; } }
* { box-sizing: border-box; }
"""
    + "".join(f".c{i} {{ color: var(--{i}); }} " for i in range(_COLOURS))
    + """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 20px 16px;
  background: var(--back); color: var(--ink); overflow-wrap: anywhere; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 8px; }
h3 { font-size: 14px; font-weight: 600; margin: 0; } .soft { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr));
  gap: 24px; margin-top: 20px; }
.charts > figure:first-child { grid-column: 1 / -1; } figure { margin: 0; min-width: 0; }
@media (min-width: 1100px) { .charts.many > figure:nth-child(-n + 2) { grid-column: span 2; } }
figure:first-child .plot, .many figure:nth-child(2) .plot { height: 280px; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline;
  margin-bottom: 6px; }
.key { font-size: 13px; color: var(--soft); } .key b { color: var(--ink); font-weight: 600; }
.key i { display: inline-block; width: 12px; height: 3px; margin-right: 6px; vertical-align: middle;
  background: currentColor; }
.plot { position: relative; height: 170px; margin: 0 10px 24px 60px; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--soft);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.plot .y { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
path { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke; }
.grid { color: var(--line); stroke-width: 1; } .line { stroke-width: 2; stroke-linejoin: round; }
.dot { stroke-width: 7; stroke-linecap: round; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
td, th { text-align: left; vertical-align: top; padding: 3px 20px 3px 0; min-width: 90px;
  border-bottom: 1px solid var(--line); font-weight: 400; } th { color: var(--soft); }
summary { cursor: pointer; color: var(--soft); }
pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; margin: 0; }
.g4 { max-height: 320px; overflow: auto; }
"""
)


@dataclass(frozen=True)
class Story:
    """What a page knows of a run.

    Attributes:
        name: its folder.
        history: the reports of metrics.jsonl.
        state: where it stands, for people.
        evaluation: evaluation.json of `python -m mlx_gemma4.eval`, if there is one.
    """

    name: str
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    state: str
    evaluation: Mapping[str, Any] | None = None


def page(stories: Sequence[Story], examples: Iterable[Shown] = (), *, live: bool = False) -> str:
    """The page: one HTML file without scripts, that its browser loads again where a run is live.

    Args:
        examples: of the data, for the page of one run.
    """
    one = stories[0] if len(stories) == 1 else None
    title = one.name if one else f"{len(stories)} runs"
    refresh = f'<meta http-equiv="refresh" content="{_SECONDS}">' * live
    kind = "charts" if one else "charts many"
    parts = [f'<div class="{kind}">{_charts(stories)}</div>']
    if one:
        about = f"{one.settings.get('model')}, trained on {one.settings.get('data')}"
        parts.insert(0, f'<p>{safe_html(one.state)}</p><p class="soft">{safe_html(about)}</p>')
        parts += [_notes(one), _evaluation(one), _samples(one), _examples(examples), _loading(one)]
        rows = [[key, one.settings[key]] for key in sorted(one.settings)]
        parts.append(f"<h2>Settings</h2><details><summary>all</summary>{_table(rows)}</details>")
    else:
        parts += [f"<h2>Side by side</h2>{_table(_compared(stories))}", _last_samples(stories)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe_html(title)}</title><style>{STYLE}{_STYLE}</style></head><body>
<h1>{safe_html(title)}</h1>
<p class="soft">written {time.strftime("%Y-%m-%d %H:%M:%S")}</p>
{"".join(parts)}
</body></html>
"""


def _charts(stories: Sequence[Story]) -> str:
    def points(story: Story, key: str) -> list[tuple[float, float]]:
        known = [
            m
            for m in story.history
            if m.get(key) is not None and (m.get("tokens") or "loss" in key)
        ]
        return [(m["step"], m[key]) for m in known]

    def lines(key: str) -> list[Line]:
        if len(stories) == 1:
            return [Line("", 0, points(stories[0], key))]
        is_rare = key == "val_loss"
        return [
            Line(story.name, i % _COLOURS, points(story, key), is_rare)
            for i, story in enumerate(stories)
        ]

    drawn = {key: chart(_CHARTS[key], lines(key), "loss" not in key) for key in _CHARTS}
    if len(stories) == 1:
        validation = Line("validation", 1, points(stories[0], "val_loss"), dotted=True)
        both = [Line("training", 0, points(stories[0], "loss")), validation]
        drawn |= {"loss": chart(_CHARTS["loss"], both), "val_loss": ""}
    return "".join(drawn.values())


def _table(rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column names the rows."""
    lines = (
        f"<tr><th>{safe_html(head)}</th>"
        + "".join(f"<td>{safe_html(_told(value))}</td>" for value in cells)
        + "</tr>"
        for head, *cells in rows
    )
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _told(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return number(value) if isinstance(value, float) else "" if value is None else str(value)


def _compared(stories: Sequence[Story]) -> list[list[Any]]:
    """The ends of the runs, and the settings that are not the same in all."""

    def last(story: Story, key: str) -> Any:
        return next((m[key] for m in story.history[::-1] if m.get(key) is not None), None)

    rows: list[list[Any]] = [["", *(s.name for s in stories)], ["", *(s.state for s in stories)]]
    for key, title in _CHARTS.items():
        rows.append([f"{title}, last", *(last(story, key) for story in stories)])
        if key == "val_loss":
            losses = [[m[key] for m in s.history if m.get(key) is not None] for s in stories]
            rows.append([f"{title}, lowest", *(min(found, default=None) for found in losses)])
    for key in sorted({key for story in stories for key in story.settings}):
        values = [story.settings.get(key) for story in stories]
        if any(value != values[0] for value in values):
            rows.append([key, *values])
    return rows


def _notes(story: Story) -> str:
    notes = [(f"step {m['step']}", note) for m in story.history for note in m.get("notes", ())]
    return f"<h2>What stood out</h2>{_table(notes[-_NOTES:])}" if notes else ""


def evaluation_rows(told: Mapping[str, Any]) -> list[list[str]]:
    """What evaluation.json says as a table, its head first; intervals are of 95%."""
    figures, differences, tasks = told["figures"], told["differences"], told["tasks"]
    rows = [["", "base", "adapter", "difference"][: 4 if len(figures or tasks) > 1 else 2]]
    for name in figures[0] if figures else ():
        row = [name, *(f"{found[name]:.4g}" for found in figures)]
        if name in differences:
            row.append("{:+.4g} ({:+.4g} to {:+.4g})".format(*differences[name]))
        rows.append(row)
    for task, metrics in tasks[0].items() if tasks else ():
        for metric in metrics:
            pairs = [found[task][metric] for found in tasks]
            said = [f"{v:.4g}" + (f" ± {e:.2g}" if e is not None else "") for v, e in pairs]
            rows.append([f"{task}: {metric}", *said])
    return rows


def _evaluation(story: Story) -> str:
    told = story.evaluation
    if not told:
        return ""
    rows = evaluation_rows(told)
    about = f"{told['adapter']} on {told['model']}"
    parts = [f'<p class="soft">{safe_html(about)}</p>']
    if told["data"]:
        parts.append(f'<p class="soft">{safe_html(told["data"])}; intervals are of 95%</p>')
    parts.append(_table(rows))
    for said in list(zip(*told["answers"]))[:_ANSWERS]:
        answers = [("reference", said[0]["reference"])]
        answers += [(name, one["answer"]) for name, one in zip(rows[0][1:], said)]
        parts.append(f"<h3>{safe_html(said[0]['prompt'])}</h3>{_table(answers)}")
    return f"<h2>Evaluation</h2>{''.join(parts)}"


def _samples(story: Story) -> str:
    """Each prompt's answers by step: the first and the newest, and those between on a click."""
    answers: dict[str, list[tuple[str, str]]] = {}
    for metrics in story.history:
        for sample in metrics.get("samples", ()):
            found = answers.setdefault(sample["prompt"], [])
            found.append((f"step {metrics['step']}", sample["answer"]))
    told = []
    for prompt, found in answers.items():
        between = found[1:-2]
        rest = f"<details><summary>{len(between)} between</summary>{_table(between)}</details>"
        shown = _table(found[:1]) + rest * bool(between) + _table(found[1:][-2:])
        told.append(f"<h3>{safe_html(prompt)}</h3>{shown}")
    return f"<h2>Sample answers</h2>{'<br>'.join(told)}" if told else ""


def _last_samples(stories: Sequence[Story]) -> str:
    """The newest answers of every run, by prompt."""
    answers: dict[str, dict[str, str]] = {}
    for story in stories:
        for metrics in story.history:
            for sample in metrics.get("samples", ()):
                answers.setdefault(sample["prompt"], {})[story.name] = sample["answer"]
    told = [f"<h3>{safe_html(p)}</h3>{_table(found.items())}" for p, found in answers.items()]
    return f"<h2>Newest sample answers</h2>{'<br>'.join(told)}" if told else ""


def _examples(examples: Iterable[Shown]) -> str:
    told = "".join(example.html() for example in examples)
    return f"<h2>Examples, with what is learned in green</h2>{told}" if told else ""


def _loading(story: Story) -> str:
    folder, model = shlex.quote(story.name), shlex.quote(str(story.settings.get("model")))
    lines = [
        f'python -m mlx_gemma4.generate --adapter {folder} --prompt "..."',
        f"python -m mlx_gemma4.export {folder} --which best --format peft --output out/",
        f'mlx_lm.generate --model {model} --adapter-path {folder}/adapter --prompt "..."',
        f"gemma = mlx_gemma4.load({story.settings.get('model')!r}, adapter={story.name!r})",
    ]
    return (
        f'<h2>Use the adapter</h2><div class="g4"><pre>{safe_html(chr(10).join(lines))}</pre></div>'
    )
