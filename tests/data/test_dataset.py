"""`read`: rows to a dataset, with everything that was left out counted and told."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from helpers import CHAT, write_rows

import mlx_gemma4 as g4

SHORT = {"text": "Open."}
LONG = {"text": "Open the file, read a line, and close it again. " * 4}


def read(tmp_path, gemma, config=g4.DataConfig(), **splits) -> g4.Dataset:
    return g4.read(write_rows(tmp_path / "data", **splits), gemma, config)


def refused(tmp_path, gemma, config=g4.DataConfig(), **splits) -> g4.DataError:
    with pytest.raises(g4.DataError) as error:
        read(tmp_path, gemma, config, **splits)
    return error.value


def test_a_folder_gives_examples_by_split(rows, gemma):
    data = g4.read(rows, gemma)
    assert (len(data.train), len(data.valid), len(data.test)) == (2, 2, 1)
    assert [example.origin for example in data.train] == [
        f"{rows / 'train.jsonl'}:1",
        f"{rows / 'train.jsonl'}:2",
    ]


def test_a_file_is_the_training_split(rows, gemma):
    data = g4.read(str(rows / "test.jsonl"), gemma)
    assert (len(data.train), len(data.valid), len(data.test)) == (1, 0, 0)


def test_length_items_and_iteration_are_those_of_train(rows, gemma):
    data = g4.read(rows, gemma)
    assert len(data) == 2
    assert data[1].origin == data.train[1].origin
    assert [e.origin for e in data[:1]] == [data.train[0].origin]
    assert [e.origin for e in data] == [e.origin for e in data.train]


def test_the_repr_tells_what_was_found(tmp_path, gemma):
    data = read(tmp_path, gemma, train=[*CHAT, SHORT], valid=CHAT[:1])
    tokens = sum(map(len, data.train))
    targets = sum(example.num_targets for example in data.train)
    first, train, valid = repr(data).split("\n")
    assert first == f"{tmp_path / 'data'}: 3 chat, 1 text rows (jsonl); trained on: assistant"
    assert (
        train.split()
        == (
            f"train: 3 examples, {tokens} tokens, {targets} targets ({targets / tokens:.0%}), "
            f"longest {max(map(len, data.train))}"
        ).split()
    )
    assert valid.split()[:3] == ["valid:", "1", "examples,"]


def test_the_tokens_that_are_learned_follow_the_config(tmp_path, gemma):
    counts = {
        train_on: read(tmp_path, gemma, g4.DataConfig(train_on=train_on), train=CHAT[1:])[
            0
        ].num_targets
        for train_on in ("last", "assistant", "all")
    }
    assert 0 < counts["last"] < counts["assistant"] < counts["all"]


def test_an_overlong_example_is_refused_by_line_with_what_to_do(tmp_path, gemma):
    error = refused(
        tmp_path, gemma, g4.DataConfig(max_seq_length=20, overlong="error"), train=[SHORT, LONG]
    )
    assert "train.jsonl:2: has " in error.found
    assert error.wanted == "at most max_seq_length, 20"
    assert error.do == "raise max_seq_length, or set overlong to skip or truncate"


def test_overlong_examples_are_skipped_and_counted(tmp_path, gemma):
    config = g4.DataConfig(max_seq_length=20, overlong="skip")
    data = read(tmp_path, gemma, config, train=[LONG, SHORT, LONG])
    assert [example.origin[-2:] for example in data.train] == [":2"]
    assert data.facts.skipped == 2
    assert repr(data).endswith("2 over 20 tokens skipped")


def test_overlong_examples_are_truncated_and_counted(tmp_path, gemma):
    config = g4.DataConfig(max_seq_length=20, overlong="truncate")
    data = read(tmp_path, gemma, config, train=[LONG, SHORT])
    whole = read(tmp_path, gemma, train=[LONG])[0]
    assert data[0].tokens.tolist() == whole.tokens[:20].tolist()
    assert len(data[0].mask) == 20
    assert data.facts.truncated == 1
    assert repr(data).endswith("1 over 20 tokens truncated")


def test_an_example_at_the_limit_is_whole(tmp_path, gemma):
    length = len(read(tmp_path, gemma, train=[LONG])[0])
    data = read(tmp_path, gemma, g4.DataConfig(max_seq_length=length), train=[LONG])
    assert (len(data[0]), data.facts.skipped, data.facts.truncated) == (length, 0, 0)


def test_a_cut_that_leaves_no_target_drops_the_example_and_says_so(tmp_path, gemma):
    question = {"prompt": LONG["text"], "completion": "Yes."}
    config = g4.DataConfig(max_seq_length=20, overlong="truncate")
    data = read(tmp_path, gemma, config, train=[question, LONG, SHORT])
    assert [example.origin[-2:] for example in data.train] == [":2", ":3"]
    assert "1 over 20 tokens truncated" in repr(data)
    assert re.search(r"\b1\b.*(skipped|dropped|left out)", repr(data))


def test_skipping_all_examples_is_an_error_with_their_number(tmp_path, gemma):
    config = g4.DataConfig(max_seq_length=20, overlong="skip")
    error = refused(tmp_path, gemma, config, train=[LONG, LONG])
    assert "train.jsonl holds no example (2 were too long, 0 cannot be used)" in error.found
    assert "raise max_seq_length" in error.do


@pytest.mark.parametrize("lines", [[], ["", "   "]])
def test_an_empty_file_is_an_error(tmp_path, gemma, lines):
    error = refused(tmp_path, gemma, train=lines)
    assert error.found == f"{tmp_path / 'data' / 'train.jsonl'} holds no example"
    assert (error.wanted, error.do) == ("at least one row", "fill the file")


def test_an_empty_split_is_not_blamed_on_long_rows_of_another(tmp_path, gemma):
    config = g4.DataConfig(max_seq_length=20, overlong="skip")
    error = refused(tmp_path, gemma, config, train=[LONG, SHORT], valid=[])
    assert error.found == f"{tmp_path / 'data' / 'valid.jsonl'} holds no example"
    assert error.do == "fill the file"


def test_max_seq_length_above_the_models_positions_is_an_error(tmp_path, gemma):
    limit = gemma.plan.max_positions
    error = refused(tmp_path, gemma, g4.DataConfig(max_seq_length=limit + 1), train=[SHORT])
    assert error.found == f"max_seq_length is {limit + 1}"
    assert error.wanted == f"at most {limit}, the model's max_position_embeddings"
    read(tmp_path, gemma, g4.DataConfig(max_seq_length=limit), train=[SHORT])


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path, gemma):
    highest = int(np.max(read(tmp_path, gemma, train=[SHORT, LONG])[1].tokens))
    smaller = dataclasses.replace(gemma.plan, vocab_size=highest)
    loaded = dataclasses.replace(gemma.loaded, plan=smaller)
    error = refused(tmp_path, dataclasses.replace(gemma, loaded=loaded), train=[SHORT, LONG])
    assert f"train.jsonl:2: has the token id {highest}" in error.found
    assert error.wanted == f"ids below {highest}, the model's vocabulary"
    assert error.do == "use the tokenizer of the checkpoint"


def test_the_first_bad_row_of_any_split_is_an_error(tmp_path, gemma):
    error = refused(tmp_path, gemma, train=[SHORT], test=[SHORT, {"txt": "a"}])
    assert "test.jsonl:2: has the keys txt" in error.found


def test_a_row_without_an_answer_is_an_error_by_line(tmp_path, gemma):
    error = refused(tmp_path, gemma, train=[SHORT, {"messages": CHAT[0]["messages"][:1]}])
    assert "train.jsonl:2: has no target token" in error.found


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "half \\ud83d a pair"}',
        '{"prompt": "half \\ud83d a pair", "completion": "Yes."}',
    ],
)
def test_text_that_no_tokenizer_takes_is_an_error_by_line(tmp_path, gemma, row):
    """JSON may hold half of a surrogate pair."""
    assert "train.jsonl:2" in refused(tmp_path, gemma, train=[SHORT, row]).found
