"""Answers to prompts with media: the tokens that a full pass would choose, one after the other."""

from __future__ import annotations

from importlib.util import find_spec

import mlx.core as mx
import numpy as np
import pytest
from media import add_processor, build_with_media, picture, sound, wav

import mlx_gemma4 as g4
from mlx_gemma4.generate import main
from mlx_gemma4.media.prompt import expanded_prompt
from mlx_gemma4.model.conversation import with_media
from mlx_gemma4.model.tokenizer import prompt_tokens

SHAPES = ["e2b", "moe"] + ["unified"] * bool(find_spec("mlx_vlm.models.gemma4_unified"))
NATIVE = bool(find_spec("mlx_vlm.models.gemma4_unified"))
QUESTION = "What is it?"


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, checkpoints, tmp_path_factory):
    """E2B with audio too; each prompt is longer than the window."""
    place = tmp_path_factory.mktemp("answers") / request.param
    made = build_with_media(checkpoints[request.param], place, request.param)
    return add_processor(made, request.param == "unified")


@pytest.fixture(scope="module")
def gemma(folder) -> g4.Gemma4:
    return g4.load(folder, encoders=True)


@pytest.fixture
def media(gemma, tmp_path) -> dict:
    picture(100, 100).save(tmp_path / "a.png")
    shown = {"images": [str(tmp_path / "a.png"), picture(110, 120, seed=1)]}
    if gemma.media.audio and gemma.backbone.get("embed_audio") is not None:
        count = 800 if gemma.plan.is_unified else 9000
        (tmp_path / "a.wav").write_bytes(wav(sound(count)))
        shown["audio"] = [str(tmp_path / "a.wav"), sound(count, seed=2)]
    return shown


def by_full_passes(gemma: g4.Gemma4, media: dict, count: int) -> list[int]:
    """The likeliest tokens, each from a pass over all that stands before it."""
    prompt = with_media(QUESTION, media.get("images", ()), media.get("audio", ()))
    parts = [(p["type"], p[p["type"]]) for p in prompt[0]["content"] if p["type"] != "text"]
    tokens = prompt_tokens(gemma.tokenizer, prompt)
    ids, inputs = expanded_prompt(tokens, parts, gemma.tokenizer, gemma.media)
    types, written = inputs.pop("mm_token_type_ids"), []
    assert len(ids) > 100
    for _ in range(count):
        row = mx.array([[*ids.tolist(), *written]])
        own = np.pad(types, ((0, 0), (0, len(written))))
        logits = gemma.logits(row, mm_token_type_ids=own, **inputs)
        written.append(int(mx.argmax(logits[0, -1])))
    return written


@pytest.mark.skipif(not NATIVE, reason="this mlx-vlm answers wrongly; the next test says so")
def test_the_tokens_of_full_passes(gemma, media):
    wanted = gemma.tokenizer.decode(by_full_passes(gemma, media, 6))
    told = []
    for piece in gemma.stream(QUESTION, **media, max_tokens=6):
        told.append(piece)
    said = "".join(told)
    assert said and (wanted.startswith(said) or said == wanted)
    assert said != gemma.generate(QUESTION, max_tokens=6)


def test_media_and_a_model_without_encoders(folder, media):
    with pytest.raises(g4.CapabilityError, match="a prompt with image"):
        g4.load(folder).generate(QUESTION, images=media["images"])


@pytest.mark.skipif(not NATIVE, reason="this mlx-vlm answers wrongly")
def test_text_is_answered_as_without_encoders(gemma, folder):
    wanted = g4.load(folder).generate(QUESTION, max_tokens=6)
    assert gemma.generate(QUESTION, max_tokens=6) == wanted


@pytest.mark.skipif(not NATIVE, reason="this mlx-vlm answers wrongly")
def test_the_command(gemma, folder, media, capsys):
    words = ["--model", str(folder), "--prompt", QUESTION, "--max-tokens", "4"]
    main([*words, "--image", media["images"][0]])
    wanted = gemma.generate(QUESTION, images=media["images"][:1], max_tokens=4)
    assert capsys.readouterr().out == wanted + "\n"


@pytest.mark.skipif(not NATIVE, reason="this mlx-vlm answers wrongly")
def test_files_that_are_not_there(gemma):
    for asked in ({"images": ["b.png"]}, {"images": [b"no image"]}):
        with pytest.raises(g4.ConfigError, match="image"):
            gemma.generate(QUESTION, **asked)
