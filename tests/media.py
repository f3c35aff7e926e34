"""Rows with images and audio for the small models, as the models' processors make them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from helpers import UNIFIED_VISION

import mlx_gemma4 as g4
from mlx_gemma4.model.loader import build_backbone
from mlx_gemma4.model.names import flat
from mlx_gemma4.model.plan import Plan

IDS = {"image": (110, 111, 112), "audio": (113, 114, 115), "video": (110, 116, 112)}
"""Opener, token and closer of each kind in the small models."""
TYPES = {"image": 1, "video": 2, "audio": 3}

IMAGES = [(6, 6), (3, 4), (2, 3)]
"""Columns and rows of soft tokens; the first has more than the window of the small models."""
FRAMES = [97, 62]
"""Frames of mel bins of two recordings."""


def image_inputs(sizes: list[tuple[int, int]], unified: bool, seed: int = 0) -> dict[str, Any]:
    """pixel_values and image_position_ids: 4 x 4 pixels a patch, 3 x 3 patches a soft token."""
    random, side = np.random.default_rng(seed), 1 if unified else 3
    longest = max(x * y for x, y in sizes) * side**2 + (3 if unified else 18)
    pixels = random.random((len(sizes), longest, 48)).astype(np.float32)
    ids = np.full((len(sizes), longest, 2), -1)
    for i, (columns, rows) in enumerate(sizes):
        y, x = np.divmod(np.arange(columns * rows * side**2), columns * side)
        ids[i, : len(x)] = np.stack([x, y], axis=-1)
        pixels[i, len(x) :] = 0
    return {"pixel_values": pixels, "image_position_ids": ids}


def audio_inputs(frames: list[int], unified: bool, seed: int = 0) -> dict[str, Any]:
    """input_features and input_features_mask: 128 mel bins, or in the unified model 16 samples."""
    random = np.random.default_rng(seed)
    if unified:
        frames = [-(-n // 4) for n in frames]
    shape = len(frames), max(frames) + 3, 16 if unified else 128
    mask = np.arange(shape[1]) < np.array(frames)[:, None]
    features = random.normal(size=shape).astype(np.float32)
    return {"input_features": features * mask[..., None], "input_features_mask": mask}


def rows_with(rows: list[list[Any]], vocab: int, unified: bool, seed: int = 0) -> dict[str, Any]:
    """Token ids, weights, token types and encoder inputs of rows.

    Args:
        rows: of numbers, that many text tokens, and media: ("image", (columns, rows)), ("video",
            the same of one frame), ("audio", frames). Shorter rows are padded on the right.
    """
    random = np.random.default_rng(seed)
    tokens, types, images, videos, recordings = [], [], [], [], []
    for row in rows:
        ids: list[int] = []
        kinds: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += random.integers(120, vocab, part).tolist()
                kinds += [0] * part
                continue
            kind, what = part
            if kind != "audio":
                count = what[0] * what[1]
                (images if kind == "image" else videos).append(what)
            else:
                count = -(-what // 4)
                recordings.append(what)
            opener, token, closer = IDS[kind]
            ids += [opener, *[token] * count, closer]
            kinds += [0, *[TYPES[kind]] * count, 0]
        tokens.append(ids)
        types.append(kinds)
    T = max(map(len, tokens))
    weights = np.zeros((len(rows), T), np.float32)
    for b, ids in enumerate(tokens):
        places = np.array(ids)
        weights[b, : len(ids)] = (random.random(len(ids)) < 0.7) & (places >= 120)
    inputs = image_inputs(images, unified, seed) if images else {}
    if videos:
        frames = image_inputs(videos, unified, seed + 1)
        inputs["pixel_values_videos"] = frames["pixel_values"]
        inputs["video_position_ids"] = frames["image_position_ids"]
    inputs |= audio_inputs(recordings, unified, seed) if recordings else {}
    return {
        "tokens": np.array([ids + [0] * (T - len(ids)) for ids in tokens]),
        "weights": weights,
        "mm_token_type_ids": np.array([kinds + [0] * (T - len(kinds)) for kinds in types]),
        **inputs,
    }


ROWS: dict[str, list[list[Any]]] = {
    "image": [[7, ("image", IMAGES[0]), 40]],
    "images": [[5, ("image", IMAGES[1]), 3, ("image", IMAGES[0]), 30]],
    "rows": [
        [9, ("image", IMAGES[0]), 20],
        [3, ("image", IMAGES[2]), 4, ("image", IMAGES[1]), 36],
    ],
    "audio": [[8, ("audio", FRAMES[0]), 25], [4, ("audio", FRAMES[1]), 38]],
    "both": [[5, ("image", IMAGES[1]), 6, ("audio", FRAMES[0]), 30]],
    "video": [[4, ("video", IMAGES[1]), 3, ("image", IMAGES[2]), 2, ("video", IMAGES[1]), 30]],
    "padded": [[50, ("image", IMAGES[0]), 20], [5, ("image", IMAGES[1]), 12]],
}
"""Rows by what they show; 26B and 31B have no audio."""


VISION = {
    "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 24,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16,
    "subsampling_conv_channels": [128, 8],
}  # fmt: skip
UNIFIED_AUDIO = {
    "model_type": "gemma4_unified_audio", "audio_samples_per_token": 16, "audio_embed_dim": 16,
}  # fmt: skip


def build_with_media(source: Path, folder: Path, shape: str) -> Path:
    """A copy of a small checkpoint with encoders whose every value is away from its start."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    large = shape in ("moe", "dense")
    if shape == "unified":
        config |= {"vision_config": UNIFIED_VISION, "audio_config": UNIFIED_AUDIO}
    else:
        own = {"use_clipped_linears": not large, "standardize": large}
        config |= {"vision_config": VISION | own, "audio_config": None if large else AUDIO}
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(3)
    stored = mx.load(str(folder / "model.safetensors"))
    for name, old in flat(build_backbone(Plan.from_config(config), config).parameters()).items():
        if name.startswith("language_model."):
            continue
        noise = random.normal(size=old.shape)
        if name.endswith(("put_min", "put_max")):
            value = (2.8 + 0.1 * noise) * (1 if name.endswith("max") else -1)
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif "norm" in name or name.endswith("scale") or "_ln" in name:
            value = 1 + 0.1 * noise
        else:
            value = noise * old[0].size ** -0.5
        if "conv" in name and old.ndim > 2:
            value = np.moveaxis(value, -1, 1)  # as torch has it
        stored["model." + name] = mx.array(np.asarray(value, np.float32))
    mx.eval(stored)  # it is read from the file that is written
    mx.save_safetensors(str(folder / "model.safetensors"), stored, {"format": "pt"})
    return folder


PROCESSOR = {
    "image_processor": {
        "patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70, "do_normalize": False,
        "do_resize": True, "do_rescale": True, "resample": 3, "rescale_factor": 1 / 255,
    },
    "image_seq_length": 70,
    "feature_extractor": {"feature_size": 128, "sampling_rate": 16000, "dither": 0.0},
}  # fmt: skip
"""The processor_config.json of the small models; the unified one has patches of 2 x 2."""


def add_processor(folder: Path, unified: bool = False) -> Path:
    """Give a small checkpoint the settings of images and audio."""
    own = {"patch_size": 2, "pooling_kernel_size": 2} if unified else {}
    settings = PROCESSOR | {"image_processor": PROCESSOR["image_processor"] | own}
    if unified:
        settings["feature_extractor"] = {"audio_samples_per_token": 16, "sampling_rate": 16000}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Any:
    """A PIL image of coloured noise in large grains."""
    from PIL import Image

    random = np.random.default_rng(seed)
    grains = random.integers(0, 256, (5, 7, 4), np.uint8)
    image = Image.fromarray(grains, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def sound(count: int, seed: int = 0) -> np.ndarray:
    """Samples at 16 kHz: two tones that rise and fall, and noise."""
    random, at = np.random.default_rng(seed), np.arange(count) / 16000
    tones = [np.sin(2 * np.pi * f * at) for f in random.uniform(80, 4000, 2)]
    swell = np.sin(2 * np.pi * 3 * at + seed)
    return (0.3 * swell * sum(tones) + 0.02 * random.normal(size=count)).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16000, bits: int = 16) -> bytes:
    """A WAV file of whole numbers, as Python's own module writes it; (N,) or (N, channels)."""
    import io
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(bits // 8)
        out.setframerate(rate)
        whole = np.round(samples * (2.0 ** (bits - 1) - 1)).astype("<i4")
        if bits == 8:
            out.writeframes((whole + 128).astype(np.uint8).tobytes())
        else:
            parts = np.ascontiguousarray(whole).view(np.uint8).reshape(-1, 4)
            out.writeframes(parts[:, : bits // 8].tobytes())
    return file.getvalue()


def batch_with(inputs: dict[str, Any], segments: Any = None) -> g4.Batch:
    """The batch of `rows_with`."""
    media = {name: inputs[name] for name in inputs if name not in ("tokens", "weights")}
    return g4.Batch.from_tokens(inputs["tokens"], inputs["weights"], segments, **media)
