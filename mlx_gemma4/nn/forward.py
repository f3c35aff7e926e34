"""The training forward: one pure function over upstream's modules.

It reads top to bottom like the model: embeddings, per-layer inputs, layers, final norm. Keys and
values that later layers share are values that this function hands on, so a layer can be
rematerialised, compiled or wrapped without losing their gradient. Upstream's own `__call__` of
the model, layer and attention is not used; their submodules are, whatever they have been replaced
with (LoRA, quantized).

Shapes: B rows, T tokens, D model, N query heads, K key/value heads, H head dim, V vocabulary,
L layers, P width of per-layer embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import mlx.core as mx

from ..model.names import text_model
from ..model.plan import LayerPlan, Plan
from .activation import gelu_times
from .attention import attention
from .batch import Batch, StepOptions
from .budgets import Budgets
from .dropout import draw_keys, set_keys
from .linear import linear
from .mask import AttentionMask
from .media import with_media
from .remat import in_pieces, rematerialized, with_parameters
from .routing import chosen_experts, router_sums

KV = tuple[mx.array, mx.array]

_MOST_ROWS = 32_768
"""Tokens, once for each of their experts, that go through the experts together: of more, MLX up to
0.32.2 makes wrong products with quantized experts on M5."""


class Model(Protocol):
    """What a pass needs of a model: `Gemma4` has it, and so has a backbone that was just loaded."""

    @property
    def backbone(self) -> Any: ...
    @property
    def plan(self) -> Plan: ...


def forward(
    gemma: Model,
    batch: Batch,
    options: StepOptions = StepOptions(),
    kept: dict[int, KV] | None = None,
) -> mx.array:
    """Final hidden states (B, T, D), after the last norm; arguments as in `forward_routed`."""
    return forward_routed(gemma, batch, options, kept)[0]


def forward_routed(
    gemma: Model,
    batch: Batch,
    options: StepOptions = StepOptions(),
    kept: dict[int, KV] | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Final hidden states (B, T, D), and what each layer's router did.

    Args:
        gemma: a `Gemma4`.
        batch: with PLE rows for members that have per-layer embeddings.
        options: how the pass is computed: gradient checkpointing of the first layers (Chen et al.
            2016, arXiv:1604.06174), the attention method, dropout's key.
        kept: takes the keys and values of every layer that has its own, by its index.

    Returns:
        The second is (L, 3, E), `router_sums` of each layer; None if the options do not ask.
    """
    text, plan = text_model(gemma.backbone), gemma.plan
    hidden_BTD = text.embed_tokens(batch.tokens_BT) * plan.hidden_size**0.5
    if batch.media is not None:
        attend = partial(attention, method=options.attention, budgets=options.budgets)
        how = {"remat": options.remat_layers > 0, "attend": attend, "key": options.key}
        hidden_BTD = with_media(gemma.backbone, batch.media, hidden_BTD, **how)
    inputs = _per_layer_inputs(text, plan, hidden_BTD, batch.ple_BTLP)
    masks = _masks(plan, batch)
    positions_BT = None if batch.segments_BT is None else _positions(batch.segments_BT)
    count = len(plan.layers)
    keys = [None] * count if options.key is None else mx.random.split(options.key, count)
    shared: dict[int, KV] = {}
    real_BT = None if options.balance is None else batch.tokens_BT != plan.pad_token
    routed: list[mx.array] = []
    for layer_plan, layer, own_key, input_BTP in zip(plan.layers, text.layers, keys, inputs):
        run = _rematerialized if layer_plan.index < options.remat_layers else _plain
        hidden_BTD, kv, sums = run(
            layer,
            draw_keys(layer, own_key),
            hidden_BTD,
            input_BTP,
            shared.get(layer_plan.kv_source),
            plan=plan,
            layer_plan=layer_plan,
            mask=masks[layer_plan.kind],
            positions_BT=positions_BT,
            options=options,
            real_BT=real_BT,
        )
        if layer_plan.index in plan.kv_sources:
            shared[layer_plan.index] = kv
        routed += sums
        if kept is not None and not layer_plan.shares_kv:
            kept[layer_plan.index] = kv
    return text.norm(hidden_BTD), mx.stack(routed) if routed else None


def decoder_layer(
    layer: Any,
    hidden_BTD: mx.array,
    input_BTP: mx.array | None,
    shared_kv: KV | None,
    *,
    plan: Plan,
    layer_plan: LayerPlan,
    mask: AttentionMask,
    positions_BT: mx.array | None,
    options: StepOptions,
    real_BT: mx.array | None = None,
    piece: int | None = None,
) -> tuple[mx.array, KV, list[mx.array]]:
    """One decoder layer.

    Args:
        input_BTP: the layer's share of the per-layer inputs, or None.
        shared_kv: keys and values of the layer's source; None if the layer has its own.
        mask: which positions attend to which.
        positions_BT: position of every token in its sequence; None is one sequence a row.
        options: how attention and GELU are computed.
        real_BT: which tokens are no padding, where what the router does is asked for.
        piece: positions that go through the MLP together; None is all. Only for layers that are
            rematerialised: it costs nothing there.

    Returns:
        The layer's output (B, T, D), the keys and values that it attended to, and a list of its
        `router_sums`, empty if none are asked for.
    """
    normed_BTD = layer.input_layernorm(hidden_BTD)
    mixed, kv = _attend(
        layer.self_attn, layer_plan, normed_BTD, shared_kv, mask, positions_BT, options
    )
    hidden_BTD = hidden_BTD + layer.post_attention_layernorm(mixed)
    inputs = {"hidden_BTD": hidden_BTD}
    if input_BTP is not None:
        inputs["input_BTP"] = input_BTP
    sums = []
    if plan.moe is not None:
        inputs["scores_BTE"] = _router_scores(layer.router, plan, hidden_BTD)
        if real_BT is not None:
            sums.append(router_sums(inputs["scores_BTE"], plan.moe.top_k, real_BT))

    def after(*arrays: mx.array) -> mx.array:
        return _after_attention(layer, plan, options.budgets, **dict(zip(inputs, arrays)))

    values = list(inputs.values())
    out_BTD = _piecewise(layer, after, piece, values) if piece else after(*values)
    return out_BTD, kv, sums


def _after_attention(
    layer: Any,
    plan: Plan,
    budgets: Budgets,
    hidden_BTD: mx.array,
    input_BTP: mx.array | None = None,
    scores_BTE: mx.array | None = None,
) -> mx.array:
    """The rest of a layer, in which no position looks at another: MLP, experts, per-layer input."""
    gated = partial(gelu_times, keep_derivatives=budgets.keeps_derivatives)
    update = _mlp(layer.mlp, layer.pre_feedforward_layernorm(hidden_BTD), gated)
    if plan.moe is not None:
        experts = _experts(layer, plan, hidden_BTD, scores_BTE)
        update = layer.post_feedforward_layernorm_1(update) + experts
    hidden_BTD = hidden_BTD + layer.post_feedforward_layernorm(update)

    if input_BTP is not None:
        gate = linear(layer.per_layer_input_gate, hidden_BTD)
        update = linear(layer.per_layer_projection, gated(gate, input_BTP))
        hidden_BTD = hidden_BTD + layer.post_per_layer_input_norm(update)
    return hidden_BTD * layer.layer_scalar


def _masks(plan: Plan, batch: Batch) -> dict[str, AttentionMask]:
    """The attention mask of each kind of layer.

    Images matter in members with bidirectional attention: in their sliding layers, and in the
    unified member in all.
    """
    unified = plan.is_unified
    masks = {}
    for layer in plan.layers:
        sees_images = plan.bidirectional and (layer.window is not None or unified)
        masks[layer.kind] = AttentionMask(
            batch.tokens_BT.shape[1],
            layer.window,
            batch.segments_BT,
            batch.longest,
            batch.images_BT if sees_images else None,
            batch.largest_image,
            window_limits_images=not unified,
        )
    return masks


def _per_layer_inputs(
    text: Any, plan: Plan, hidden_BTD: mx.array, ple_BTLP: mx.array | None
) -> list[mx.array | None]:
    """For each layer (B, T, P): the token's own row and a projection of its embedding, averaged."""
    if plan.ple is None:
        return [None] * len(plan.layers)
    if ple_BTLP is None:
        raise ValueError("this family member needs PLE rows: batch.with_ple_rows(gemma)")
    context = text.per_layer_model_projection(hidden_BTD)
    # mlx-vlm before 0.5 scales inside its projection module.
    context = context * getattr(text, "per_layer_projection_scale", 1.0)
    context = text.per_layer_projection_norm(
        mx.unflatten(context, -1, (len(plan.layers), plan.ple.width))
    )
    inputs_BTLP = (context + ple_BTLP.astype(context.dtype) * plan.ple.width**0.5) * 2**-0.5
    return [inputs_BTLP[:, :, i] for i in range(len(plan.layers))]


def _attend(
    attn: Any,
    layer_plan: LayerPlan,
    normed_BTD: mx.array,
    shared_kv: KV | None,
    mask: AttentionMask,
    positions_BT: mx.array | None,
    options: StepOptions,
) -> tuple[mx.array, KV]:
    def heads(projected: mx.array, norm: Callable[[mx.array], mx.array]) -> mx.array:
        return norm(mx.unflatten(projected, -1, (-1, layer_plan.head_dim)))

    rotated = partial(_rotated, attn.rope, positions_BT)
    queries_BNTH = rotated(heads(linear(attn.q_proj, normed_BTD), attn.q_norm))
    if shared_kv is None:
        keys = linear(attn.k_proj, normed_BTD)
        values = keys if layer_plan.k_eq_v else linear(attn.v_proj, normed_BTD)
        kv = rotated(heads(keys, attn.k_norm)), _by_head(heads(values, attn.v_norm))
    else:
        kv = shared_kv
    mixed_BNTH = attention(
        queries_BNTH, *kv, mask, options.attention, options.budgets, options.fused
    )
    return linear(attn.o_proj, mixed_BNTH.transpose(0, 2, 1, 3).flatten(-2)), kv


def _rotated(rope: Any, positions_BT: mx.array | None, x_BTNH: mx.array) -> mx.array:
    """(B, T, N, H) -> (B, N, T, H) with rotary positions, counted from 0 in every sequence.

    A difference of positions is all that attention sees; small ones are exact in float32 where
    thousands are not.
    """
    if positions_BT is None:
        return rope(_by_head(x_BTNH))
    # Upstream's modules take an offset for each row: every token is a row of its own here.
    alone = x_BTNH.flatten(0, 1)[:, :, None]
    turned = rope(alone, offset=positions_BT.flatten()).squeeze(2)
    return _by_head(mx.unflatten(turned, 0, positions_BT.shape))


def _by_head(x_BTNH: mx.array) -> mx.array:
    return x_BTNH.transpose(0, 2, 1, 3)


def _positions(segments_BT: mx.array) -> mx.array:
    """(B, T): the position of every token in its sequence."""
    B, T = segments_BT.shape
    here = mx.broadcast_to(mx.arange(T), (B, T))
    starts = mx.concatenate(
        [mx.ones((B, 1), mx.bool_), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1
    )
    return here - mx.cummax(mx.where(starts, here, 0), axis=1)


def _mlp(mlp: Any, x_BTD: mx.array, gated: Callable[..., mx.array]) -> mx.array:
    gate, up = linear(mlp.gate_proj, x_BTD), linear(mlp.up_proj, x_BTD)
    return linear(mlp.down_proj, gated(gate, up))


def _router_scores(router: Any, plan: Plan, hidden_BTD: mx.array) -> mx.array:
    scale = router.scale * plan.hidden_size**-0.5
    return linear(router.proj, mx.fast.rms_norm(hidden_BTD, scale, plan.rms_norm_eps))


def _experts(layer: Any, plan: Plan, hidden_BTD: mx.array, scores_BTE: Any) -> mx.array:
    """The routed experts' share of a MoE layer: top-k of a softmax, renormalised, scaled."""
    assert plan.moe is not None
    router = layer.router
    chosen = chosen_experts(scores_BTE, plan.moe.top_k)
    # A softmax over all experts, renormalised over the chosen, is a softmax over the chosen.
    weights = mx.softmax(mx.take_along_axis(scores_BTE, chosen, axis=-1), axis=-1, precise=True)
    weights = weights * router.per_expert_scale[chosen]
    inputs = layer.pre_feedforward_layernorm_2(hidden_BTD), chosen, weights
    B, T, _ = hidden_BTD.shape
    piece = max(1, _MOST_ROWS // (B * plan.moe.top_k))
    pieces = [slice(start, start + piece) for start in range(0, T, piece)]
    updates = [layer.experts(*(value[:, part] for value in inputs)) for part in pieces]
    update = mx.concatenate(updates, axis=1) if len(updates) > 1 else updates[0]
    return layer.post_feedforward_layernorm_2(update)


def _plain(
    layer: Any, keys: mx.array | None, *values: Any, **facts: Any
) -> tuple[mx.array, KV, list[mx.array]]:
    set_keys(layer, keys)
    return decoder_layer(layer, *values, **facts)


def _rematerialized(
    layer: Any, keys: mx.array | None, *values: Any, **facts: Any
) -> tuple[mx.array, KV, list[mx.array]]:
    """`decoder_layer`, of which only inputs and outputs are kept for the backward pass.

    Parameters, K/V and dropout keys are explicit inputs of the function that runs again, because
    what it closes over gets no gradient. `facts` (plans and masks) need none.
    """
    hidden_BTD, budgets = values[0], facts["options"].budgets
    B, T, _ = hidden_BTD.shape
    width = facts["layer_plan"].mlp_width
    piece = budgets.mlp_positions(B, width, hidden_BTD.dtype.size)
    # Dropout draws one mask for all positions.
    piece = piece if piece < T and keys is None else None

    def run(keys: mx.array | None, *values: Any) -> tuple[mx.array, KV, list[mx.array]]:
        return _plain(layer, keys, *values, piece=piece, **facts)

    parameters = layer.trainable_parameters()
    return rematerialized(with_parameters(layer, parameters, run))(parameters, keys, *values)


def _piecewise(
    layer: Any, after: Callable[..., mx.array], piece: int, inputs: list[mx.array]
) -> mx.array:
    parameters = {k: v for k, v in layer.trainable_parameters().items() if k != "self_attn"}
    return in_pieces(with_parameters(layer, parameters, after), piece, axis=1)(parameters, *inputs)
