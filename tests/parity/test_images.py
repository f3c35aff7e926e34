"""Attention masks with images equal those of transformers."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from helpers import relative_gap
from reference import note, random_batch
from test_exact import load

import mlx_gemma4 as g4
from mlx_gemma4.nn.batch import StepOptions
from mlx_gemma4.nn.forward import forward
from mlx_gemma4.nn.head import logits

IMAGES = [(3, 17), (25, 58)]
"""The second is longer than every window of the small models."""


def image_numbers(length: int) -> np.ndarray:
    numbers = np.full((2, length), -1)
    for number, (start, end) in enumerate(IMAGES):
        numbers[:, start:end] = number
    return numbers


@pytest.mark.parametrize("method", ["plain", "blockwise"])
def test_positions_of_an_image_attend_to_each_other(reference, method):
    """In those members, layers and windows in which they do; elsewhere images change nothing."""
    if reference.shape == "text":
        pytest.skip("a text checkpoint has no images")
    gemma = load(reference)
    if gemma.plan.bidirectional and transformers.__version__.startswith("5.5."):
        pytest.skip("transformers 5.5 has Gemma 3's masks: images in full layers too")
    tokens = random_batch(T=61).tokens_BT
    numbers = image_numbers(tokens.shape[1])
    with torch.no_grad():
        theirs = reference.model(
            input_ids=torch.tensor(np.array(tokens)).long(),
            attention_mask=torch.ones(tokens.shape).long(),
            mm_token_type_ids=torch.tensor((numbers >= 0).astype(np.int64)),
            use_cache=False,
        ).logits
        plain = reference.logits(tokens)
    batch = dataclasses.replace(
        g4.Batch.of_prompt(tokens).with_ple_rows(gemma),
        images_BT=mx.array(numbers),
        largest_image=40,
    )
    ours = logits(gemma, forward(gemma, batch, StepOptions(attention=method)))
    gap = relative_gap(ours, theirs.numpy())
    note("logits with images", reference, gap, 1e-4)
    assert gap < 1e-4
    moved = relative_gap(mx.array(plain.numpy()), theirs.numpy())
    assert (moved > 1e-2) == (gemma.plan.bidirectional is not None)
