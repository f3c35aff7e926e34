"""Loss and accuracy by example, answers and their judge, and base beside adapter."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers import CHAT, make_lora_nonzero, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.config import DataConfig
from mlx_gemma4.data.example import Example
from mlx_gemma4.eval import __main__ as command
from mlx_gemma4.eval.answers import exact_match
from mlx_gemma4.eval.scores import Measure
from mlx_gemma4.train.evaluate import evaluate as mean_loss
from mlx_gemma4.train.run import story_of

CHATS = [*CHAT, CHAT[0], {"prompt": "Read a line.", "completion": "It yields values."}] * 3


@pytest.fixture
def data(gemma) -> g4.Dataset:
    return g4.read(CHATS, gemma)


@pytest.mark.parametrize("shape", ["e2b", "moe"])
def test_figures_of_examples_are_those_of_their_whole_logits(checkpoints, shape, monkeypatch):
    monkeypatch.setattr("mlx_gemma4.nn.budgets.Budgets.chunk", lambda *_: 64)
    gemma = g4.load(checkpoints[shape])
    data = g4.read(CHATS, gemma)
    likeliest = int(gemma.logits(mx.array(data[0].tokens[None, :9]))[0, -1].argmax())
    said = Example(np.append(data[0].tokens[:9], likeliest), np.arange(10) == 9, "its own word")
    data.train = [*data.train, said]
    found = g4.evaluate(gemma, data.train, max_seq_length=96, batch_size=20)
    loss, accuracy = found.measures["loss"], found.measures["accuracy"]
    for i in (0, 1, 3, 10, 12):
        example = data[i]
        logits_TV = gemma.logits(mx.array(example.tokens[None, :-1]))[0]
        log_probs_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
        T, targets = np.arange(len(example) - 1), example.tokens[1:]
        kept = example.mask[1:]
        assert loss.counts_N[i] == accuracy.counts_N[i] == kept.sum()
        expected = -np.array(log_probs_TV)[T, targets][kept].sum()
        assert loss.sums_N[i] == pytest.approx(expected, rel=1e-5)
        assert accuracy.sums_N[i] == (np.array(logits_TV.argmax(-1)) == targets)[kept].sum()
    assert accuracy.sums_N[12] == 1 and g4.evaluate(gemma, [said]).accuracy == 1
    assert found.loss == pytest.approx(mean_loss(gemma, data.train), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(found.loss))
    assert list(found.figures()) == ["loss", "perplexity", "accuracy"]


def test_the_interval_is_that_of_pairs():
    """As wide as the difference's own standard error says, however much examples differ."""
    random = np.random.default_rng(1)
    counts_N = random.integers(5, 15, 400).astype(float)
    hard_N = random.normal(3, 2, 400) * counts_N
    gap_N = random.normal(0.1, 0.4, 400) * counts_N
    one, other = Measure(hard_N + gap_N, counts_N), Measure(hard_N, counts_N)
    difference, low, high = one.minus(other)
    assert difference == pytest.approx(gap_N.sum() / counts_N.sum())
    error = np.sqrt(((gap_N - difference * counts_N) ** 2).sum()) / counts_N.sum()
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert low < difference < high
    assert one.minus(one) == (0, 0, 0) and one.minus(other) == one.minus(other)


def test_others_examples_are_no_pairs(gemma, data):
    some, judged = (g4.evaluate(gemma, data[:2], answers=n, max_tokens=1) for n in (0, 1))
    for one, other in [(some, g4.evaluate(gemma, data[:3])), (judged, some)]:
        with pytest.raises(g4.DataError, match="other examples"):
            one.against(other)
    assert some.against(judged).keys() == {"loss", "accuracy"}
    with pytest.raises(g4.DataError, match="no examples"):
        g4.evaluate(gemma, [])


def test_a_judge_reads_prompt_answer_and_reference(gemma, data):
    asked = []

    def length(prompt: str, answer: str, reference: str) -> float:
        asked.append((prompt, answer, reference))
        return len(asked)

    found = g4.evaluate(gemma, data.train, answers=4, judge=length, max_tokens=5)
    assert found.figures()["length"] == 2.5
    assert [said.score for said in found.answers] == [1, 2, 3, 4]
    prompt, answer, reference = asked[0]
    assert prompt.endswith("What is a list?<turn|>\n<|turn>model\n")
    assert reference == "A list holds values."
    assert answer == gemma.generate("What is a list?", max_tokens=5)
    assert asked[1][0].count("<|turn>model") == 2 and asked[1][2] == "Return the line."
    assert asked[3][2] == "It yields values."
    texts = g4.read([{"text": "no prompt"}], gemma, DataConfig(train_on="all"))
    with pytest.raises(g4.DataError, match="no example has a prompt"):
        g4.evaluate(gemma, texts.train, answers=1)


def test_exact_match_leaves_thoughts_aside():
    thought = "<|channel>thought\nTwo and two.\n<channel|>4"
    assert exact_match("2 + 2?", thought, " 4\n") == 1
    assert exact_match("2 + 2?", "4.", "4") == exact_match("", thought, "5") == 0


def test_base_and_adapter_side_by_side_in_the_folder_of_the_run(tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows", train=CHAT, valid=CHATS)
    gemma = g4.load(tiny)
    base = g4.evaluate(gemma, g4.read(rows, gemma, DataConfig(train_on="last")).valid)
    config = g4.TrainConfig(iters=2, learning_rate=1e-2)
    data = g4.read(rows, gemma, DataConfig(train_on="last"))
    run = g4.finetune(gemma, data, config, output=tmp_path / "run", console=False)
    adapted = g4.evaluate(run.gemma, data.valid)

    command.main(["--adapter", str(run.output), "--answers", "1", "--max-tokens", "3"])
    told = json.loads((run.output / "evaluation.json").read_text())
    for found, expected in zip(told["figures"], (base, adapted)):
        for name, value in expected.figures().items():
            assert found[name] == pytest.approx(value, rel=1e-5), name
    difference, low, high = told["differences"]["loss"]
    assert low <= difference <= high < 0
    assert told["data"].startswith("valid of ")
    printed = capsys.readouterr().out
    page = (run.output / "report.html").read_text()
    assert f"{difference:+.4g} ({low:+.4g} to {high:+.4g})" in printed and "exact_match" in printed
    for text in ("Evaluation", f"{difference:+.4g}", "reference", "Return the line.", "valid[0]"):
        assert text in page, text

    assert story_of(run.output).evaluation == told
    (run.output / "evaluation.json").write_text('{"figures": [[]]}')
    assert story_of(run.output).evaluation is None


def test_an_adapter_meets_a_plain_model(gemma, tmp_path):
    gemma.add_lora()
    make_lora_nonzero(gemma)
    with pytest.raises(g4.AdapterError, match="LoRA layers already"):
        gemma.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "neither --data nor --tasks"),
        (["--data", "rows.jsonl"], "no model is given"),
        (["MODEL", "--data", "ROWS", "--split", "test"], "has no test"),
        (["MODEL", "--tasks", "one"], "lm_eval is not installed"),
    ],
)
def test_what_is_missing_is_told(words, told, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    rows = write_rows(tmp_path, train=CHAT)
    places = {"MODEL": str(tiny), "ROWS": str(rows)}
    with pytest.raises(g4.ConfigError, match=told) as error:
        command.main([places.get(word, word) for word in words])
    if "lm_eval" in told:
        assert error.value.do == 'pip install "mlx-gemma4[eval]"'
