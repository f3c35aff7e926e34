"""Rows, tokens and comparisons that the tests share."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat

TEXTS = [
    "What is a generator? It yields values, one at a time.\n",
    "Return the sum of the values that a list holds.\n",
    "Open the file, read a line, and close it again.\n",
] * 20

CHAT = [
    {
        "messages": [
            {"role": "user", "content": "What is a list?"},
            {"role": "assistant", "content": "A list holds values."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Open the file."},
            {"role": "assistant", "content": "The file is open."},
            {"role": "user", "content": "Read a line."},
            {"role": "assistant", "content": "Return the line."},
        ]
    },
]


SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
"""The vision_config of a small image tower."""


def write_rows(folder: Path, **splits: list) -> Path:
    """A data folder with one JSONL file per split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in splits.items():
        text = "".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
        )
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def some_tokens(vocab_size: int, B: int = 2, T: int = 60, seed: int = 0) -> mx.array:
    """Token ids (B, T), longer than every window of the small checkpoints."""
    return mx.array(np.random.default_rng(seed).integers(3, vocab_size, (B, T)))


def make_lora_nonzero(gemma: g4.Gemma4, size: float = 0.05, seed: int = 3) -> None:
    """Give every lora_b values, so that gradients reach lora_a and the adapter does something."""
    names = [n for n in flat(gemma.backbone.trainable_parameters()) if n.endswith("lora_b")]
    keys = mx.random.split(mx.random.key(seed), len(names))
    parameters = flat(gemma.backbone.parameters())
    gemma.backbone.load_weights(
        [(n, size * mx.random.normal(parameters[n].shape, key=k)) for n, k in zip(names, keys)],
        strict=False,
    )


def relative_gap(ours: mx.array, reference) -> float:
    """Largest difference over the largest reference value."""
    ours, reference = np.array(ours, np.float64), np.array(reference, np.float64)
    return float(np.abs(ours - reference).max() / max(np.abs(reference).max(), 1e-12))


def worst_gap(ours: dict, reference: dict) -> tuple[str, float]:
    """The gradient that is furthest from its reference, and how far; names must match."""
    ours, reference = flat(ours), flat(reference)
    assert set(ours) == set(reference)
    gaps = {name: relative_gap(ours[name], reference[name]) for name in ours}
    worst = max(gaps, key=gaps.__getitem__)
    return worst, gaps[worst]


def assert_same_grads(ours: dict, reference: dict, tolerance: float = 1e-3) -> None:
    """Every gradient within a relative tolerance of its reference."""
    name, gap = worst_gap(ours, reference)
    assert gap < tolerance, f"{name}: {gap:.2e}"
