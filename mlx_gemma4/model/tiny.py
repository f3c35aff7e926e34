"""A small Gemma 4 checkpoint, built on the spot.

It has every feature of its family member at a size that trains on a CPU in seconds, in the
Hugging Face layout, with a tokenizer trained from the texts that are given and a chat template.
Weights are random and no norm or scalar is 1, so that a forgotten one shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..storage import new_file, write_json, write_text
from .loader import build_backbone
from .names import PLE_TABLE, flat, text_prefix
from .plan import FULL, SLIDING, Plan

# Ids below 110 are the released tokenizer's; the rest of them stay unused here.
_SPECIAL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>",
    46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>", 49: "<tool_call|>",
    50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
    110: "<|image>", 111: "<|image|>", 112: "<image|>",
    113: "<|audio>", 114: "<|audio|>", 115: "<audio|>", 116: "<|video|>",
}  # fmt: skip
_FIRST_FREE = 117

CHAT_TEMPLATE = Path(__file__).with_name("tiny_chat_template.jinja").read_text()

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": 32,
    "layer_types": [SLIDING, SLIDING, FULL] * 2,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": None,
    "hidden_size_per_layer_input": 8,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {
            "rope_type": "proportional",
            "rope_theta": 1000000.0,
            "partial_rotary_factor": 0.25,
        },
    },
}
"""The text config: every feature of E2B, in six layers."""


_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 256,
    "use_clipped_linears": False, "standardize": False,
}  # fmt: skip
_AUDIO: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32,
    "subsampling_conv_channels": [128, 8],
}  # fmt: skip
_PROCESSOR: dict[str, Any] = {
    "image_processor": {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70},
    "feature_extractor": {"sampling_rate": 16_000, "feature_size": 128},
}


def build_tiny(
    folder: Path,
    texts: Iterable[str],
    *,
    text: Mapping[str, Any] = TEXT,
    model_type: str = "gemma4",
    vocab_size: int = 1024,
    seed: int = 0,
    encoders: bool = False,
) -> Path:
    """Write a checkpoint: config.json, model.safetensors, tokenizer files, chat template.

    Args:
        folder: made if it is not there.
        texts: what the tokenizer is trained on.
        text: text_config, but for the vocabulary and the types.
        model_type: gemma4 or gemma4_unified.
        vocab_size: tokens, of which 373 are special or bytes.
        seed: for the weights.
        encoders: with an image and an audio encoder.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _save_tokenizer(folder, texts, vocab_size)
    config = _config(text, model_type, vocab_size)
    if encoders:
        config |= {"vision_config": _VISION, "audio_config": _AUDIO}
        write_json(folder / "processor_config.json", _PROCESSOR)
    write_json(folder / "config.json", config)
    write_text(folder / "generation_config.json", json.dumps({"eos_token_id": [1, 106]}) + "\n")
    plan = Plan.from_config(config)
    backbone = build_backbone(plan, config if encoders else None)
    randomize(backbone, seed)
    save_weights(backbone, plan, folder)
    return folder


def save_weights(backbone: nn.Module, plan: Plan, folder: Path) -> None:
    """Write model.safetensors under transformers' names, whole or not at all.

    A PLE table that is not in the backbone is taken from the file that is replaced.
    """
    prefix, weights = text_prefix(backbone), flat(backbone.parameters())
    outer = "model.language_model." if plan.is_multimodal else "model."
    stored = {
        outer + name.removeprefix(prefix) if name.startswith(prefix) else "model." + name: (
            value.moveaxis(-1, 1) if "conv" in name and value.ndim > 2 else value  # as torch has it
        )
        for name, value in weights.items()
    }
    for name in [name for name in stored if name.endswith("switch_glu.gate_proj.weight")]:
        base = name.removesuffix("switch_glu.gate_proj.weight")
        parts = [stored.pop(f"{base}switch_glu.{part}_proj.weight") for part in ("gate", "up")]
        stored[base + "gate_up_proj"] = mx.concatenate(parts, axis=1)
        stored[base + "down_proj"] = stored.pop(base + "switch_glu.down_proj.weight")
    table = f"{outer}{PLE_TABLE}.weight"
    if plan.ple and table not in stored:
        previous = mx.load(str(folder / "model.safetensors"))
        assert isinstance(previous, dict)
        stored[table] = previous[table]
    mx.eval(stored)
    with new_file(folder / "model.safetensors") as partial:
        mx.save_safetensors(str(partial), stored, {"format": "pt"})


def _config(text: Mapping[str, Any], model_type: str, vocab_size: int) -> dict[str, Any]:
    kind = "Gemma4Unified" if model_type == "gemma4_unified" else "Gemma4"
    own = {"model_type": f"{model_type}_text", "vocab_size": vocab_size}
    if "hidden_size_per_layer_input" in text:
        own["vocab_size_per_layer_input"] = vocab_size
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": model_type,
        "text_config": {**text, **own},
        "vision_config": None,
        "audio_config": None,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "eos_token_id": [1, 106],
        "boi_token_id": 110,
        "image_token_id": 111,
        "eoi_token_id": 112,
        "boa_token_id": 113,
        "audio_token_id": 114,
        "eoa_token_index": 115,
        "video_token_id": 116,
    }


def randomize(backbone: nn.Module, seed: int) -> None:
    """Give every parameter a random value near that of a trained model."""
    keys = iter(mx.random.split(mx.random.key(seed), 4096))

    def value(name: str, old: mx.array) -> mx.array:
        noise = mx.random.normal(old.shape, key=next(keys))
        if name.endswith("layer_scalar"):
            return 0.9 + 0.05 * noise
        if name.endswith(("put_min", "put_max")):  # clip bounds of encoders
            return mx.array(10.0 if name.endswith("max") else -10.0)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # Attention is unscaled: norms near H^-1/4 keep scores in softmax's live range.
            return old.shape[0] ** -0.25 * (1 + 0.1 * noise)
        if "norm" in name or "scale" in name:
            return 1 + 0.1 * noise
        return noise * old.shape[-1] ** -0.5 * (1 if "embed_tokens" in name else 0.7)

    backbone.load_weights([(n, value(n, v)) for n, v in flat(backbone.parameters()).items()])


def _save_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> int:
    """Train and save a byte-fallback BPE in Gemma's manner; returns the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    space = normalizers.Replace(" ", "▁")
    splits = (("\n", "isolated"), ("▁", "merged_with_next"))
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(*split) for split in splits])
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = space, words
    reserved = [_SPECIAL.get(i, f"<unused{i}>") for i in range(_FIRST_FREE)]
    reserved += [f"<0x{byte:02X}>" for byte in range(256)]
    learner.train_from_iterator(
        texts, BpeTrainer(vocab_size=vocab_size - len(reserved), show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    tokens = reserved + sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = space, words
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL.values()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")},
    ).save_pretrained(folder)
    return len(tokens)
