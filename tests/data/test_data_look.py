"""Looking at data: the figures, examples as text and HTML, and the command that shows them."""

from __future__ import annotations

import html
import json
import re
import shutil

import numpy as np
import pytest
from helpers import CHAT, write_rows

from mlx_gemma4.config import DataConfig
from mlx_gemma4.data import __main__ as command
from mlx_gemma4.data.batch.collate import collate
from mlx_gemma4.data.batch.order import BatchOrder
from mlx_gemma4.data.dataset import Dataset, read
from mlx_gemma4.data.example import Example
from mlx_gemma4.data.inspect import Shown
from mlx_gemma4.errors import DataError, run_command
from mlx_gemma4.model.tokenizer import text_side

NASTY = "</div><script>alert('&')</script> \x1b[31mred\x07 ⟦é🙂"


@pytest.fixture(scope="session")
def side(checkpoints):
    return text_side(checkpoints["e2b"])


@pytest.fixture
def data(tmp_path, side) -> Dataset:
    rows = [*CHAT, CHAT[0], {"prompt": "Hi", "completion": NASTY}, {"text": "a line " * 300}]
    folder = write_rows(tmp_path / "rows", train=[*rows, "broken"], valid=[CHAT[0], CHAT[0]])
    return read(folder, side, DataConfig(max_seq_length=200, on_bad_row="skip"))


def test_the_figures(data, tmp_path):
    figures = data.stats()
    train = figures["splits"]["train"]
    assert figures == json.loads(json.dumps(figures))
    assert figures["shapes"] == {"chat": 5, "completions": 1, "text": 1}
    assert (figures["rows"], figures["overlong_skipped"], figures["bad"]) == (8, 1, 1)
    assert f"{tmp_path / 'rows' / 'train.jsonl'}:6: is not JSON" in figures["bad_rows"][0]
    assert train["examples"] == len(data) == 4
    assert train["tokens"] == sum(map(len, data))
    assert train["targets"] == sum(example.num_targets for example in data)
    assert train["target_share"] == train["targets"] / train["tokens"]
    assert train["longest"] == max(map(len, data))
    assert train["longest_at"] == max(data, key=len).origin
    assert sum(bin_["examples"] for bin_ in train["histogram"]) == 4
    assert train["histogram"][-1]["up_to"] == train["longest"]


def test_duplicates_within_and_across_splits(data):
    figures = data.stats()
    duplicates = {name: split["duplicates"] for name, split in figures["splits"].items()}
    assert duplicates == {"train": 1, "valid": 1}
    assert figures["across_splits"] == {"train and valid": 1}


@pytest.mark.parametrize("packing", [True, False])
def test_padding_and_steps_are_those_of_the_first_epoch(data, packing):
    lengths = [len(example) - 1 for example in data]
    batches = BatchOrder.of(data.train, data.config.max_seq_length, 3, packing).epoch(0)
    made = [collate([[data[i] for i in row] for row in rows]) for rows in batches]
    epoch = data.stats(batch_size=3, packing=packing)["epoch"]
    assert epoch["batches"] == len(batches)
    assert epoch["padding"] == 1 - sum(lengths) / sum(batch.tokens_BT.size for batch in made)


def test_an_example_as_text(data):
    shown = data.show(1)
    head, text = shown.text().split("\n", 1)
    assert head == (
        f"train[1] {data[1].origin}, {len(data[1])} tokens, {data[1].num_targets} targets"
    )
    assert re.findall("⟦(.*?)⟧", text, re.DOTALL) == [
        "The file is open.<turn|>",
        "Return the line.<turn|>",
    ]
    assert text.startswith("<bos><|turn>system\nBe short.<turn|>\n<|turn>user\n")
    whole = data.tokenizer.decode(data[1].tokens.tolist())
    assert text.replace("⟦", "").replace("⟧", "") == whole


def test_colour_adds_nothing_but_colour(data):
    shown = data.show(1)
    assert "\x1b[" in shown.text(colour=True)
    assert re.sub(r"\x1b\[\d+m", "", shown.text(colour=True)) == shown.text()


def test_a_terminal_is_not_told_what_to_do(data):
    text = data.show(3).text()
    assert "\x1b" not in text and "\x07" not in text
    assert "␛[31mred␇" in text


def test_html_is_escaped(data):
    fragment = data.show(3)._repr_html_()
    assert "<script" not in fragment
    assert html.escape("</div><script>alert('&')</script> ␛[31mred␇ ⟦é🙂") in fragment
    assert re.search(r'<span class="target special">&lt;turn\|&gt;</span>', fragment)


def test_bytes_of_one_character_on_both_sides_of_a_cut_show_something(side):
    tokens = np.array(side.tokenizer("é", add_special_tokens=False)["input_ids"], np.int32)
    mask = np.arange(len(tokens)) % 2 == 1
    assert Shown.of(Example(tokens, mask, "here"), side.tokenizer, "one").text()


def test_examples_without_a_tokenizer_cannot_be_shown():
    with pytest.raises(DataError, match="without a tokenizer"):
        Dataset("nothing", DataConfig(), [Example(np.arange(3), np.ones(3, bool), "a")]).show(0)


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(tiny, data, capsys):
    """Runs the command on the same rows; gives what it printed."""

    def run(*flags) -> str:
        own = ["--model", tiny, "--data", data.source, "--max-seq-length", "200"]
        command.main([*map(str, own), "--on-bad-row", "skip", *map(str, flags)])
        return capsys.readouterr().out

    return run


def test_the_command_tells_what_a_person_wants_to_know(run, data):
    told = run("--show", 2)
    for words in (
        f"{data.source}: 5 chat, 1 completions, 1 text rows (jsonl); trained on: assistant",
        "train: 4 examples",
        "1 over 200 tokens skipped",
        "1 that cannot be used skipped",
        "train.jsonl:6: is not JSON",
        f"longest {max(map(len, data))} at {max(data, key=len).origin}",
        "duplicates: 1 in train, 1 in valid",
        "in both train and valid: 1  <- evaluated on what is trained on",
        "an epoch: 2 steps of 1 packed rows",
        "█",
        str(data.show(0)),
        str(data.show(1)),
    ):
        assert words in told
    assert "train[2]" not in told


def test_json(run, data):
    assert json.loads(run("--json", "--batch-size", 2)) == data.stats(batch_size=2)


def test_a_page_that_stands_alone(run, tmp_path, data):
    run("--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.search("<(img|link|iframe|a|object)|@import|https?:|url[(]", page)
    assert page.count('<div class="g4">') == 6
    for index in range(4):
        assert data.show(index).html() in page


def test_no_weights_are_needed(tiny, rows, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    command.main(["--model", str(tmp_path / "model"), "--data", str(rows)])
    assert "5 chat rows" in capsys.readouterr().out


def test_the_settings_of_a_run_from_its_file(tiny, rows, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny}\ndata: {rows}\ntrain_on: last\nbatch_size: 1\niters: 3\n")
    command.main(["--config", str(path)])
    told = capsys.readouterr().out
    assert "trained on: last" in told
    assert "an epoch: 1 steps of 1 packed rows" in told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "rows"], "--model is None"),
        (["--model", "m"], "--data is None"),
        (["--html", "/no/such/folder/page.html"], "cannot write /no/such/folder/page.html"),
    ],
)
def test_flags_that_do_not_do(tiny, rows, capsys, flags, words):
    if "--html" in flags:
        flags = ["--model", str(tiny), "--data", str(rows), *flags]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command.main(flags))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    told = capsys.readouterr().out
    for flag in ("--show", "--html", "--json", "--valid-fraction", "--on-bad-row"):
        assert flag in told
