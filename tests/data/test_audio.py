"""Audio of rows: where it may come from, its tokens, what is cut, batches."""

from __future__ import annotations

import base64
import io
import struct
from importlib.util import find_spec

import numpy as np
import pytest
from helpers import write_rows
from media import add_processor, picture, sound, wav

import mlx_gemma4 as g4
from mlx_gemma4.data.batch.collate import collate_alike
from mlx_gemma4.media import audio
from mlx_gemma4.media.kinds import media_file
from mlx_gemma4.model.processor import AudioSettings, MediaSettings
from mlx_gemma4.model.tokenizer import text_side

OPENER, AUDIO, CLOSER = 113, 114, 115
ASKED, ANSWER = "What is it?", {"role": "assistant", "content": "A list of values."}
MEL = AudioSettings(AUDIO)
SOUND = sound(16000)
TOKENS = 25


@pytest.fixture(scope="module")
def side(checkpoints, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("hears") / "e2b"
    shutil.copytree(checkpoints["e2b"], folder)
    return text_side(add_processor(folder))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.wav").write_bytes(wav(SOUND))
    picture(100, 100).save(data / "a.png")
    return data


def asks(*content, **fields) -> dict:
    content = content[0] if isinstance(content[0], str) else list(content)
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


TEXT = {"type": "text", "text": ASKED}
BASE64 = base64.b64encode(wav(SOUND)).decode()
IN_ROWS = {
    "input_audio": asks({"type": "input_audio", "input_audio": {"data": BASE64}}, TEXT),
    "audio": asks({"type": "audio", "audio": "a.wav"}, TEXT),
    "audio_url": asks({"type": "audio_url", "audio_url": {"url": "a.wav"}}, TEXT),
    "data": asks({"type": "audio", "audio": "data:audio/wav;base64," + BASE64}, TEXT),
    "column": asks(ASKED, audios=["a.wav"]),
    "one": asks(ASKED, audio="a.wav"),
    "placeholder": asks({"type": "audio"}, TEXT, audios=["a.wav"]),
    "mark": asks(f"<audio>{ASKED}", audio="a.wav"),
}  # fmt: skip
IN_MEMORY = {
    "bytes": asks(ASKED, audio={"bytes": wav(SOUND), "path": None}),
    "array": asks({"type": "audio", "audio": {"array": SOUND, "sampling_rate": 16000}}, TEXT),
    "numpy": asks(ASKED, audios=[SOUND]),
}


@pytest.mark.parametrize("name", IN_ROWS | IN_MEMORY)
def test_rows_with_audio(name, folder, side):
    row = (IN_ROWS | IN_MEMORY)[name]
    given = [row] if name in IN_MEMORY else write_rows(folder, train=[row])
    [example] = g4.read(given, side, g4.DataConfig(train_on="all"))
    [file] = example.media
    run = "<|audio>" + "<|audio|>" * TOKENS + "<audio|>"
    said = side.tokenizer.decode(example.tokens)
    assert said.startswith(f"<bos><|turn>user\n{run}{ASKED}<turn|>")
    assert (file.kind, file.num_tokens) == ("audio", TOKENS)
    assert not example.mask[np.isin(example.tokens, [OPENER, AUDIO, CLOSER])].any()
    frames, mask = audio.frames(file, MEL)
    assert frames.shape == (99, 128) and mask.all()
    assert np.abs(frames - audio.mel_features(SOUND)).max() < 0.2  # 16 bits are coarse


def test_images_and_audio_in_one_batch(folder, side):
    """Each kind in the order of its tokens, images first where they have no place of their own."""
    (folder / "b.wav").write_bytes(wav(sound(5000, seed=1)))
    rows = [asks(ASKED, image="a.png", audios=["a.wav", "b.wav"]), asks("Hi"), IN_ROWS["one"]]
    media = side.media
    first, hello, one = g4.read(write_rows(folder, train=rows), side)
    assert [file.kind for file in first.media] == ["image", "audio", "audio"]
    packed, plain, alone = collate_alike([[[first, one]], [hello], [one]], media=media)
    assert plain.media is None
    features, mask = packed.media.input_features, np.array(packed.media.input_features_mask)
    assert features.shape == alone.media.input_features.shape and alone.media.pixel_values is None
    assert mask.sum(axis=1).tolist() == [99, 31, 99][: len(mask)] + [0] * (len(mask) - 3)
    assert np.array_equal(np.array(features[0]), np.array(features[2]))
    assert np.array_equal(np.array(features[0]), np.array(alone.media.input_features[0]))
    tokens = np.array(packed.tokens_BT)
    assert (np.array(packed.images_BT) >= 0).sum() == (tokens == 111).sum() > 0
    assert (tokens == AUDIO).sum() == TOKENS + 8 + TOKENS
    assert alone.images_BT is None


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files(bits, channels):
    both = np.stack([SOUND, -0.5 * SOUND], axis=1)
    read = audio.samples(wav(SOUND if channels == 1 else both, bits=bits), MEL)
    wanted = SOUND if channels == 1 else both.mean(axis=1)
    assert read.dtype == np.float32 and len(read) == len(SOUND)
    assert np.abs(read - wanted).max() <= 1.6 / 2 ** (bits - 1) + 1e-6


def test_a_wav_of_floats_and_one_without_its_length():
    content = bytearray(audio.as_file(SOUND))
    assert np.array_equal(audio.samples(bytes(content), MEL), SOUND)
    at = content.index(b"data") + 4
    content[at : at + 4] = b"\xff" * 4
    assert np.array_equal(audio.samples(bytes(content), MEL), SOUND)
    junk = content.index(b"fmt ")
    more = content[:junk] + b"LIST" + struct.pack("<I", 3) + b"abc\0" + content[junk:]
    assert np.array_equal(audio.samples(bytes(more), MEL), SOUND)


def test_what_is_over_30_seconds_is_cut_and_said(folder, side):
    (folder / "a.wav").write_bytes(wav(np.tile(SOUND, 31)))
    data = g4.read(write_rows(folder, train=[IN_ROWS["one"]] * 2), side)
    assert data[0].media[0].num_tokens == 750
    assert "2 recordings cut at 30 s" in repr(data)
    (folder / "a.wav").write_bytes(wav(np.tile(SOUND, 30)))
    data = g4.read(write_rows(folder, train=[IN_ROWS["one"]]), side)
    assert data[0].media[0].num_tokens == 750 and "cut at" not in repr(data)


@pytest.mark.parametrize("count", [160, 161, 480, 481, 38560, 48000, 48800, 99360, 480000])
def test_counts_of_tokens(count, tmp_path):
    """Those that were measured of transformers; of the unified member a token each 16 samples."""
    path = tmp_path / "a"
    path.write_bytes(wav(np.zeros(count, np.float32)))
    known = {38560: 60, 48000: 75, 48800: 76, 99360: 155, 161: 1, 480: 1, 481: 1, 480000: 750}
    if count in known:
        assert media_file("audio", str(path), MediaSettings(audio=MEL)).num_tokens == known[count]
    else:
        with pytest.raises(g4.DataError, match="has 160 samples"):
            audio.grid(str(path), MEL)
    raw = media_file("audio", str(path), MediaSettings(audio=AudioSettings(AUDIO, 16)))
    frames, _ = audio.frames(raw, AudioSettings(AUDIO, 16))
    assert len(frames) == raw.num_tokens == -(-count // 16)


def test_other_rates_and_formats(tmp_path):
    """Through the packages of an extra; without them the line that installs it."""
    other = wav(SOUND[::2], rate=8000)
    if find_spec("soxr"):
        assert len(audio.samples(other, MEL)) == 16000
    else:
        with pytest.raises(g4.ConfigError, match=r'pip install "mlx-gemma4\[audio\]"'):
            audio.samples(other, MEL)
    flac = b"fLaC" + bytes(40)
    if find_spec("soundfile"):
        with pytest.raises(g4.DataError, match="cannot be read"):
            audio.samples(flac, MEL)
        import soundfile

        soundfile.write(file := io.BytesIO(), np.stack([SOUND] * 2, 1), 16000, format="FLAC")
        assert np.abs(audio.samples(file.getvalue(), MEL) - SOUND).max() < 1e-4
        with pytest.raises(g4.DataError, match="cannot be read"):
            audio.samples(file.getvalue()[:20_000], MEL)
    else:
        with pytest.raises(g4.ConfigError, match=r'pip install "mlx-gemma4\[audio\]"'):
            audio.samples(flac, MEL)


def test_a_model_that_does_not_hear(folder, side, tiny):
    with pytest.raises(g4.ConfigError, match="a model that hears"):
        g4.read(write_rows(folder, train=[IN_ROWS["one"]]), text_side(tiny))


def test_media_are_shown_where_they_stand(folder, side):
    """As pictures in a page, by name in a text; a file that is gone by its name only."""
    row = asks({"type": "image"}, TEXT, {"type": "audio"}, image="a.png", audio="a.wav")
    data = g4.read(write_rows(folder, train=[row]), side)
    shown = data.show(0)
    assert "<|image|> x 64 a.png<image|>What is it?<|audio><|audio|> x 25 a.wav<audio|>" in str(
        shown
    )
    page = shown.html()
    at = page.index('<img alt="" src="data:image/jpeg;base64,/9j/')
    assert page.index("x 64 a.png") < at < page.index(ASKED) and page.count("<img") == 1
    picture(50, 50).save(folder / "a.png")
    assert "<img" not in data.show(0).html() or "64 a.png" in page
