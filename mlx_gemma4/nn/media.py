"""Images and audio of a batch: through mlx-vlm's encoders, to the places of their tokens.

The encoders' modules are upstream's; what joins them is here. mlx-vlm's own image encoder counts
soft tokens on the host in the middle of a pass, which no compiled step can do, looks positions up
by a one-hot product over its whole table, and forms all scores of its attention at once. Its audio
encoder is right in the blocks; the reach of their attention is made here, since versions differ.

A soft token is what an encoder gives for one image, video or audio token of the text.

Shapes: B rows, T tokens, D model; I images, S patches of an image, A recordings, F frames of one,
C values of a patch or frame, N heads, H head dim, E encoder width, K soft tokens of all media.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CapabilityError, DataError
from ..model.names import text_model
from ..model.plan import MEDIA, Plan
from .attention import attention
from .dropout import draw_keys, set_keys
from .mask import AttentionMask
from .remat import rematerialized, with_parameters


@dataclass(frozen=True)
class Media:
    """What a batch has beside text; the names and shapes of inputs are transformers'.

    Media of a kind are in the order in which their tokens stand in the rows.

    Attributes:
        pixel_values: images in patches (I, S, C), from 0 to 1.
        image_position_ids: (x, y) of each patch (I, S, 2); (-1, -1) fills up an image.
        pixel_values_videos, video_position_ids: the same of the frames of videos.
        input_features: recordings (A, F, C): mel bins, or samples in the unified member.
        input_features_mask: (A, F), which frames are of the recording.
        embeddings_KD: soft tokens instead of encoder inputs: of images, then videos, then audio.
        places_BT: what embeds a position, of B * T tokens and then the soft tokens.
    """

    pixel_values: mx.array | None = None
    image_position_ids: mx.array | None = None
    pixel_values_videos: mx.array | None = None
    video_position_ids: mx.array | None = None
    input_features: mx.array | None = None
    input_features_mask: mx.array | None = None
    embeddings_KD: mx.array | None = None
    places_BT: mx.array | None = None

    @classmethod
    def of(cls, **inputs: Any) -> Media | None:
        """Encoder inputs of any array type; None if there are none.

        Raises:
            DataError: an input without its positions or its mask, or of another shape.
        """
        given = {name: mx.array(value) for name, value in inputs.items() if value is not None}
        if not given:
            return None
        media = cls(**given)
        for name, other in _PAIRS.items():
            shapes = [given[key].shape if key in given else None for key in (name, other)]
            values, beside = (shape or () for shape in shapes)
            pair = (2,) if other.endswith("ids") else ()
            if (values or beside) and (len(values) != 3 or beside != (*values[:2], *pair)):
                raise DataError(
                    f"{name} of shape {shapes[0]} with {other} of shape {shapes[1]}",
                    wanted="both, of one shape but for the last axis",
                    do="pass what the model's processor returns",
                )
        return media

    def fields(self) -> dict[str, mx.array]:
        """What `Media(**fields)` is made from."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def after(self, done: list[mx.array]) -> Media:
        """The same media, which no encoder sees before `done` is computed."""
        names = list(self.fields())
        return replace(self, **dict(zip(names, mx.depends(list(self.fields().values()), done))))

    def placed(self, backbone: nn.Module, plan: Plan, tokens_BT: mx.array) -> Media:
        """With `places_BT`, by the tokens of the batch.

        Raises:
            CapabilityError: the model was loaded without the encoder.
            DataError: as many soft tokens as there are tokens of a kind, and not others.
        """
        if self.places_BT is not None:
            return self
        tokens = np.array(tokens_BT).reshape(-1)
        ids = plan.media_tokens
        where = {kind: np.flatnonzero(tokens == ids.get(kind, -1)) for kind in MEDIA}
        if self.embeddings_KD is None:
            found = self._soft_tokens(backbone)
        else:
            where = {"media": np.concatenate([*where.values()])}
            found = {"media": (np.arange(len(self.embeddings_KD)), 0)}
        places, first = np.arange(tokens.size), tokens.size
        for kind, positions in where.items():
            slots, count = found.get(kind, (np.arange(0), 0))
            if len(slots) != len(positions):
                raise DataError(
                    f"{len(positions)} {kind} tokens and {len(slots)} embeddings of {kind}",
                    wanted="as many of one as of the other, and text after the last",
                    do="expand placeholders as the model's processor does",
                )
            places[positions] = first + slots
            first += count
        return replace(self, places_BT=mx.array(places.reshape(tokens_BT.shape).astype(np.int32)))

    def _soft_tokens(self, backbone: nn.Module) -> dict[str, tuple[np.ndarray, int]]:
        """By kind which soft tokens are real, and how many an encoder gives."""
        found: dict[str, tuple[np.ndarray, int]] = {}
        for kind, ids in (("image", self.image_position_ids), ("video", self.video_position_ids)):
            if ids is not None:
                area = _pooling(_part(backbone, "embed_vision", kind)) ** 2
                images, slots = ids.shape[0], ids.shape[1] // area
                counts = (np.array(ids).min(axis=2) >= 0).sum(axis=1, keepdims=True) // area
                found[kind] = np.flatnonzero(np.arange(slots) < counts), images * slots
        if self.input_features_mask is not None:
            _part(backbone, "embed_audio", "audio")
            mask = np.array(self.input_features_mask).astype(bool)
            mask = mask[:, ::4] if hasattr(backbone, "audio_tower") else mask
            found["audio"] = np.flatnonzero(mask), mask.size
        return found


_PAIRS = {
    "pixel_values": "image_position_ids",
    "pixel_values_videos": "video_position_ids",
    "input_features": "input_features_mask",
}


def _part(backbone: nn.Module, name: str, kind: str) -> nn.Module:
    if getattr(backbone, name, None) is None:
        raise CapabilityError(
            f"a batch with {kind} inputs, and a model without {name}",
            wanted="a checkpoint with that encoder, loaded with it",
            do="load it with g4.load(path, encoders=True)",
        )
    return backbone


def _pooling(backbone: Any) -> int:
    """The side of the square of patches that become one soft token."""
    return backbone.vision_tower.pooling_kernel_size if hasattr(backbone, "vision_tower") else 1


def with_media(backbone: Any, media: Media, hidden_BTD: mx.array, **options: Any) -> mx.array:
    """The embeddings of a batch, with those of its media in their places.

    Args:
        options: remat and key, as `StepOptions` says of the text's layers; `attend`, which takes
            queries, keys, values and a mask.
    """
    if media.places_BT is None:
        raise ValueError("the media of this batch have no places: batch.with_ple_rows(gemma)")
    soft = [part.astype(hidden_BTD.dtype) for part in _encoded(backbone, media, **options)]
    return mx.concatenate([hidden_BTD.flatten(0, 1), *soft])[media.places_BT]


def _encoded(
    backbone: Any,
    media: Media,
    remat: bool = False,
    attend: Callable[..., mx.array] = attention,
    key: mx.array | None = None,
) -> list[mx.array]:
    """The soft tokens of images, videos and audio, (slots, D) each, padding among them."""
    if media.embeddings_KD is not None:
        return [media.embeddings_KD]
    images = partial(_image_features, attend=attend)
    kinds: list[tuple[Callable[..., mx.array], str, mx.array | None, mx.array | None]] = [
        (images, "embed_vision", media.pixel_values, media.image_position_ids),
        (images, "embed_vision", media.pixel_values_videos, media.video_position_ids),
        (_audio_features, "embed_audio", media.input_features, media.input_features_mask),
    ]
    keys = [None] * len(kinds) if key is None else mx.random.split(key, len(kinds))
    soft = []
    for (features, projector, values, beside), own_key in zip(kinds, keys):
        if values is not None:
            run = partial(_through, remat=remat, key=own_key)
            hidden = features(backbone, values, beside, run)
            hidden = run([getattr(backbone, projector)], lambda module, x: module(x), hidden)
            soft.append(hidden.flatten(0, 1))
    return soft


def encoded(backbone: Any, media: Media) -> Media:
    """The media with their soft tokens computed: for a batch that trains no encoder."""
    kept = media.embeddings_KD
    if kept is None:
        found = media._soft_tokens(backbone)
        real = zip(_encoded(backbone, media), (slots for slots, _ in found.values()))
        kept = mx.concatenate([soft[mx.array(slots)] for soft, slots in real])
    return Media(embeddings_KD=mx.stop_gradient(kept))


def _through(
    layers: Iterable[nn.Module],
    call: Callable[[Any, mx.array], mx.array],
    hidden: mx.array,
    remat: bool,
    key: mx.array | None,
) -> mx.array:
    """`call(layer, hidden)` of layer after layer, each run again in the backward pass if asked."""
    layers = list(layers)
    keys = [None] * len(layers) if key is None else mx.random.split(key, len(layers))
    for layer, own_key in zip(layers, keys):

        def run(drawn: mx.array | None, hidden: mx.array, layer: nn.Module = layer) -> mx.array:
            set_keys(layer, drawn)
            return call(layer, hidden)

        drawn, parameters = draw_keys(layer, own_key), layer.trainable_parameters()
        if remat:
            again = rematerialized(with_parameters(layer, parameters, run))
            hidden = again(parameters, drawn, hidden)
        else:
            hidden = run(drawn, hidden)
    return hidden


# ---------------------------------------------------------------- images


def _image_features(
    backbone: Any,
    pixels_ISC: mx.array,
    at_IS2: mx.array,
    run: Callable[..., mx.array],
    attend: Callable[..., mx.array],
) -> mx.array:
    """(I, slots, E): the features of each square of patches, in reading order."""
    if not hasattr(backbone, "vision_tower"):  # the unified member has no encoder
        embedder = backbone.vision_embedder
        pixels_ISC = pixels_ISC.astype(embedder.pos_embedding.dtype)
        return run([embedder], lambda module, x: module(x, at_IS2), pixels_ISC)
    encoder = backbone.vision_tower
    embedder, config = encoder.patch_embedder, encoder.config
    padding_IS = (at_IS2 < 0).all(axis=-1)
    at_IS2 = mx.maximum(at_IS2, 0)
    table = embedder.position_embedding_table
    positions = table[0][at_IS2[..., 0]] + table[1][at_IS2[..., 1]]
    hidden_ISE = embedder.input_proj((2 * (pixels_ISC - 0.5)).astype(table.dtype))
    hidden_ISE = hidden_ISE + mx.where(padding_IS[..., None], 0, positions)

    theta = config.rope_parameters["rope_theta"]
    layer = partial(
        _image_layer,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        turns=_turns(at_IS2, config.head_dim, theta, hidden_ISE.dtype),
        # All patches of an image attend to each other, and padding to padding.
        mask=AttentionMask(
            padding_IS.shape[1],
            segments_BT=padding_IS.astype(mx.int32),
            images_BT=mx.zeros(padding_IS.shape, mx.int32),
        ),
        attend=attend,
    )
    hidden_ISE = run(encoder.encoder.layers, layer, hidden_ISE)

    pooled = _pooled(hidden_ISE, at_IS2, padding_IS, encoder.pooling_kernel_size)
    pooled = pooled.astype(hidden_ISE.dtype).astype(mx.float32) * config.hidden_size**0.5
    if config.standardize:
        pooled = (pooled - encoder.std_bias) * encoder.std_scale
    return pooled.astype(hidden_ISE.dtype)


def _image_layer(
    layer: Any,
    hidden_ISE: mx.array,
    *,
    head_dim: int,
    eps: float,
    turns: tuple[mx.array, mx.array],
    mask: AttentionMask,
    attend: Callable[..., mx.array],
) -> mx.array:
    attn = layer.self_attn
    normed = layer.input_layernorm(hidden_ISE)

    def heads(projection: nn.Module, weight_H: mx.array | None) -> mx.array:
        x_ISNH = mx.unflatten(projection(normed), -1, (-1, head_dim))
        return mx.fast.rms_norm(x_ISNH, weight_H, eps)

    queries = _turned(heads(attn.q_proj, attn.q_norm.weight), turns)
    keys = _turned(heads(attn.k_proj, attn.k_norm.weight), turns)
    values = heads(attn.v_proj, None)
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))
    mixed = attend(queries, keys, values, mask)
    mixed = attn.o_proj(mixed.transpose(0, 2, 1, 3).flatten(-2))
    hidden_ISE = hidden_ISE + layer.post_attention_layernorm(mixed)
    update = layer.mlp(layer.pre_feedforward_layernorm(hidden_ISE))
    return hidden_ISE + layer.post_feedforward_layernorm(update)


def _turns(
    at_IS2: mx.array, head_dim: int, theta: float, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Cosines and sines (I, S, 1, 2, H / 4): x turns the first half of a head, y the second."""
    quarter = head_dim // 4
    angles = at_IS2[:, :, None, :, None] / theta ** (mx.arange(quarter) / quarter)
    return mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)


def _turned(x_ISNH: mx.array, turns: tuple[mx.array, mx.array]) -> mx.array:
    cos, sin = turns
    x = mx.unflatten(x_ISNH, -1, (2, 2, -1))
    a, b = x[..., 0, :], x[..., 1, :]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-2).flatten(-3)


def _pooled(hidden_ISE: mx.array, at_IS2: mx.array, padding_IS: mx.array, side: int) -> mx.array:
    """Means over squares of patches, float32, (I, slots, E); slots that no patch is in are 0."""
    squares = at_IS2 // side
    columns = (at_IS2[..., 0].max(axis=-1, keepdims=True) + 1) // side
    slot_IS = squares[..., 0] + columns * squares[..., 1]
    slots = mx.arange(hidden_ISE.shape[1] // side**2)
    weights = (slot_IS[:, None] == slots[:, None]) & ~padding_IS[:, None]
    return weights.astype(mx.float32) @ hidden_ISE.astype(mx.float32) / side**2


# ---------------------------------------------------------------- audio


def _audio_features(
    backbone: Any, features_AFC: mx.array, mask_AF: mx.array, run: Callable[..., mx.array]
) -> mx.array:
    """(A, F / 4, E): the features of every fourth frame; in the unified member the frames."""
    encoder = getattr(backbone, "audio_tower", None)
    if encoder is None:
        return features_AFC.astype(text_model(backbone).norm.weight.dtype)
    subsample, config = encoder.subsample_conv_projection, encoder.config
    features_AFC = features_AFC.astype(subsample.layer0.conv.weight.dtype)
    hidden, padding = subsample(features_AFC, ~mask_AF.astype(mx.bool_))
    before, after = config.attention_context_left - 1, config.attention_context_right
    chunk = config.attention_chunk_size
    back = mx.arange(chunk)[:, None] + before - mx.arange(before + chunk + after)
    near = mx.where(back >= 0, back < before, -back < after)
    hidden = run(encoder.layers, lambda layer, x: layer(x, padding, near), hidden)
    return hidden if encoder.output_proj is None else encoder.output_proj(hidden)
