"""Answers: through the chat template, to the end of the turn, the same each time."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from helpers import make_lora_nonzero, write_rows

import mlx_gemma4 as g4
from mlx_gemma4.generate import main
from mlx_gemma4.lora.state import save_adapter

SYSTEM, QUESTION, ANSWER, SHORT_ANSWER = "Be short.", "A list?", "It holds values.", "Values."
ROWS = [
    {"prompt": QUESTION, "completion": ANSWER},
    {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": SHORT_ANSWER},
        ]
    },
]


@pytest.fixture(scope="module")
def knowing(tiny, tmp_path_factory) -> tuple[g4.Gemma4, str]:
    """A model that has learned two conversations by heart, and its adapter."""
    folder = tmp_path_factory.mktemp("knowing")
    gemma = g4.load(tiny)
    data = g4.read(write_rows(folder / "rows", train=ROWS), gemma)
    config = g4.TrainConfig(
        fine_tune_type="full", iters=20, batch_size=2, learning_rate=1e-2, report_every=20
    )
    run = g4.finetune(gemma, data, config, output=folder / "out", callbacks=[])
    return gemma, run.summary["adapter"]


@pytest.fixture
def adapter(tiny, tmp_path) -> str:
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=2))
    make_lora_nonzero(gemma, size=0.3)
    save_adapter(gemma.backbone, tmp_path / "adapter", gemma.lora, gemma.name)
    return str(tmp_path / "adapter")


def test_what_was_learned_is_answered_and_the_answer_ends_with_its_turn(knowing):
    gemma, _ = knowing
    assert gemma.generate(QUESTION, max_tokens=60) == ANSWER


def test_without_the_end_of_turn_the_answer_would_go_on(knowing):
    gemma, _ = knowing
    endless = dataclasses.replace(gemma, end_tokens=frozenset({gemma.tokenizer.eos_token_id}))
    answer = endless.generate(QUESTION, max_tokens=60)
    assert answer.startswith(ANSWER + "<turn|>")
    assert len(answer) > len(ANSWER + "<turn|>")


def test_the_end_of_turn_ends_an_answer_whatever_the_checkpoint_names(tiny, tmp_path):
    assert g4.load(tiny).end_tokens == {1, 50, 106}
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 48]}')
    assert g4.load(folder).end_tokens == {1, 48, 50, 106}


def test_the_system_turn_reaches_the_model(knowing):
    gemma, _ = knowing
    assert gemma.generate(QUESTION, system=SYSTEM, max_tokens=60) == SHORT_ANSWER


def test_max_tokens_ends_an_answer(gemma):
    pieces = list(gemma.stream("Hi", max_tokens=5))
    assert 1 <= len(pieces) <= 6
    longer = gemma.generate("Hi", max_tokens=10)
    assert longer.startswith("".join(pieces)[:4])
    assert len(longer) > len("".join(pieces))


def test_the_pieces_are_the_answer(knowing):
    gemma, _ = knowing
    pieces = list(gemma.stream(QUESTION, max_tokens=60))
    assert len(pieces) > 1
    assert "".join(pieces) == ANSWER


def test_the_likeliest_answer_is_the_same_each_time(gemma):
    first = gemma.generate("Hi", max_tokens=12, seed=1)
    assert first
    assert gemma.generate("Hi", max_tokens=12, seed=2) == first


def test_a_sampled_answer_depends_on_its_seed_alone(gemma):
    options = {"max_tokens": 12, "temperature": 1.0}
    answers = [gemma.generate("Hi", seed=seed, **options) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_top_p_near_zero_is_the_likeliest_answer(gemma):
    likeliest = gemma.generate("Hi", max_tokens=12)
    assert gemma.generate("Hi", max_tokens=12, temperature=1.0, top_p=1e-6) == likeliest


def test_dropout_is_off_in_answers(tiny):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(dropout=0.5))
    make_lora_nonzero(gemma)
    gemma.backbone.train()
    assert gemma.generate("Hi", max_tokens=8) == gemma.generate("Hi", max_tokens=8, seed=5)


def test_an_adapter_changes_the_answer(tiny, gemma, adapter):
    plain = gemma.generate("Hi", max_tokens=12)
    assert g4.load(tiny, adapter=adapter).generate("Hi", max_tokens=12) != plain


def test_no_chat_template_is_an_error_that_names_the_file(gemma):
    gemma.tokenizer.chat_template = None
    with pytest.raises(g4.ModelError) as error:
        gemma.generate("Hi")
    assert error.value.found == "the tokenizer has no chat template"
    assert "chat_template.jinja" in error.value.wanted
    assert "instruction-tuned" in error.value.do


def test_the_command_answers_with_the_adapter(tiny, knowing, capsys):
    _, adapter = knowing
    main(["--model", str(tiny), "--adapter", adapter, "--prompt", QUESTION, "--max-tokens", "60"])
    assert capsys.readouterr().out == ANSWER + "\n"


def test_the_command_hands_its_options_on(tiny, gemma, capsys):
    options = "--max-tokens 6 --temperature 1 --top-p 0.9 --seed 3 --system Short."
    main(["--model", str(tiny), "--prompt", "Hi", *options.split()])
    wanted = gemma.generate("Hi", max_tokens=6, temperature=1.0, top_p=0.9, seed=3, system="Short.")
    assert capsys.readouterr().out == wanted + "\n"


@pytest.mark.parametrize("missing", ["--model", "--prompt"])
def test_the_command_says_what_it_needs(missing):
    given = {"--model": "m", "--prompt": "p"}
    del given[missing]
    with pytest.raises(g4.ConfigError) as error:
        main([word for pair in given.items() for word in pair])
    assert error.value.found == f"{missing} is not given"
