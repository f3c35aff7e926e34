"""Tasks of lm-evaluation-harness: its three questions, against mlx-lm's own model for it."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from helpers import make_lora_nonzero
from lm_eval.api.instance import Instance
from mlx_lm.evaluate import MLXLM

import mlx_gemma4 as g4
from mlx_gemma4.eval.tasks import _language_model, require_tasks, run_tasks

QUESTIONS = ["What is a list?", "Open the file, read a line"]
ANSWERS = [" A list holds values.", " It yields values, one at a time.", " file"]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, words, i) for i, words in enumerate(arguments)]


def test_likelihoods_are_those_of_mlx_lms_model(others):
    path = others["e2b"]
    ours = _language_model(g4.load(path), batch_size=2)
    theirs = MLXLM(str(path), use_chat_template=False)
    asked = requests("loglikelihood", *((q, a) for q in QUESTIONS for a in ANSWERS))
    for (p, top), (expected, their_top) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked)
    ):
        assert p == pytest.approx(expected, rel=1e-4) and top == bool(their_top)


def test_a_whole_text_is_scored_after_the_first_token(gemma):
    ours = _language_model(gemma, batch_size=2)
    found = ours.loglikelihood_rolling(
        requests("loglikelihood_rolling", *((q,) for q in QUESTIONS))
    )
    for question, log_prob in zip(QUESTIONS, found):
        tokens = gemma.tokenizer.encode(question, add_special_tokens=False)
        logits_TV = gemma.logits(mx.array([[gemma.tokenizer.bos_token_id, *tokens[:-1]]]))[0]
        log_probs_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
        expected = log_probs_TV[mx.arange(len(tokens)), mx.array(tokens)].sum()
        assert log_prob == pytest.approx(expected.item(), rel=1e-5)


def test_a_local_task_hears_the_adapter(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    gemma = g4.load(tiny)
    plain = [gemma.generate(question, max_tokens=4) for question in QUESTIONS]
    rows = [
        {"question": question, "options": ANSWERS, "answer": i, "said": said.strip()}
        for i, (question, said) in enumerate(zip(QUESTIONS, plain))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    place = {"dataset_path": "json", "test_split": "test"}
    place["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "rows.json")}}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **place, **task}))
    names = [str(tmp_path / f"{name}.yaml") for name in TASKS]
    require_tasks(names)
    with pytest.raises(g4.ConfigError, match="there is no task nothing_like_it"):
        require_tasks(["nothing_like_it"])

    before = run_tasks(gemma, names)
    assert before["say"]["exact_match"][0] == 1 and before["choose"].keys() == {"acc"}
    assert run_tasks(gemma, names, limit=1)["say"]["exact_match"] == (1, None)
    gemma.add_lora()
    make_lora_nonzero(gemma, size=1.0)
    after = [gemma.generate(question, max_tokens=4) for question in QUESTIONS]
    same = sum(one.strip() == other.strip() for one, other in zip(plain, after))
    assert same < 2
    assert run_tasks(gemma, names)["say"]["exact_match"][0] == same / 2
