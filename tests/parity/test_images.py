"""Who sees whom where there are images: the masks of the forward equal those of transformers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from helpers import relative_gap
from reference import note, random_batch
from test_exact import load

from mlx_gemma4.nn.forward import forward, head

IMAGES = [(3, 17), (25, 58)]
"""The second is longer than every window of the small models."""


def image_numbers(length: int) -> np.ndarray:
    numbers = np.full((2, length), -1)
    for number, (start, end) in enumerate(IMAGES):
        numbers[:, start:end] = number
    return numbers


@pytest.mark.parametrize("method", ["plain", "blockwise"])
def test_positions_of_an_image_see_each_other(reference, method):
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
    hidden = forward(
        gemma.backbone,
        gemma.plan,
        tokens,
        ple_BTLP=gemma.ple_rows(tokens),
        images_BT=mx.array(numbers),
        largest_image=40,
        method=method,
    )
    ours = head(gemma.backbone, gemma.plan, hidden)
    gap = relative_gap(ours, theirs.numpy())
    note("logits with images", reference, gap, 1e-4)
    assert gap < 1e-4
    moved = relative_gap(mx.array(plain.numpy()), theirs.numpy())
    assert (moved > 1e-2) == (gemma.plan.bidirectional is not None)
