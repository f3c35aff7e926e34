"""Rows, tokens and comparisons that the tests share."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_gemma4 as g4
from mlx_gemma4.data.chat.encode import Chunk, Encoder, Task, encode_chunk
from mlx_gemma4.data.chat.formats import Row
from mlx_gemma4.data.chat.render import render
from mlx_gemma4.data.example import Example, Examples
from mlx_gemma4.data.read.records import located
from mlx_gemma4.model.loader import build_backbone, load_backbone
from mlx_gemma4.model.names import flat
from mlx_gemma4.model.plan import Plan
from mlx_gemma4.nn.budgets import Budgets

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
"""The vision_config of a small image encoder."""


SMALL_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "output_proj_dims": 16,
    "subsampling_conv_channels": [8, 4],
}
"""The audio_config of a small audio encoder."""


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


UNIFIED_VISION = {
    "model_type": "gemma4_unified_vision",
    "patch_size": 2,
    "pooling_kernel_size": 2,
    "model_patch_size": 4,
    "mm_embed_dim": 16,
    "mm_posemb_size": 8,
    "output_proj_dims": 16,
}


def as_others_load_it(source: Path, folder: Path, audio: bool = False) -> Path:
    """A copy of a small checkpoint that every mlx-lm and mlx-vlm loads.

    In the layout of MLX conversions, with an image encoder, if asked with an audio encoder, with no
    key left to the libraries' defaults, and with the dead K/V weights of sharing layers that older
    ones want.
    """
    config = json.loads((source / "config.json").read_text())
    config["text_config"].setdefault("hidden_size_per_layer_input", 0)
    unified = config["model_type"] == "gemma4_unified"
    if find_spec(f"mlx_vlm.models.{config['model_type']}"):
        config["vision_config"] = UNIFIED_VISION if unified else SMALL_VISION
        config["audio_config"] = SMALL_AUDIO if audio else config.get("audio_config")
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_backbone(source)
    weights = flat(loaded.backbone.parameters())
    if config["vision_config"]:
        built = flat(build_backbone(Plan.from_config(config), config).parameters())
        weights |= {n: v for n, v in built.items() if not n.startswith("language_model.")}
    outer = "language_model.model."
    for layer in loaded.plan.layers:
        for part in ("k_proj", "v_proj", "k_norm") if layer.shares_kv else ():
            twin = weights[f"{outer}layers.{layer.kv_source}.self_attn.{part}.weight"]
            weights[f"{outer}layers.{layer.index}.self_attn.{part}.weight"] = 1 + twin
    if loaded.plan.ple:
        stored = mx.load(str(source / "model.safetensors"))
        name = "embed_tokens_per_layer.weight"
        weights[outer + name] = stored[f"model.language_model.{name}"]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def encode(
    row: Row, tokenizer, train_on: str, thinking: str = "keep", notes=None, answer_start="prompt"
) -> Example:
    """One row as an example, by the steps that `encode_chunk` takes for many."""
    config = g4.DataConfig(train_on=train_on, thinking=thinking, answer_start=answer_start)
    encoder = Encoder(Task(tokenizer, len(tokenizer), config))
    with located(row.origin):
        rendering = render(row, tokenizer, thinking, encoder.ends)
        [tokens] = encoder.tokenize([rendering.text])
        return encoder.example(rendering, tokens, Counter() if notes is None else notes)


def encode_together(rows, tokenizer, train_on: str, thinking: str = "keep", on_bad_row="skip"):
    """(examples, facts) of rows that are tokenized in one call."""
    config = g4.DataConfig(train_on=train_on, thinking=thinking, on_bad_row=on_bad_row)
    raw = [
        {"text": row.text}
        if row.shape == "text"
        else {"messages": [_as_written(turn) for turn in row.messages], "tools": list(row.tools)}
        for row in rows
    ]
    encoded = encode_chunk(
        Task(tokenizer, len(tokenizer), config), Chunk("rows[", None, list(enumerate(raw)))
    )
    return Examples([encoded]), encoded.facts


def _as_written(turn: dict) -> dict:
    turn = dict(turn)
    return turn if turn.pop("train", True) else {**turn, "weight": 0}


def small_budgets(
    monkeypatch, *, on_gpu: bool = False, queries: int = 64, positions: int = 64, targets: int = 64
) -> None:
    """Little is formed at a time; on a GPU, blocks go together and GELU keeps its inputs."""
    monkeypatch.setattr(Budgets, "block", lambda *_: (queries, 3 if on_gpu else 1))
    monkeypatch.setattr(Budgets, "mlp_positions", lambda *_: positions)
    monkeypatch.setattr(Budgets, "chunk", lambda *_: targets)
    monkeypatch.setattr(Budgets, "keeps_derivatives", not on_gpu)
