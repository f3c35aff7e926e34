"""Images of rows: pixels, positions, counts, tokens and the first loss equal transformers'."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference as reference_module
import torch
import transformers
from helpers import write_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from media import add_processor, picture
from reference import UNIFIED, add_tokenizer, build_reference, note
from test_exact import LOSS
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

import mlx_gemma4 as g4
from mlx_gemma4.media.image import patches
from mlx_gemma4.media.kinds import media_file
from mlx_gemma4.model.processor import BUDGETS, ImageSettings, MediaSettings
from mlx_gemma4.model.tokenizer import load_tokenizer

pil = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
pytestmark = pytest.mark.skipif(
    not UNIFIED, reason="this transformers has an earlier image processor, of other pixels"
)
MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"]
SIZES = [(100, 100), (110, 120), (64, 60)]
"""The small models have a position for each of 24 x 24 patches."""


def merged(pixels, places, count):
    """transformers' patches of 12B; the module that has the function wants torchvision."""
    folder = Path(transformers.__file__).parent / "models/gemma4_unified"
    tree = ast.parse((folder / "image_processing_gemma4_unified.py").read_text())
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "patches_merge"]
    names = {"torch": torch, "math": math}
    exec(compile(ast.Module(found, []), "patches_merge", "exec"), names)
    pixels, places = (torch.tensor(x)[None] for x in (pixels, places))
    return [x[0].numpy() for x in names["patches_merge"](pixels, places, count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images") / "a.tiff"


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    mode=st.sampled_from(MODES),
    patch=st.sampled_from([4, 16]),
    budget=st.sampled_from(BUDGETS[:3]),
)
@example(width=1, height=1, mode="RGB", patch=16, budget=70)
@example(width=4000, height=3, mode="RGB", patch=16, budget=70)
@example(width=2, height=3000, mode="RGBA", patch=4, budget=280)
@example(width=48 * 7, height=48 * 10, mode="RGB", patch=16, budget=70)
@example(width=1500, height=1100, mode="RGB", patch=16, budget=1120)
def test_pixels(place, width, height, mode, patch, budget):
    image = picture(width, height, width, "L" if mode == "I;16" else mode).convert(mode)
    image.save(place)
    theirs = pil.Gemma4ImageProcessorPil(
        patch_size=patch, pooling_kernel_size=3, max_soft_tokens=budget
    )(image, return_tensors="np")
    ours = ImageSettings(111, patch, 3, budget)
    file = media_file("image", str(place), MediaSettings(ours))
    assert file.num_tokens == theirs["num_soft_tokens_per_image"][0]
    pixels, places = patches(file, ours)
    count = file.num_tokens * 9
    assert np.array_equal(places, theirs["image_position_ids"][0][:count])
    assert (theirs["image_position_ids"][0][count:] == -1).all()
    assert np.array_equal(pixels, theirs["pixel_values"][0][:count])
    if UNIFIED:
        whole = ImageSettings(111, 3 * patch, 1, budget)
        assert media_file("image", str(place), MediaSettings(whole))[:4] == file[:4]
        pixels, places = patches(file, whole)
        theirs = merged(*(theirs[name][0][:count] for name in THEIRS), file.num_tokens)
        assert np.array_equal(pixels, theirs[0]) and np.array_equal(places, theirs[1])


THEIRS = ("pixel_values", "image_position_ids")


# ---------------------------------------------------------------- tokens and loss


@pytest.fixture(scope="module", params=["e2b", "moe"] + ["unified"] * UNIFIED)
def seeing(request, tmp_path_factory):
    """A reference whose tokenizer knows letters, and rows that show images."""
    root = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "VOCAB", 420)
        reference = build_reference(request.param, root / request.param, encoders=True)
    add_tokenizer(reference.folder)
    add_processor(reference.folder, reference.shape == "unified")
    data = root / "data"
    data.mkdir()
    for i, size in enumerate(SIZES):
        picture(*size, seed=i).save(data / f"{i}.png")
    rows = [asking([{"type": "image"}, {"type": "text", "text": "aaa bbb?"}], "ccc ddd", ["0.png"])]
    two = [{"type": "text", "text": "aaa"}, {"type": "image"}, {"type": "image"}]
    rows += [asking(two, "eee fff ggg", ["1.png", "2.png"]), asking("hhh", "iii jjj", [])]
    return reference, write_rows(data, train=rows), rows


def asking(content, answer: str, images: list[str]) -> dict:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": images}


def processed(reference, data: Path, row: dict) -> dict:
    """What transformers makes of a row: its template, its pixels, its expansion."""
    from PIL import Image

    images = [Image.open(data / name) for name in row["images"]]
    unified = reference.shape == "unified"
    tokenizer = load_tokenizer(reference.folder)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    inputs = {}
    if images:
        inputs = pil.Gemma4ImageProcessorPil(
            patch_size=2 if unified else 4,
            pooling_kernel_size=2 if unified else 3,
            max_soft_tokens=70,
        )(images, return_tensors="np")
        names = SimpleNamespace(boi_token="<|image>", image_token="<|image|>", eoi_token="<image|>")
        parts = text.split("<|image|>")
        text = parts[0]
        for i, rest in enumerate(parts[1:]):
            text += Gemma4Processor.replace_image_token(names, inputs, i) + rest
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pixels, places = (inputs.get(name) for name in THEIRS)
    if images and unified:
        counts = inputs["num_soft_tokens_per_image"]
        pairs = [merged(x[: 4 * n], at[: 4 * n], n) for x, at, n in zip(pixels, places, counts)]
        pixels, places = (
            np.zeros((len(counts), 70, 48), np.float32),
            np.full((len(counts), 70, 2), -1),
        )
        for i, (x, at) in enumerate(pairs):
            pixels[i, : len(x)], places[i, : len(x)] = x, at
    return {"ids": np.array(ids), "pixel_values": pixels, "image_position_ids": places}


def test_tokens_are_those_of_the_processor(seeing):
    reference, data, rows = seeing
    examples = g4.read(data, g4.load(reference.folder)).train
    for ours, row in zip(examples, rows):
        assert ours.tokens.tolist() == processed(reference, data, row)["ids"].tolist()


def their_mean_loss(reference, data: Path, rows: list[dict], examples) -> float:
    """The mean over the targets of rows that transformers sees one at a time."""
    total = count = 0.0
    for row, ours in zip(rows, examples):
        made = processed(reference, data, row)
        ids = torch.tensor(made["ids"])[None]
        media = {n: torch.tensor(made[n]) for n in THEIRS if made[n] is not None}
        types = (ids == 111).long()
        with torch.no_grad():
            logits = reference.model(
                input_ids=ids, mm_token_type_ids=types, use_cache=False, **media
            ).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        learned = torch.tensor(ours.mask[1:])
        total, count = total + float(losses[learned].sum()), count + int(learned.sum())
    return total / count


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_loss_of_a_run(seeing, packing):
    """All rows in one batch, padded or in one packed row."""
    reference, data, rows = seeing
    gemma = g4.load(reference.folder, encoders=True)
    examples = g4.read(data, gemma)
    config = g4.TrainConfig(
        iters=3, batch_size=3, packing=packing, report_every=1, rematerialize="none"
    )
    run = g4.finetune(gemma, examples, config, lora=g4.LoraConfig(rank=2), console=False)
    losses = [report["loss"] for report in run.history if report["loss"] is not None]
    wanted = their_mean_loss(reference, data, rows, examples)
    gap = abs(losses[0] / wanted - 1)
    note("loss of rows", reference, gap, LOSS)
    assert gap < LOSS and len(losses) == 3 and losses[2] != losses[0]
