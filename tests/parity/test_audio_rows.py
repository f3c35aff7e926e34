"""Audio of rows: features, counts, tokens and the first loss equal transformers'."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import reference as reference_module
import torch
from helpers import write_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from media import add_processor, picture, sound, wav
from reference import UNIFIED, add_tokenizer, build_reference, note
from test_exact import LOSS
from test_image_rows import THEIRS, asking, processed
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

import mlx_gemma4 as g4
from mlx_gemma4.media import audio
from mlx_gemma4.media.kinds import media_file
from mlx_gemma4.model.processor import AudioSettings, MediaSettings

pytestmark = pytest.mark.skipif(
    not hasattr(Gemma4Processor, "replace_audio_token"),
    reason="this transformers has an earlier processor, which counts tokens of audio another way",
)

NAMES = SimpleNamespace(boa_token="<|audio>", audio_token="<|audio|>", eoa_token="<audio|>")
COUNTS = [9000, 3500]


def counted(mask) -> int:
    """The tokens that transformers' processor puts into the text."""
    return Gemma4Processor.replace_audio_token(
        NAMES, {"input_features_mask": [np.array(mask)]}, 0
    ).count("<|audio|>")


@settings(deadline=None, max_examples=40)
@given(count=st.integers(161, 60_000), seed=st.integers(0, 99), loud=st.sampled_from([0, 1e-4, 3]))
@example(count=161, seed=0, loud=1)
@example(count=480_000, seed=1, loud=1)
@example(count=480_001, seed=1, loud=1)
@example(count=500_000, seed=2, loud=1)
def test_mel_features(tmp_path_factory, count, seed, loud):
    samples = sound(count, seed) * np.float32(loud)
    theirs = Gemma4AudioFeatureExtractor()([samples], return_tensors="np")
    path = tmp_path_factory.getbasetemp() / "a.wav"
    path.write_bytes(audio.as_file(samples))
    ours = MediaSettings(audio=AudioSettings(114))
    file = media_file("audio", str(path), ours)
    mask = theirs["input_features_mask"][0]
    assert file.num_tokens == counted(mask)
    frames, _ = audio.frames(file, ours.audio)
    assert len(frames) == mask.sum() and mask[: len(frames)].all()
    assert np.array_equal(frames, theirs["input_features"][0][mask])


@pytest.mark.skipif(not UNIFIED, reason="this transformers has no unified member")
@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 5000), size=st.sampled_from([16, 640]))
def test_samples_of_the_unified_member(tmp_path_factory, count, size):
    from transformers.models.gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

    samples = sound(count)
    theirs = Gemma4UnifiedAudioFeatureExtractor(feature_size=size, audio_samples_per_token=size)(
        [samples], return_tensors="np"
    )
    path = tmp_path_factory.getbasetemp() / "b.wav"
    path.write_bytes(audio.as_file(samples))
    own = AudioSettings(114, size)
    file = media_file("audio", str(path), MediaSettings(audio=own))
    assert np.array_equal(audio.frames(file, own)[0], theirs["input_features"][0])
    assert file.num_tokens == theirs["input_features_mask"].sum()


@pytest.fixture(scope="module", params=["e2b"] + ["unified"] * UNIFIED)
def hearing(request, tmp_path_factory):
    """A reference whose tokenizer knows letters, and rows with audio, one with an image too."""
    root = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "VOCAB", 420)
        reference = build_reference(request.param, root / request.param, encoders=True)
    add_tokenizer(reference.folder)
    add_processor(reference.folder, reference.shape == "unified")
    data = root / "data"
    data.mkdir()
    picture(100, 100).save(data / "0.png")
    counts = [n // 20 for n in COUNTS] if reference.shape == "unified" else COUNTS
    for i, count in enumerate(counts):
        (data / f"{i}.wav").write_bytes(wav(sound(count, i)))
    text = {"type": "text", "text": "aaa bbb?"}
    rows = [asking([{"type": "audio"}, text], "ccc ddd", []) | {"audios": ["0.wav"]}]
    both = [{"type": "image"}, {"type": "audio"}, text]
    rows += [asking(both, "eee fff ggg", ["0.png"]) | {"audios": ["1.wav"]}]
    return reference, write_rows(data, train=rows), rows


def heard(reference, data, row) -> dict:
    """transformers' ids and inputs of a row."""
    made = processed(reference, data, row)
    extractor = Gemma4AudioFeatureExtractor()
    if reference.shape == "unified":
        from transformers.models.gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

        extractor = Gemma4UnifiedAudioFeatureExtractor(feature_size=16, audio_samples_per_token=16)
    samples = [audio.samples(str(data / name), AudioSettings(114)) for name in row["audios"]]
    theirs = extractor(samples, return_tensors="np")
    mask = np.array(theirs["input_features_mask"])
    [count] = mask.sum(axis=1) if reference.shape == "unified" else [counted(mask[0])]
    place = made["ids"].tolist().index(114)
    run = [113, *[114] * int(count), 115]
    ids = np.concatenate([made["ids"][:place], run, made["ids"][place + 1 :]])
    features = np.array(theirs["input_features"])
    return made | {"ids": ids, "input_features": features, "input_features_mask": mask}


def test_tokens_and_the_first_loss_of_a_run(hearing):
    reference, data, rows = hearing
    gemma = g4.load(reference.folder, encoders=True)
    examples = g4.read(data, gemma)
    total = count = 0.0
    for row, ours in zip(rows, examples):
        made = heard(reference, data, row)
        assert ours.tokens.tolist() == made["ids"].tolist()
        ids = torch.tensor(made["ids"])[None]
        names = (*THEIRS, "input_features", "input_features_mask")
        media = {n: torch.tensor(made[n]) for n in names if made[n] is not None}
        types = (ids == 111).long() + 3 * (ids == 114).long()
        with torch.no_grad():
            logits = reference.model(
                input_ids=ids, mm_token_type_ids=types, use_cache=False, **media
            ).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        learned = torch.tensor(ours.mask[1:])
        total, count = total + float(losses[learned].sum()), count + int(learned.sum())
    config = g4.TrainConfig(iters=2, batch_size=2, report_every=1, rematerialize="none")
    run = g4.finetune(gemma, examples, config, lora=g4.LoraConfig(rank=2), console=False)
    first = next(report["loss"] for report in run.history if report["loss"] is not None)
    gap = abs(first / (total / count) - 1)
    note("loss of rows with audio", reference, gap, LOSS)
    assert gap < LOSS
