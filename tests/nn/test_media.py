"""What must hold of images and audio in a step on any stack, without a reference model."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers import assert_same_grads, make_lora_nonzero, relative_gap, small_budgets
from media import IMAGES, ROWS, batch_with, build_with_media, rows_with
from mlx.utils import tree_map

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.nn.forward import forward
from mlx_gemma4.nn.media import Media, encoded
from mlx_gemma4.train.step import train_step

SHAPES = ["e2b", "moe"] + ["unified"] * bool(find_spec("mlx_vlm.models.gemma4_unified"))


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, checkpoints, tmp_path_factory):
    """A checkpoint with encoders of each rule for images: E2B, 26B, 12B."""
    place = tmp_path_factory.mktemp("with_media") / request.param
    return build_with_media(checkpoints[request.param], place, request.param)


@pytest.fixture
def gemma(folder) -> g4.Gemma4:
    gemma = g4.load(folder, encoders=True)
    gemma.train_all(encoders=True)
    return gemma


@pytest.fixture
def rows(gemma) -> dict:
    """Two rows with images, and with recordings where the model hears."""
    hears = gemma.backbone.get("embed_audio") is not None
    wanted = ROWS["both"] + [[4, ("audio", 62), 20]] if hears else ROWS["rows"]
    return rows_with(wanted, gemma.plan.vocab_size, gemma.plan.is_unified)


def test_buffers_of_encoders_never_train(gemma):
    names = flat(gemma.backbone.trainable_parameters())
    ends = ("layer_scalar", "put_min", "put_max", "std_bias", "std_scale")
    every = flat(gemma.backbone.parameters())
    assert set(names) == {name for name in every if not name.endswith(ends)} != set(every)


@pytest.mark.parametrize("how", ["rematerialized", "blockwise", "lean"])
def test_however_it_is_computed(gemma, rows, how, monkeypatch):
    """Several blocks of attention, in text and in the image encoder; every layer run again."""
    small_budgets(monkeypatch)
    batch = batch_with(rows)
    loss, _, grads = g4.loss_and_grads(gemma, batch, attention="plain")
    again = g4.loss_and_grads(
        gemma,
        batch,
        attention="plain" if how == "rematerialized" else "blockwise",
        rematerialize=how != "blockwise",
    )
    assert float(again[0]) == pytest.approx(float(loss), rel=1e-5)
    assert_same_grads(again[2], grads, 1e-4)


def documents(gemma) -> tuple[g4.Batch, g4.Batch]:
    """Three documents with images, packed in one row and in rows of their own."""
    parts = [
        [6, ("image", IMAGES[0]), 12],
        [("image", IMAGES[1]), 9, ("image", IMAGES[2]), 20],
        [30],
    ]
    vocab, unified = gemma.plan.vocab_size, gemma.plan.is_unified
    apart = rows_with(parts, vocab, unified)
    lengths = (apart["tokens"] != 0).sum(axis=1)
    together = dict(apart)
    for name in ("tokens", "weights", "mm_token_type_ids"):
        rows = [row[:n] for row, n in zip(apart[name], lengths)]
        together[name] = np.concatenate(rows)[None]
    segments = np.repeat(np.arange(len(parts)), lengths)[None]
    return batch_with(together, segments), batch_with(apart)


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_packed_equals_separate(gemma, attention):
    packed, apart = documents(gemma)
    loss, count, grads = g4.loss_and_grads(gemma, apart, attention="plain")
    own_loss, own_count, own = g4.loss_and_grads(gemma, packed, attention=attention)
    assert float(own_count) == float(count)
    assert float(own_loss) == pytest.approx(float(loss), rel=1e-5)
    assert_same_grads(own, grads, 1e-4)


def test_an_image_of_a_neighbour_changes_nothing(gemma):
    packed, _ = documents(gemma)
    pixels = packed.media.pixel_values
    first_is_other = mx.concatenate([1 - pixels[:1], pixels[1:]])
    other = replace(packed, media=replace(packed.media, pixel_values=first_is_other))
    end = int((packed.segments_BT == 0).sum())
    before, after = (np.array(forward(gemma, b.with_ple_rows(gemma))) for b in (packed, other))
    assert np.abs(before - after)[:, :end].max() > 1e-3
    assert np.array_equal(before[:, end:], after[:, end:])


def test_batches_add_up(gemma, rows):
    """An accumulation of two batches is one batch of both."""
    batches = [batch_with(rows), batch_with(rows | {"weights": rows["weights"] * 0.5})]
    losses, _, grads = zip(*[g4.loss_and_grads(gemma, batch) for batch in batches])
    optimizer = optim.SGD(1.0)
    before = gemma.backbone.trainable_parameters()
    sums, _ = train_step(gemma, optimizer, [batch.with_ple_rows(gemma) for batch in batches])
    assert float(sums.loss) == pytest.approx(float(sum(losses)), rel=1e-5)
    moved = tree_map(
        lambda a, b: (a - b) * sums.count, before, gemma.backbone.trainable_parameters()
    )
    added = tree_map(mx.add, *grads)
    gaps = {
        name: float(mx.abs(value - flat(added)[name]).max()) for name, value in flat(moved).items()
    }
    assert max(gaps.values()) < 1e-3 * max(float(mx.abs(g).max()) for g in flat(added).values())


def test_nothing_is_read_on_the_host(gemma, rows):
    """A step can be traced, so that it can be compiled; tests/parity compiles and compares one."""
    batch = batch_with(rows).with_ple_rows(gemma)

    def step(fields):
        loss, _, grads = g4.loss_and_grads(gemma, g4.Batch(**fields), rematerialize=True)
        return loss, grads

    loss, _ = mx.compile(step, inputs=gemma.backbone.state)(batch.fields())
    assert loss.shape == ()


def test_nothing_leaks_from_the_future_but_within_an_image(gemma):
    """A soft token and a text token are changed; what stands before each stays as it was.

    Within the image, positions before see the change in the members that have it so.
    """
    inputs = rows_with(
        [[5, ("image", IMAGES[1]), 30]], gemma.plan.vocab_size, gemma.plan.is_unified
    )
    batch = batch_with(inputs).with_ple_rows(gemma)
    media = encoded(gemma.backbone, batch.media)
    first, count = 6, IMAGES[1][0] * IMAGES[1][1]
    changed = media.embeddings_KD * (mx.arange(count) < count - 1)[:, None]
    text = np.array(batch.tokens_BT)
    text[0, first + count + 10] += 1

    def hidden(**changes) -> np.ndarray:
        own = replace(batch, **{"media": media, **changes})
        return np.array(forward(gemma, replace(own, ple_BTLP=None).with_ple_rows(gemma)))

    plain = hidden()
    moved = np.abs(hidden(media=Media(embeddings_KD=changed)) - plain).max(axis=(0, 2))
    assert not moved[:first].any() and moved[first + count - 1] > 1e-3
    inside = moved[first : first + count - 1]
    assert inside.all() if gemma.plan.bidirectional else not inside.any()
    moved = np.abs(hidden(tokens_BT=mx.array(text)) - plain).max(axis=(0, 2))
    assert not moved[: first + count + 10].any() and moved[first + count + 10] > 1e-3


def test_kept_outputs_equal_computed_ones(folder, rows):
    """Only the language model trains: what the encoders give is computed once."""
    gemma = g4.load(folder, encoders=True)
    gemma.add_lora(g4.LoraConfig(rank=2))
    make_lora_nonzero(gemma)
    batch = batch_with(rows).with_ple_rows(gemma)
    kept = replace(batch, media=encoded(gemma.backbone, batch.media)).with_ple_rows(gemma)
    loss, _, grads = g4.loss_and_grads(gemma, batch)
    again = g4.loss_and_grads(gemma, kept)
    assert float(again[0]) == pytest.approx(float(loss), rel=1e-6)
    assert_same_grads(again[2], grads, 1e-5)

    text = g4.load(folder)  # what is kept needs no encoder
    text.add_lora(gemma.lora)
    trained = flat(gemma.backbone.trainable_parameters())
    text.backbone.load_weights(list(trained.items()), strict=False)
    assert float(g4.loss_and_grads(text, kept)[0]) == pytest.approx(float(loss), rel=1e-5)


def test_an_encoder_that_a_batch_does_not_use_does_not_run(gemma, rows, monkeypatch):
    for name in ("audio_tower", "embed_audio"):
        monkeypatch.delitem(gemma.backbone, name, raising=False)
    inputs = rows_with(ROWS["image"], gemma.plan.vocab_size, gemma.plan.is_unified)
    assert relative_gap(gemma.logits(batch_with(inputs).tokens_BT), [1]) > 0
    g4.loss_and_grads(gemma, batch_with(inputs))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_position_ids": None}, "pixel_values of shape .* with image_position_ids .* None"),
        ({"pixel_values": None}, "pixel_values of shape None"),
        ({"mm_token_type_ids": np.zeros((1, 3))}, "mm_token_type_ids of shape"),
    ],
)
def test_inputs_that_do_not_belong_together(gemma, change, said):
    inputs = rows_with(ROWS["image"], gemma.plan.vocab_size, gemma.plan.is_unified)
    with pytest.raises(g4.DataError, match=said):
        batch_with(inputs | change)


def test_as_many_soft_tokens_as_tokens(gemma):
    inputs = rows_with(ROWS["image"], gemma.plan.vocab_size, gemma.plan.is_unified)
    inputs["tokens"][0, 9] = 120
    with pytest.raises(g4.DataError, match="35 image tokens and 36 embeddings of image"):
        g4.loss_and_grads(gemma, batch_with(inputs))


def test_a_model_without_encoders_says_so(folder):
    gemma = g4.load(folder)
    gemma.train_all()
    inputs = rows_with(ROWS["image"], gemma.plan.vocab_size, gemma.plan.is_unified)
    with pytest.raises(g4.CapabilityError, match="without embed_vision"):
        g4.loss_and_grads(gemma, batch_with(inputs))
