"""The reference: small random Gemma 4 models of every family shape, built with transformers.

This folder needs torch and peft; `make parity` installs them. Nothing is trivial in the models: no
norm, scalar, router scale or PLE row is at its start value, and sequences outrun the window.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from helpers import SMALL_VISION
from safetensors.torch import load_file, save_file
from shapes import SHAPES

from mlx_gemma4.model.tiny import build_tiny
from mlx_gemma4.nn.batch import Batch

# The models are so small that threads wait for each other longer than they work.
torch.set_num_threads(1)

VOCAB = 192
UNIFIED = hasattr(transformers, "Gemma4UnifiedForConditionalGeneration")

_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # Normalised over two channels values become signs, and rounding decides over them.
    "subsampling_conv_channels": [128, 8],
    "output_proj_dims": 16,
}
_UNIFIED_VISION = {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 16,
                   "mm_posemb_size": 8, "output_proj_dims": 16}  # fmt: skip
_UNIFIED_AUDIO = {"audio_samples_per_token": 16, "audio_embed_dim": 16}


FIGURES: dict[tuple[str, str], float] = {}
"""The worst difference seen, by what was compared and shape; printed after the tests."""


def note(what: str, reference: Reference, gap: float, tolerance: float) -> None:
    """Remember a difference that passes, for the figures."""
    key = what, reference.shape
    if gap < tolerance:
        FIGURES[key] = max(FIGURES.get(key, 0.0), float(gap))


def _once_a_batch(function):
    """What a reference says of a batch, worked out once: many tests compare the same batches.

    A loss keeps its graph until `reference_grads` has walked it.
    """

    @functools.wraps(function)
    def once(reference: Reference, batch: Batch) -> Any:
        arrays = [getattr(batch, f.name) for f in fields(batch) if not f.name.startswith("ple")]
        key = function.__name__, *(str(a) if a is None else _bytes(a) for a in arrays)
        if key not in reference.known:
            reference.known[key] = function(reference, batch)
        value = reference.known[key]
        return dict(value) if isinstance(value, dict) else value

    return once


def _bytes(value: Any) -> tuple[Any, bytes]:
    array = np.array(value)
    return array.shape, array.tobytes()


@dataclass
class Reference:
    """A transformers model and the checkpoint that it saved."""

    shape: str
    model: Any
    folder: Path
    known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> Any:
        """The module with embed_tokens, layers and norm."""
        inner = self.model.model
        return inner.language_model if hasattr(inner, "language_model") else inner

    @cached_property
    def prefix(self) -> str:
        """What stands before the inner names in the model's own parameter names."""
        return "model.language_model." if hasattr(self.model.model, "language_model") else "model."

    def logits(self, tokens, mask=None) -> torch.Tensor:
        tokens = torch.tensor(np.array(tokens)).long()
        mask = torch.ones_like(tokens) if mask is None else torch.tensor(np.array(mask)).long()
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    @_once_a_batch
    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Sum of weighted cross-entropy, computed by torch from transformers' logits."""
        logits = self.logits(batch.tokens_BT, _visible(batch))
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            torch.tensor(np.array(batch.targets_R)).long(),
            reduction="none",
        )
        return (losses * torch.tensor(np.array(batch.weights_R))).sum()


def _visible(batch: Batch) -> np.ndarray:
    """transformers' attention mask of a batch padded on the right with zeros."""
    return (np.array(batch.tokens_BT) != 0).astype(np.int64)


def build_reference(shape: str, folder: Path, encoders: bool = False, seed: int = 0) -> Reference:
    """Make, randomise and save a transformers model of a family shape."""
    torch.manual_seed(seed)
    text = {**SHAPES["e2b" if shape == "text" else shape]}
    text.update(vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB)
    ids = {"image_token_id": 111, "audio_token_id": 114, "video_token_id": 116,
           "boi_token_id": 110, "eoi_token_id": 112, "boa_token_id": 113}  # fmt: skip
    if shape == "text":
        model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**text))
    elif shape == "unified":
        for key in [key for key in text if key.endswith(("_per_layer_input", "_experts"))]:
            del text[key]
        del text["enable_moe_block"], text["moe_intermediate_size"]
        parts = {"vision_config": _UNIFIED_VISION, "audio_config": _UNIFIED_AUDIO}
        parts = parts if encoders else {}
        config = transformers.Gemma4UnifiedConfig(text_config=text, **parts, **ids)
        model = transformers.Gemma4UnifiedForConditionalGeneration(config)
    else:
        large = bool(text["use_bidirectional_attention"])
        own = {"num_hidden_layers": 2, "position_embedding_size": 24}
        own |= {"standardize": large, "use_clipped_linears": not large}
        parts = {"vision_config": {**SMALL_VISION, **own}}
        parts = {**parts, **({} if large else {"audio_config": _AUDIO})} if encoders else {}
        config = transformers.Gemma4Config(text_config=text, **parts, **ids)
        model = transformers.Gemma4ForConditionalGeneration(config)
    _randomize(model)
    model.config._attn_implementation = "eager"
    model.save_pretrained(folder)
    return Reference(shape, model.eval(), folder)


def _randomize(model: torch.nn.Module) -> None:
    stored = model.state_dict()
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, value in [(name, value) for name, value in named if name in stored]:
        noise = torch.randn_like(value)
        with torch.no_grad():
            if name.endswith("layer_scalar"):
                value.copy_(0.9 + 0.05 * noise)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                # Attention is unscaled: norms near H^-1/4 keep scores in softmax's live range.
                value.copy_(value.shape[0] ** -0.25 * (1 + 0.1 * noise))
            elif name.endswith(("put_min", "put_max")):
                # Few values are near a bound, where the gradient jumps with the last bit.
                # Some of the values are beyond.
                value.copy_((2.8 + 0.1 * noise) * (1 if name.endswith("max") else -1))
            elif name.endswith("bias"):
                value.copy_(0.1 * noise)
            elif "norm" in name or name.endswith("scale") or "_ln" in name:
                value.copy_(1 + 0.1 * noise)
            elif isinstance(value, torch.nn.Parameter) and value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)


def add_tokenizer(folder: Path) -> None:
    """Tokenizer files, which transformers' model does not save and `load` wants."""
    kept = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    texts = [chr(i) * 3 for i in range(97, 123)]
    build_tiny(folder, texts, vocab_size=420)
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def add_dead_kv(source: Path, folder: Path, first_shared: int, kinds: list[str]) -> int:
    """A copy of a checkpoint in the shape of Google's originals: dead K/V on shared layers."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    prefix = "model.language_model." if any("language_model" in k for k in weights) else "model."
    added = 0
    for layer in range(first_shared, len(kinds)):
        twin = max(i for i in range(first_shared) if kinds[i] == kinds[layer])
        for part in ("k_proj", "v_proj", "k_norm"):
            like = weights[f"{prefix}layers.{twin}.self_attn.{part}.weight"]
            weights[f"{prefix}layers.{layer}.self_attn.{part}.weight"] = torch.randn_like(like)
            added += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return added


def as_google_writes(config: dict) -> dict:
    """A config.json in Google's style, from one in transformers' style of today."""
    config = json.loads(json.dumps(config))
    text = config.get("text_config", config)
    layers = text.pop("per_layer_config", None)
    if layers is not None:
        full = next(iter(layers.values()))
        text["global_head_dim"] = full["head_dim"]
        text["num_global_key_value_heads"] = full.get("num_key_value_heads")
    return config


def random_batch(T: int = 60, B: int = 2, padded: bool = False, seed: int = 0) -> Batch:
    """Next-token batch over ordinary ids; padded rows end in zeros that are no targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(120, VOCAB, (B, T))
    weights = (rng.random((B, T)) < 0.7).astype(np.float32)
    if padded:
        tokens[0, T // 2 :], weights[0, T // 2 :] = 0, 0
    return Batch.from_tokens(mx.array(tokens), mx.array(weights))


@_once_a_batch
def reference_grads(reference: Reference, batch: Batch) -> dict[str, np.ndarray]:
    """Gradient of the loss sum for every parameter of the language model, under inner names."""
    reference.model.zero_grad()
    reference.loss_sum(batch).backward()
    grads = {}
    for name, parameter in reference.model.named_parameters():
        if name.startswith(reference.prefix):
            grads[name.removeprefix(reference.prefix)] = parameter.grad
    return {
        name: (
            np.zeros(tuple(reference.text.get_parameter(name).shape)) if g is None else g.numpy()
        )
        for name, g in grads.items()
    }


def inner_grads(grads: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """Our gradients under the reference's inner names: experts' gate and up are one tensor."""
    inner: dict[str, np.ndarray] = {}
    for name, grad in grads.items():
        short = name.removeprefix("language_model.").removeprefix("model.")
        inner[short] = np.array(grad)
    for name in [name for name in inner if name.endswith("switch_glu.gate_proj.weight")]:
        base = name.removesuffix("switch_glu.gate_proj.weight")
        gate, up = inner.pop(name), inner.pop(f"{base}switch_glu.up_proj.weight")
        inner[base + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        inner[base + "down_proj"] = inner.pop(f"{base}switch_glu.down_proj.weight")
    return inner


def table_grad(rows_grad: mx.array, tokens_BT: mx.array, vocab_size: int) -> np.ndarray:
    """Gradients of gathered PLE rows, added up per row of the table."""
    table = np.zeros((vocab_size, int(np.prod(rows_grad.shape[2:]))), np.float64)
    np.add.at(
        table, np.array(tokens_BT).reshape(-1), np.array(rows_grad).reshape(-1, table.shape[1])
    )
    return table
