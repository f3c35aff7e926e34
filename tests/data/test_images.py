"""Images of rows: where they may come from, their tokens, the cache, batches, and bad files."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from helpers import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from media import add_processor, picture
from PIL import Image

import mlx_gemma4 as g4
from mlx_gemma4.data import dataset as dataset_module
from mlx_gemma4.data.batch.collate import collate, collate_alike
from mlx_gemma4.data.example import Examples
from mlx_gemma4.media.image import patches
from mlx_gemma4.media.kinds import media_file
from mlx_gemma4.model.processor import BUDGETS, ImageSettings, MediaSettings
from mlx_gemma4.model.tokenizer import text_side

OPENER, IMAGE, CLOSER = 110, 111, 112
ASKED, ANSWER = "What is it?", {"role": "assistant", "content": "A list of values."}
SMALL = ImageSettings(IMAGE, 4, 3, 70)
MEDIA = MediaSettings(SMALL)
WIDE, TALL = (300, 40), (36, 130)  # pixels


@pytest.fixture(scope="module")
def side(checkpoints, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("sees") / "e2b"
    shutil.copytree(checkpoints["e2b"], folder)
    return text_side(add_processor(folder))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_GEMMA4_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    picture(*WIDE).save(data / "wide.png")
    picture(*TALL, seed=1).save(data / "tall.jpg")
    return data


def asks(*content, **fields) -> dict:
    content = content[0] if isinstance(content[0], str) else list(content)
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def read(folder, side, *rows, **config) -> g4.Dataset:
    return g4.read(write_rows(folder, train=list(rows)), side, g4.DataConfig(**config))


def png(*size, **how) -> bytes:
    file = io.BytesIO()
    picture(*size, **how).save(file, "PNG")
    return file.getvalue()


def shown(example, tokenizer) -> str:
    """The text, with each image as the number of its tokens."""
    said = tokenizer.decode(example.tokens)
    for image in example.media:
        run = "<|image>" + "<|image|>" * image.num_tokens + "<image|>"
        said = said.replace(run, f"[{image.num_tokens}]", 1)
    return said


# ---------------------------------------------------------------- rows

WIDE_URL = "data:image/png;base64," + base64.b64encode(png(*WIDE)).decode()
IN_ROWS = {
    "image": asks({"type": "image", "image": "wide.png"}, text(ASKED)),
    "path": asks({"type": "image", "path": "wide.png"}, text(ASKED)),
    "image_url": asks({"type": "image_url", "image_url": {"url": "wide.png"}}, text(ASKED)),
    "file": asks({"type": "image_url", "image_url": {"url": "file://wide.png"}}, text(ASKED)),
    "data": asks({"type": "image_url", "image_url": {"url": WIDE_URL}}, text(ASKED)),
    "base64": asks({"type": "image", "base64": WIDE_URL.partition(",")[2]}, text(ASKED)),
    "column": asks(ASKED, images=["wide.png"]),
    "one": asks(ASKED, image="wide.png"),
    "placeholder": asks({"type": "image"}, text(ASKED), images=["wide.png"]),
    "mark": asks(f"<image>\n{ASKED}", image="wide.png"),
    "prompt": {"prompt": ASKED, "completion": ANSWER["content"], "image": "wide.png"},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": f"<image>{ASKED}"},
            {"from": "gpt", "value": ANSWER["content"]},
        ],
        "images": ["wide.png"],
    },
}


@pytest.mark.parametrize("name", IN_ROWS)
def test_rows_with_an_image(name, folder, side):
    [example] = read(folder, side, IN_ROWS[name])
    [image] = example.media
    assert (image.columns, image.rows) == SMALL.grid(*WIDE) == (22, 3)
    said = shown(example, side.tokenizer)
    assert said == f"<bos><|turn>user\n[66]{ASKED}<turn|>\n<|turn>model\nA list of values.<turn|>\n"
    learned = side.tokenizer.decode(example.tokens[example.mask])
    assert learned == "A list of values.<turn|>"
    assert patches(image, SMALL)[0].shape == (66 * 9, 48)


def test_an_empty_column_is_no_image(folder, side):
    """A cell of a table that holds nothing."""
    assert not read(folder, side, asks(ASKED, image=""), asks(ASKED, images=[])).has_media


def test_rows_in_memory(side):
    """PIL images and bytes, also as a `datasets` column has them."""
    rows = [
        asks(ASKED, images=[picture(*WIDE)]),
        asks({"type": "image", "image": {"bytes": png(*WIDE), "path": None}}, text(ASKED)),
        asks(ASKED, image=png(*WIDE)),
    ]
    examples = g4.read(rows, side).train
    assert {len(example.media) for example in examples} == {1}
    assert len({example.media[0].digest for example in examples[1:]}) == 1
    assert len({patches(example.media[0], SMALL)[0].tobytes() for example in examples}) == 1


def test_several_images_stand_where_the_row_has_them(folder, side):
    row = asks(text("One"), {"type": "image"}, text("and"), {"type": "image"}, text("?"))
    [example] = read(folder, side, row | {"images": ["wide.png", "tall.jpg"]})
    assert [image.path.rpartition("/")[2] for image in example.media] == ["wide.png", "tall.jpg"]
    tall = SMALL.grid(*TALL)
    said = f"user\nOne[66]and[{tall[0] * tall[1]}]?"
    assert said in shown(example, side.tokenizer)


@pytest.mark.parametrize("train_on", ["all", "assistant", "last", "completion"])
def test_media_are_never_targets(folder, side, train_on):
    [example] = read(folder, side, IN_ROWS["image"], train_on=train_on)
    assert not example.mask[np.isin(example.tokens, [OPENER, IMAGE, CLOSER])].any()
    assert example.num_targets >= 5


BAD_ROWS = {
    "more images than places": (
        asks({"type": "image"}, text(ASKED), images=["wide.png"] * 2),
        "has 2 images, and 1 places",
    ),
    "more places than images": (
        asks({"type": "image"}, {"type": "image"}, text(ASKED), images=["wide.png"]),
        "has 1 images, and 2 places",
    ),
    "a place alone": (asks({"type": "image"}, text(ASKED)), "has the image None"),
    "the token as text": (asks(f"<|image|>{ASKED}"), "no parts of media, and 1 tokens of media"),
    "the token beside": (
        asks(f"<|image|>{ASKED}", image="wide.png"),
        "1 image parts of media, and 2 tokens",
    ),
    "another token": (asks(f"<|video|>{ASKED}"), "no parts of media, and 1 tokens of media"),
    "the net": (asks(ASKED, image="https://example.org/a.png"), "nothing is downloaded"),
    "elsewhere": (asks(ASKED, image="../a.png"), "outside of"),
    "not there": (asks(ASKED, image="b.png"), "no such file"),
    "not base64": (asks(ASKED, image="data:image/png;base64,?"), "not base64"),
    "no image": (asks(ASKED, image="data:image/png;base64,AAAA"), "cannot be read"),
    "no question": ({"messages": [ANSWER], "image": "wide.png"}, "no user turn"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_used(name, folder, side):
    row, said = BAD_ROWS[name]
    (folder.parent / "a.png").write_bytes(png(*WIDE))
    with pytest.raises(g4.DataError, match=r"train.jsonl:1: ") as error:
        read(folder, side, row)
    assert said in str(error.value)


def test_a_model_without_settings_of_images(folder, tiny):
    with pytest.raises(g4.ConfigError, match=r"processor_config.json"):
        read(folder, text_side(tiny), IN_ROWS["image"])


# ---------------------------------------------------------------- files


def noise(kind: str) -> bytes:
    file = io.BytesIO()
    picture(90, 70).save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1000)
    parts = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, body)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BROKEN = {
    "empty": b"",
    "text": b"hello" * 99,
    "cut JPEG": noise("JPEG")[:-300],
    "cut PNG": noise("PNG")[:-300],
    "cut GIF": noise("GIF")[:-300],
    "cut BMP": noise("BMP")[:-300],
    "a header": noise("JPEG")[:30],
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch RAN) system\n",
    "bomb": bomb(60_000, 60_000),
    "wide bomb": bomb(9_000, 9_000),
    "no pixels": bomb(0, 10),
    "a format that is not opened": noise("PPM"),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_whole_image(name, folder, side, monkeypatch):
    (folder / "wide.png").write_bytes(BROKEN[name])
    with pytest.raises(g4.DataError, match=r"train.jsonl:1: the image .*wide.png") as error:
        read(folder, side, IN_ROWS["image"])
    assert len(str(error.value).splitlines()) == 3
    assert ("9,000 x 9,000 pixels" in str(error.value)) == (name == "wide bomb")
    again = read(folder, side, IN_ROWS["image"], asks("Hi"), on_bad_row="skip")
    assert (len(again), again.facts.bad) == (1, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_modes_and_formats(mode, kind, tmp_path):
    path = tmp_path / "a.dat"  # the content says what it is
    try:
        picture(60, 90, mode=mode if mode != "LA" else "RGBA").convert(mode).save(path, kind)
    except (OSError, KeyError, ValueError):
        return  # the format has no such mode
    pixels, places = patches(media_file("image", str(path), MEDIA), SMALL)
    assert pixels.shape == (len(places), 48) and 0 <= pixels.min() <= pixels.max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_is_turned_as_its_exif_data_say(kind, tmp_path):
    path, exif = tmp_path / "a", Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    half = Image.new("RGB", (96, 48), "black")
    half.paste("white", (0, 0, 48, 48))
    half.save(path, kind, exif=exif)
    file = media_file("image", str(path), MEDIA)
    assert file.columns < file.rows
    pixels, places = patches(file, SMALL)
    top = places[:, 1] < places[:, 1].max() // 2
    assert pixels[top].mean() > 0.95 and pixels[~top].mean() < 0.1


def test_transparent_is_white(tmp_path):
    picture(60, 60, mode="RGBA").point(lambda _: 0).save(tmp_path / "a.png")
    assert (patches(media_file("image", str(tmp_path / "a.png"), MEDIA), SMALL)[0] == 1).all()


@settings(deadline=None)
@given(st.integers(1, 30_000), st.integers(1, 30_000), st.sampled_from(BUDGETS))
def test_grids_keep_to_the_budget(width, height, budget):
    columns, rows = ImageSettings(IMAGE, 16, 3, budget).grid(width, height)
    assert min(columns, rows) >= 1 and columns * rows <= budget
    assert (columns, rows) == ImageSettings(IMAGE, 48, 1, budget).grid(width, height)


# ---------------------------------------------------------------- length, cache, batches


def test_the_budget_is_a_setting(folder, side):
    [example] = read(folder, side, IN_ROWS["image"], image_tokens="140")
    assert 70 < example.media[0].num_tokens <= 140


@pytest.mark.parametrize("side_cut", ["end", "start"])
def test_no_cut_goes_through_an_image(folder, side, side_cut):
    row = asks(text("Open the file."), {"type": "image", "image": "wide.png"}, text(ASKED))
    row["messages"] = [*row["messages"], {"role": "user", "content": "Why?"}, ANSWER]
    if side_cut == "end":
        row["messages"] = [{"role": "user", "content": "Hi"}, ANSWER, *row["messages"]]
    [whole] = read(folder, side, row)
    first = int(np.flatnonzero(whole.tokens == OPENER)[0])
    last = int(np.flatnonzero(whole.tokens == CLOSER)[0])
    seen = set()
    for length in range(20, len(whole)):
        how = {"overlong": "truncate", "truncate_from": side_cut, "max_seq_length": length}
        try:
            cut = read(folder, side, row, **how).train
        except g4.DataError as error:
            assert "too long" in str(error)
            kept = (
                range(length) if side_cut == "end" else range(len(whole) - length + 1, len(whole))
            )
            whole_image = first in kept and last in kept
            none = first not in kept and last not in kept
            assert not (whole_image or none)
            seen.add("skipped")
            continue
        count = int((cut[0].tokens == IMAGE).sum())
        assert count == sum(image.num_tokens for image in cut[0].media)
        assert (cut[0].tokens == OPENER).sum() == (cut[0].tokens == CLOSER).sum() == bool(count)
        seen.add("with" if count else "without")
    assert seen >= {"skipped", "with"}


def test_the_cache_keeps_images(folder, side, monkeypatch, cache):
    monkeypatch.setattr(dataset_module, "SMALL", 0)
    rows = [asks("Hi"), IN_ROWS["image"], IN_ROWS["data"], asks(ASKED, images=["tall.jpg"])]
    plain = read(folder, side, *rows)
    entries = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    again = read(folder, side, *rows)
    assert [e.media for e in again] == [e.media for e in plain]
    assert [len(e.media) for e in again] == [0, 1, 1, 1] and again.has_media
    picture(*TALL, seed=9).save(folder / "wide.png")
    changed = read(folder, side, *rows)
    assert len(changed[1]) != len(plain[1])
    assert [path for path in (cache / "tokens").iterdir() if path.is_dir()] == entries


def test_examples_are_equal_where_their_images_are(folder, side):
    """By content: two files of one picture are, and two pictures of one size are not."""
    picture(*WIDE).save(folder / "same.png")
    picture(*WIDE, seed=7).save(folder / "other.png")
    rows = [asks(ASKED, image=name) for name in ("wide.png", "same.png", "other.png")]
    one, same, other = Examples.of(read(folder, side, *rows).train).digests
    assert one == same != other


def test_a_folder_without_images_has_no_file_of_them(folder, side, monkeypatch, cache):
    monkeypatch.setattr(dataset_module, "SMALL", 0)
    assert not read(folder, side, asks("Hi")).has_media
    assert not list((cache / "tokens").glob("*/media.json"))


def test_a_file_that_changed_since(folder, side):
    [example] = read(folder, side, IN_ROWS["image"])
    picture(50, 60).save(folder / "wide.png")
    with pytest.raises(g4.DataError, match=r"train.jsonl:1: the image .* has changed"):
        collate([example], media=MEDIA)
    (folder / "wide.png").unlink()
    with pytest.raises(g4.DataError, match=r"train.jsonl:1: the image .* has changed"):
        collate([example], media=MEDIA)


def test_batches_of_a_step_share_shapes(folder, side):
    rows = [IN_ROWS["image"], asks("Hi"), asks(ASKED, images=["tall.jpg", "wide.png"])]
    examples = list(read(folder, side, *rows))
    one, none, packed = collate_alike(
        [[examples[0]], [examples[1]], [[examples[2], examples[0]]]], media=MEDIA
    )
    assert none.media is None and none.images_BT is None
    assert one.media.pixel_values.shape == packed.media.pixel_values.shape == (3, 80 * 9, 48)
    numbers = np.array(packed.images_BT)
    assert (numbers >= 0).tolist() == (np.array(packed.tokens_BT) == IMAGE).tolist()
    counts = [image.num_tokens for example in (examples[2], examples[0]) for image in example.media]
    assert np.bincount(numbers[numbers >= 0]).tolist() == counts
    given = np.array(packed.media.image_position_ids).min(axis=2) >= 0
    assert (given.sum(axis=1) // 9).tolist() == counts
    assert not np.array(one.media.pixel_values)[1:].any()


def test_images_are_read_only_where_there_are_some(folder, side):
    import subprocess
    import sys

    write_rows(folder, train=[asks("Hi")])
    work = (
        "import sys, mlx_gemma4 as g4; from mlx_gemma4.data.batch.collate import collate;"
        "from mlx_gemma4.model.processor import ImageSettings;"
        "from mlx_gemma4.media.image import _PIL;"
        "before = 'PIL.ImageOps' in sys.modules;"
        "_PIL(); print(before)"
    )
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_settings_that_no_gemma_4_has(tmp_path, side):
    from mlx_gemma4.model.processor import AudioSettings, read_media_settings

    good = json.loads((add_processor(tmp_path) / "processor_config.json").read_text())
    assert read_media_settings(tmp_path, side.plan) == MediaSettings(SMALL, AudioSettings(114))
    unified = replace(side.plan, model_type="gemma4_unified")
    assert read_media_settings(tmp_path, unified) == MediaSettings(ImageSettings(IMAGE, 12, 1, 70))
    for change in ({"max_soft_tokens": 71}, {"do_normalize": True}, {"patch_size": "4"}, None):
        images = change and good["image_processor"] | change
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": images}))
        assert read_media_settings(tmp_path, side.plan) == MediaSettings()
    for change in ({"sampling_rate": 8000}, {"hop_length": 80}, {"dither": 0.1}):
        sounds = good["feature_extractor"] | change
        (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": sounds}))
        assert read_media_settings(tmp_path, side.plan).audio is None


def test_an_image_is_shown_as_the_number_of_its_tokens(folder, side):
    said = read(folder, side, IN_ROWS["image"]).show(0).text()
    assert "<|image><|image|> x 66 wide.png<image|>What is it?" in said


def test_rows_in_memory_name_files_only_with_the_flag(folder, side):
    rows = [asks(ASKED, image=str(folder / "wide.png"))]
    with pytest.raises(g4.DataError, match=r"rows\[0\]: turn 1 \(user\): has the image"):
        g4.read(rows, side)
    assert g4.read(rows, side, g4.DataConfig(media_anywhere=True)).has_media
