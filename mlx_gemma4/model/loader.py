"""A checkpoint folder or Hub id -> a backbone with exactly the weights that Gemma 4 has.

Upstream builds the modules; here they lose the K/V projections and norms of layers that share
keys and values (and the PLE table, see ple.py), and then every stored tensor must find its place
and every parameter its tensor. Only dead K/V weights of shared layers are dropped, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError, damaged, listing
from .capability import Verdict, inspect_backbone
from .checkpoint import (
    StoredTensor,
    load_tensors,
    mismatches,
    read_index,
    read_rows,
    rows_at_once,
    shapes_of,
)
from .encoders import build_with_encoders
from .kv_store import apply_kv_store
from .names import (
    DEAD_KV,
    PLE_TABLE,
    encoder_of,
    flat,
    inner_name,
    is_dead,
    path_of,
    split_experts,
    text_model,
    text_prefix,
)
from .plan import FULL, SLIDING, Plan, read_config
from .ple import DiskEmbedding, PerLayerRows
from .q4_0 import lies_on_grid
from .quantize import (
    Packing,
    Policy,
    own_quantization,
    quantizable,
    quantization_entry,
    quantize_as_stored,
    quantize_modules,
    require_full_precision,
    stored_quantization,
)

_PIECE_BYTES = 1 << 23  # of a weight, in float32, that is quantized at a time


@dataclass
class LoadedBackbone:
    """What `load_backbone` found and made.

    Attributes:
        backbone: mlx-lm's model, or mlx-vlm's where encoders were asked for; frozen, evaluated.
        ple_rows: reads per-layer embeddings from disk; None for a family member without them.
        dropped: stored K/V tensors of shared layers, which no Gemma 4 uses.
        left_out: stored encoder tensors that a text run does not load.
        packings: how weights were quantized while loading, by path. `config` tells it too, as that
            of a checkpoint that is stored so.
    """

    backbone: nn.Module
    plan: Plan
    config: Mapping[str, Any]
    ple_rows: PerLayerRows | None
    verdict: Verdict
    dropped: int
    left_out: int
    packings: Mapping[str, Packing] = field(default_factory=dict)


def load_backbone(
    folder: Path, *, encoders: bool = False, quantize: Policy | None = None
) -> LoadedBackbone:
    """Build and strictly load the backbone of a checkpoint folder.

    Args:
        folder: config.json and safetensors files, single or sharded, plain or MLX-quantized.
        encoders: build vision and audio encoders too, through mlx-vlm. Text runs never import it.
        quantize: what of the language model is quantized as it is read, a piece at a time.

    Raises:
        ModelError: with every missing, unexpected and misshapen tensor listed at once.
        ConfigError: `quantize` for a checkpoint that is quantized.
    """
    config = read_config(folder)
    plan = Plan.from_config(config)
    if quantize:
        require_full_precision(config, folder)
    stored = read_index(folder)
    if encoders and not plan.is_multimodal:
        raise ModelError(
            f"{folder} is text only ({plan.model_type})",
            wanted="a checkpoint with a vision or audio encoder",
            do="load it without encoders",
        )
    backbone = build_backbone(plan, config if encoders else None)
    placement = _Placement(backbone, plan, stored, encoders)
    ple_rows = _take_ple_table(backbone, plan, placement.ple, config)
    weights: dict[str, mx.array] = {}
    if placement.encoders:
        weights = backbone.sanitize(placement.load(placement.encoders))
    shapes = {**placement.text_shapes(), **shapes_of(weights)}
    if quantization := stored_quantization(config):
        quantize_as_stored(backbone, quantization, shapes)
    found = {**dict.fromkeys(placement.unexpected, ()), **shapes}
    if problems := mismatches(found, shapes_of(flat(backbone.parameters()))):
        raise damaged(
            f"{len(problems)} tensors of {folder} do not match config.json:"
            f"{listing(problems, limit=len(problems))}",
            "exactly the tensors that config.json describes",
            "download the checkpoint again, or take its own config.json",
        )
    packings = placement.packings(quantize, backbone) if quantize else {}
    if packings:
        quantize_modules(backbone, packings)
        entry = quantization_entry(packings)
        config = {**config, "quantization": entry, "quantization_config": entry}
    weights.update(placement.text_weights(packings))
    backbone.load_weights(list(weights.items()), strict=False)
    backbone.eval()
    for module in backbone.modules():
        module.freeze(recurse=False)
    mx.eval(backbone.parameters())
    verdict = inspect_backbone(backbone)
    if plan.num_shared and not verdict.native:
        apply_kv_store(backbone)
    dropped, left_out = len(placement.dead), len(placement.left_out)
    return LoadedBackbone(backbone, plan, config, ple_rows, verdict, dropped, left_out, packings)


def build_backbone(plan: Plan, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Upstream's modules for a plan, without K/V projections and norms on shared layers.

    Args:
        config: config.json, to build encoders as well (mlx-vlm); None for text alone (mlx-lm).
    """
    text_args = _text_args(plan)
    if config is not None:
        backbone = build_with_encoders(plan, text_args, config)
    else:
        from mlx_lm.models import gemma4, gemma4_text

        if plan.is_multimodal:
            outer = {"model_type": "gemma4", "vocab_size": plan.vocab_size}
            outer["text_config"] = text_args
            backbone = gemma4.Model(gemma4.ModelArgs.from_dict(outer))
        else:
            backbone = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(text_args))
    for layer_plan, layer in zip(plan.layers, text_model(backbone).layers):
        if layer_plan.shares_kv:
            for name in DEAD_KV:
                layer.self_attn.pop(name, None)
    return backbone


def _text_args(plan: Plan) -> dict[str, Any]:
    """The plan in the words of mlx-lm's and mlx-vlm's text configs; nothing left to defaults."""
    by_kind = {layer.kind: layer for layer in plan.layers}
    sliding, full = by_kind.get(SLIDING, plan.layers[0]), by_kind.get(FULL, plan.layers[0])
    return {
        "model_type": "gemma4_text",
        "hidden_size": plan.hidden_size,
        "num_hidden_layers": len(plan.layers),
        "intermediate_size": plan.layers[0].mlp_width,
        "num_attention_heads": plan.num_heads,
        "head_dim": sliding.head_dim,
        "global_head_dim": full.head_dim,
        "rms_norm_eps": plan.rms_norm_eps,
        "vocab_size": plan.vocab_size,
        "vocab_size_per_layer_input": plan.ple.vocab_size if plan.ple else plan.vocab_size,
        "num_key_value_heads": sliding.num_kv_heads,
        "num_global_key_value_heads": full.num_kv_heads,
        "num_kv_shared_layers": plan.num_shared,
        "hidden_size_per_layer_input": plan.ple.width if plan.ple else 0,
        "rope_traditional": False,
        "rope_parameters": {kind: dict(values) for kind, values in plan.rope.items()},
        "sliding_window": sliding.window or plan.max_positions,
        "max_position_embeddings": plan.max_positions,
        "attention_k_eq_v": full.k_eq_v,
        "final_logit_softcapping": plan.softcap,
        "use_double_wide_mlp": plan.layers[-1].mlp_width != plan.layers[0].mlp_width,
        "use_bidirectional_attention": plan.bidirectional,
        "enable_moe_block": plan.moe is not None,
        "num_experts": plan.moe.num_experts if plan.moe else None,
        "top_k_experts": plan.moe.top_k if plan.moe else None,
        "moe_intermediate_size": plan.moe.width if plan.moe else None,
        "layer_types": [layer.kind for layer in plan.layers],
        "tie_word_embeddings": plan.tied,
    }


class _Placement:
    """Where each stored tensor goes: one pass over the keys, nothing read yet."""

    def __init__(
        self, backbone: nn.Module, plan: Plan, stored: Mapping[str, StoredTensor], encoders: bool
    ):
        self.stored = stored
        self.text: dict[str, list[str]] = {}
        self.encoders: list[str] = []
        self.dead: list[str] = []
        self.left_out: list[str] = []
        self.unexpected: list[str] = []
        self.ple: dict[str, StoredTensor] = {}
        prefix = text_prefix(backbone)
        inner_names: set[str] = set()
        for key, tensor in stored.items():
            inner = inner_name(key, plan)
            if inner is None and encoder_of(key, plan) is None:
                self.unexpected.append(key)
            elif inner is None:
                (self.encoders if encoders else self.left_out).append(key)
            elif inner in inner_names:
                self.unexpected.append(f"{key} (stored under another name too)")
            elif is_dead(inner, plan):
                self.dead.append(key)
            elif inner.startswith(PLE_TABLE + ".") and plan.ple:
                self.ple[inner.removeprefix(PLE_TABLE + ".")] = tensor
            else:
                self.text[key] = [path_of(name, prefix) for name in split_experts(inner)]
            inner_names.add(inner or key)

    def load(self, keys: Iterable[str]) -> dict[str, mx.array]:
        return load_tensors({key: self.stored[key] for key in keys})

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for key, names in self.text.items():
            shape = self.stored[key].shape
            if len(names) == 2:
                shape = (shape[0], shape[1] // 2, *shape[2:])
            shapes |= dict.fromkeys(names, shape)
        return shapes

    def packings(self, policy: Policy, backbone: nn.Module) -> dict[str, Packing]:
        """How the weights are packed that a policy quantizes, by path."""
        prefix = text_prefix(backbone)
        columns = {path_of(name, prefix): size for name, size in quantizable(backbone).items()}
        found: dict[str, Packing] = {}
        for key, names in self.text.items():
            look = partial(lies_on_grid, self.stored[key])
            if packing := policy.packing(names[0], columns.get(names[0]), look):
                found |= dict.fromkeys((name.removesuffix(".weight") for name in names), packing)
        return found

    def text_weights(self, packings: Mapping[str, Packing]) -> dict[str, mx.array]:
        """The weights by name; those with a packing are read and packed before the next is."""
        weights: dict[str, mx.array] = {}
        plain = {}
        for key, names in self.text.items():
            paths = [name.removesuffix(".weight") for name in names]
            if paths[0] in packings:
                weights.update(_packed(self.stored[key], paths, packings[paths[0]]))
            else:
                plain[key] = names
        arrays = self.load(plain)
        for key, names in plain.items():
            parts = mx.split(arrays[key], len(names), axis=1) if len(names) > 1 else [arrays[key]]
            weights.update(zip(names, parts))
        return weights


def _packed(
    stored: StoredTensor, paths: list[str], packing: Packing
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of the modules at some paths, of one stored weight that is split among them."""
    step, pieces = rows_at_once(stored.shape, _PIECE_BYTES), []
    for start in range(0, stored.shape[0], step):
        rows = read_rows(stored, start, min(start + step, stored.shape[0]))
        parts = mx.split(rows, len(paths), axis=1) if len(paths) > 1 else [rows]
        pieces.append([array for part in parts for array in packing.pack(part)])
        mx.eval(pieces[-1])
    joined = [mx.concatenate(list(arrays)) for arrays in zip(*pieces)]
    mx.eval(joined)
    del pieces, rows, parts
    mx.clear_cache()
    names = [f"{path}.{last}" for path in paths for last in packing.stored((1, 1), "")]
    return zip(names, joined)


def _take_ple_table(
    backbone: nn.Module, plan: Plan, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> PerLayerRows | None:
    """Put a reader of the stored table in the place of the backbone's own."""
    if plan.ple is None:
        return None
    if "weight" not in stored:
        wanted = "the table of per-layer embeddings that config.json announces"
        raise damaged(f"the checkpoint has no {PLE_TABLE}.weight", wanted)
    path = text_prefix(backbone) + PLE_TABLE
    own = own_quantization(config.get("quantization") or {}, path)
    rows = PerLayerRows(stored, plan, own["mode"])
    text_model(backbone).embed_tokens_per_layer = DiskEmbedding(rows)
    return rows
