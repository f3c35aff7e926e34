"""The page of runs: what it shows, that it is whole and harmless, and how it looks in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import CHAT, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.data.inspect import Shown
from mlx_gemma4.report import __main__ as command
from mlx_gemma4.report.chart import Line, chart
from mlx_gemma4.report.page import Story, page
from mlx_gemma4.train.evaluate import read_prompts

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&\x1b[31m"
SEEN = EVIL.replace("\x1b", "␛")


def report(step: int, **more) -> dict:
    return {
        "step": step, "loss": 3 - step / 100, "val_loss": None if step % 5 else 3.1 - step / 100,
        "tokens": 100, "tokens_per_second": 1234.5, "learning_rate": 1e-4,
        "peak_memory_gb": 1.5, "grad_norm": 0.5, **more,
    }  # fmt: skip


HISTORY = [
    report(step, notes=[EVIL], samples=[{"prompt": EVIL, "answer": f"{EVIL} {step}"}])
    for step in range(1, 21)
]
STORY = Story(EVIL, {"model": EVIL, "seed": 3}, HISTORY, EVIL)
SHOWN = Shown(EVIL, ((EVIL, True, False), (EVIL, False, True)))


class Reader(HTMLParser):
    """The tags and the text of a page; every tag that is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("stories", [[STORY], [STORY, STORY]])
def test_nothing_that_data_holds_becomes_markup(stories):
    text = page(stories, [SHOWN], live=True)
    read = Reader(text)
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "img", "link", "iframe", "a"})
    attributes = {name for _, attrs in read.tags for name in attrs}
    assert not any(name.startswith("on") or name in ("src", "href") for name in attrs_of(read))
    assert attributes and "url(" not in text and "//" not in text.replace("</", "")
    assert read.text.count(SEEN) >= (30 if len(stories) == 1 else 8)
    policy = next(attrs for _, attrs in read.tags if "content" in attrs)
    assert policy["content"].startswith("default-src 'none'")


def attrs_of(read: Reader) -> set[str]:
    return {name for _, attrs in read.tags for name in attrs}


def test_the_page_of_a_run():
    text = Reader(page([STORY], [SHOWN])).text
    for told in (
        "Loss, nats a target token", "Gradient norm", "Tokens a second", "Peak memory, GB",
        "Learning rate", "17 between", "step 20", "What stood out", "Use the adapter",
    ):  # fmt: skip
        assert told in text, told
    assert 'http-equiv="refresh"' not in page([STORY])
    assert 'http-equiv="refresh"' in page([STORY], live=True)


def test_runs_side_by_side():
    other = Story("runs/2", {"model": EVIL, "seed": 4}, HISTORY[:10], "running")
    text = Reader(page([STORY, other])).text
    assert "Side by side" in text and "seed34" in text and "runs/2" in text
    assert "Validation loss, lowest2.93" in text.replace("\n", "")
    assert "modelruns" not in text  # the same in both


def test_a_chart_draws_its_points():
    drawn = chart("t", [Line("a", 0, [(0, 0.0), (5, 1.0), (10, 2.0)], dotted=True)], from_zero=True)
    [(line, dots)] = re.findall(r'line c0" d="(.*?)".*dot c0" d="(.*?)"', drawn)
    assert line == "M0.0 1000.0L500.0 528.3L1000.0 56.6"
    assert dots.count("h0") == 3
    assert '<span class="y" style="top:52.8%">1</span>' in drawn
    assert '<span class="x" style="left:60.0%">6</span>' in drawn


@pytest.mark.parametrize(
    "values", [[], [float("nan")], [1.0], [2.0, 2.0], [0.0, 0.0], [1e-30, 1.0]]
)
def test_charts_of_few_or_equal_values(values):
    drawn = chart("t", [Line("", 0, list(enumerate(values)))])
    assert bool(drawn) == bool([v for v in values if v == v])
    assert "nan" not in drawn and "inf" not in drawn


def test_a_long_run_is_no_long_page():
    history = [report(step) for step in range(20_000)]
    assert len(page([Story("runs/1", {}, history, "running")])) < 60_000


# ---------------------------------------------------------------- of real runs


class Look(g4.Callback):
    """The page after each report."""

    def __init__(self):
        self.pages = []

    def advance(self, step, loss):
        self.pages.append((self.run.output / "report.html").read_text())


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> g4.Run:
    folder = tmp_path_factory.mktemp("report")
    rows = write_rows(folder / "rows", train=CHAT, valid=CHAT[:1])
    (folder / "prompts.txt").write_text("What is a list?\n\nOpen <b>the file</b>.\n")
    config = g4.TrainConfig(
        iters=3, report_every=1, eval_every=2, sample_prompts=str(folder / "prompts.txt"),
        learning_rate=1e-2,
    )  # fmt: skip
    gemma, look = g4.load(tiny), Look()
    data = g4.read(rows, gemma)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_gemma4.train.evaluate._SAMPLE_TOKENS", 6)
        run = g4.finetune(
            gemma, data, config, output=folder / "run", callbacks=[look], console=False
        )
    run.look = look
    return run


def test_the_page_is_there_while_a_run_goes_on_and_ends_with_it(run):
    assert [f"running: step {step} of 3" in page for step, page in enumerate(run.look.pages)] == [
        True, True, True
    ]  # fmt: skip
    assert all("refresh" in page for page in run.look.pages)
    last = (run.output / "report.html").read_text()
    assert "finished, step 3 of 3" in last and "refresh" not in last
    text = Reader(last).text
    assert "A list holds values." in text and "Open <b>the file</b>." in text
    assert 'class="target"' in last and f"train[0] {run.output.parent}" in last


def test_answers_are_kept_at_each_evaluation(run):
    answered = {m["step"]: m["samples"] for m in run.history if "samples" in m}
    assert list(answered) == [0, 2, 3]
    for samples in answered.values():
        assert [s["prompt"] for s in samples] == ["What is a list?", "Open <b>the file</b>."]
    assert answered[3][0]["answer"] == run.gemma.generate("What is a list?", max_tokens=6)
    assert g4.Run.open(run.output).history == run.history


def test_the_command_writes_a_page_of_one_run_or_several(run, tmp_path, capsys):
    other = shutil.copytree(run.output, tmp_path / "other")
    words = [str(run.output), str(other), str(tmp_path), "--output", str(tmp_path / "all.html")]
    command.main(words)
    text = Reader((tmp_path / "all.html").read_text()).text
    assert "2 runs" in text and str(other) in text and "finished, step 3" in text
    command.main([str(other), "--output", str(tmp_path / "one.html")])
    assert "Sample answers" in (tmp_path / "one.html").read_text()
    for words, told in (
        ([str(tmp_path)], "no run"), ([str(other), "--output", "/proc/x"], "cannot write")
    ):  # fmt: skip
        with pytest.raises(g4.ConfigError, match=told):
            command.main(words)


def test_prompts_are_lines_or_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    assert read_prompts(str(path)) == ["one", [{"role": "user", "content": "two"}]]
    for text in ("[]", "{", "{}", '{"messages": [{"role": "nobody"}]}', "\xff"):
        path.write_text(text, "latin-1")
        with pytest.raises(g4.ConfigError):
            read_prompts(str(path))
    with pytest.raises(g4.ConfigError, match="cannot be read"):
        read_prompts(str(tmp_path / "none"))


# ---------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-quic",
    "--allow-file-access-from-files", "--virtual-time-budget=2000", "--dump-dom",
]  # fmt: skip
WATCHER = """<iframe src="page.html" style="width:{}px;height:900px"></iframe><pre id=told></pre>
<script>onload = () => {{
  const frame = document.querySelector("iframe"), doc = frame.contentDocument;
  const box = element => element.getBoundingClientRect();
  const inside = [...doc.querySelectorAll("figure, .plot span, table, h1, h3")].filter(
    element => !element.closest(".wide")).every(
    element => box(element).left >= 0 && box(element).right <= frame.clientWidth);
  const back = frame.contentWindow.getComputedStyle(doc.body).backgroundColor;
  const drawn = [...doc.querySelectorAll("path.line")].every(line => box(line).width > 100);
  const root = doc.documentElement;
  told.textContent = [root.scrollWidth == root.clientWidth, inside, drawn, back].join(" ");
}}</script>"""

if CHROMIUM:

    @pytest.mark.parametrize(
        ("width", "scheme", "back"), [(390, 0, "rgb(26, 26, 25)"), (1200, 1, "rgb(252, 252, 251)")]
    )
    def test_the_page_fits_a_phone_and_a_desk_in_the_dark_and_by_day(tmp_path, width, scheme, back):
        (tmp_path / "page.html").write_text(page([STORY], [SHOWN]))
        (tmp_path / "watch.html").write_text(WATCHER.format(width))
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        colours = f"--blink-settings=preferredColorScheme={scheme}"
        place = (tmp_path / "watch.html").as_uri()
        done = subprocess.run(
            [CHROMIUM, *FLAGS, profile, colours, "--window-size=1400,1000", place],
            capture_output=True, text=True, timeout=60,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin"},
        )  # fmt: skip
        told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)[1]
        assert told == f"true true true {back}"
