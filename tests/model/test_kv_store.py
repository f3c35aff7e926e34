"""The KV-store shim: right logits and gradients on legacy backbones, and no more than that.

The small legacy-shaped model below stands in where the installed mlx-vlm threads keys and values
natively; where it does not, its own text model is tested too.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import SMALL_VISION, assert_same_grads, relative_gap, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.model.capability import inspect_backbone
from mlx_gemma4.model.kv_store import (
    TrainingKVStore,
    apply_kv_store,
    has_kv_store,
    remove_kv_store,
)
from mlx_gemma4.model.loader import build_backbone
from mlx_gemma4.model.names import flat, text_model
from mlx_gemma4.model.ple import DiskEmbedding

VOCAB, WIDTH, HEADS = 32, 16, 2


class Attention(nn.Module):
    """Reads K/V from a cache where it shares them, as mlx-vlm before 0.5 does."""

    def __init__(self, shares: bool):
        super().__init__()
        self.shares = shares
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.rope = nn.RoPE(WIDTH // HEADS)

    def heads(self, projected):
        return mx.unflatten(projected, -1, (HEADS, -1)).transpose(0, 2, 1, 3)

    def keys_values(self, x, offset=0):
        keys = self.rope(self.heads(self.k_proj(x)), offset=offset)
        return keys, self.heads(self.v_proj(x))

    def attend(self, x, keys, values, offset=0):
        queries = self.rope(self.heads(self.q_proj(x)), offset=offset)
        scale = (WIDTH // HEADS) ** -0.5
        mixed = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask="causal"
        )
        return self.o_proj(mixed.transpose(0, 2, 1, 3).flatten(-2))

    def __call__(self, x, mask=None, cache=None):
        offset = 0 if cache is None else cache.offset
        if self.shares and cache is not None:
            keys, values, *_ = cache.state
            return self.attend(x, keys, values, cache.offset)
        keys, values = self.keys_values(x, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return self.attend(x, keys, values, offset)


class Layer(nn.Module):
    def __init__(self, shares: bool):
        super().__init__()
        self.self_attn = Attention(shares)

    def __call__(self, x, mask=None, cache=None):
        return x + self.self_attn(x, mask, cache)


class LegacyText(nn.Module):
    """Two layers with K/V of their own, two that share the second's."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = [Layer(shares=i >= 2) for i in range(4)]
        self.first_kv_shared_layer_idx = 2
        self.layer_idx_to_cache_idx = [0, 1, 1, 1]

    def __call__(
        self, inputs=None, inputs_embeds=None, mask=None, cache=None, per_layer_inputs=None, **rest
    ):
        x = self.embed_tokens(inputs) if inputs_embeds is None else inputs_embeds
        if per_layer_inputs is not None:
            x = x + per_layer_inputs
        cache = [None] * 2 if cache is None else cache
        for layer, slot in zip(self.layers, self.layer_idx_to_cache_idx):
            x = layer(x, mask, cache[slot])
        self.seen = {"mask": mask, "cache": cache, **rest}
        return x

    def right(self, inputs):
        """The same with K/V handed on as values."""
        x = self.embed_tokens(inputs)
        for layer in self.layers:
            if not layer.self_attn.shares:
                shared = layer.self_attn.keys_values(x)
            x = x + layer.self_attn.attend(x, *shared)
        return x


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = LegacyText()

    def __call__(self, inputs, **rest):
        return self.model(inputs, **rest)


@pytest.fixture
def stand_in() -> Backbone:
    mx.random.seed(7)
    backbone = Backbone()
    # Values of some size, so that attention is no mere average.
    backbone.load_weights([(n, 2 * v) for n, v in flat(backbone.parameters()).items()])
    return backbone


TOKENS = some_tokens(VOCAB, B=2, T=20)


def test_a_legacy_stand_in_is_wrong_without_the_shim_and_right_with_it(stand_in):
    assert not inspect_backbone(stand_in).native
    right = stand_in.model.right(TOKENS)
    assert relative_gap(stand_in(TOKENS), right) > 0.05
    apply_kv_store(stand_in)
    assert has_kv_store(stand_in)
    assert relative_gap(stand_in(TOKENS), right) < 1e-5


def test_the_shim_gives_every_gradient_of_the_stand_in(stand_in):
    wanted, without = gradients(stand_in, stand_in.model.right), gradients(stand_in)
    apply_kv_store(stand_in)
    found = gradients(stand_in)
    assert_same_grads(found, wanted, 1e-4)
    with pytest.raises(AssertionError):
        assert_same_grads(without, wanted, 0.05)
    source, dead = (f"model.layers.{i}.self_attn.k_proj.weight" for i in (1, 2))
    assert float(mx.abs(flat(found)[source]).max()) > 0
    assert float(mx.abs(flat(found)[dead]).max()) == 0


def test_an_ordinary_cache_rotates_shared_queries_too_far(stand_in):
    """Why the store's offset stays at the start of the sequence."""
    from mlx_lm.models.cache import KVCache

    right = stand_in.model.right(TOKENS)
    assert relative_gap(stand_in(TOKENS, cache=[KVCache(), KVCache()]), right) > 0.05
    assert (
        relative_gap(stand_in(TOKENS, cache=[TrainingKVStore(), TrainingKVStore()]), right) < 1e-5
    )


def test_the_stores_offset_does_not_move():
    store = TrainingKVStore()
    keys, values = mx.ones((1, 2, 5, 4)), mx.zeros((1, 2, 5, 4))
    found = store.update_and_fetch(keys, values)
    assert found[0] is keys and found[1] is values
    assert store.state[0] is keys and store.state[1] is values
    assert store.offset == 0


def test_every_pass_has_fresh_stores_that_end_with_it(stand_in):
    apply_kv_store(stand_in)
    passes = []
    for tokens in (TOKENS, TOKENS[:, :7], TOKENS):
        assert relative_gap(stand_in(tokens), stand_in.model.right(tokens)) < 1e-5
        passes.append(stand_in.model.seen["cache"])
    assert [len(stores) for stores in passes] == [2, 2, 2]
    assert len({id(store) for stores in passes for store in stores}) == 6
    for store in (store for stores in passes for store in stores):
        assert_refused(lambda store=store: store.state)
        assert_refused(lambda store=store: store.update_and_fetch(TOKENS, TOKENS))


def test_a_cache_that_is_given_is_used_as_it_is(stand_in):
    from mlx_lm.models.cache import KVCache

    plain = stand_in(TOKENS, cache=[KVCache(), KVCache()])
    apply_kv_store(stand_in)
    caches = [KVCache(), KVCache()]
    assert mx.array_equal(stand_in(TOKENS, cache=caches), plain)
    assert stand_in.model.seen["cache"] is caches and caches[0].offset == 20


def test_all_arguments_reach_the_model(stand_in):
    apply_kv_store(stand_in)
    embeds = stand_in.model.embed_tokens(TOKENS)
    extra = mx.ones((2, 20, WIDTH))
    by_name = stand_in.model(None, inputs_embeds=embeds, mask="m", per_layer_inputs=extra, more=3)
    assert stand_in.model.seen["mask"] == "m" and stand_in.model.seen["more"] == 3
    assert mx.array_equal(stand_in.model(None, embeds, None, None, extra), by_name)
    assert relative_gap(by_name, stand_in(TOKENS)) > 0.05
    assert mx.array_equal(stand_in.model(inputs_embeds=embeds), stand_in(TOKENS))


def test_the_shim_goes_on_once_and_comes_off(stand_in):
    before, parameters = stand_in(TOKENS), set(flat(stand_in.parameters()))
    apply_kv_store(stand_in)
    once, out = type(stand_in.model), stand_in(TOKENS)
    apply_kv_store(stand_in)
    assert type(stand_in.model) is once and mx.array_equal(stand_in(TOKENS), out)
    assert set(flat(stand_in.parameters())) == parameters
    for _ in range(2):
        remove_kv_store(stand_in)
        assert type(stand_in.model) is LegacyText and not has_kv_store(stand_in)
        assert mx.array_equal(stand_in(TOKENS), before)
    apply_kv_store(stand_in)
    assert mx.array_equal(stand_in(TOKENS), out)


def test_only_the_one_instance_has_the_shim(stand_in):
    other = Backbone()
    call = LegacyText.__call__
    before = other(TOKENS)
    apply_kv_store(stand_in)
    assert LegacyText.__call__ is call and type(other.model) is LegacyText
    assert not has_kv_store(other) and not has_kv_store(Backbone())
    assert mx.array_equal(other(TOKENS), before)
    assert isinstance(stand_in.model, LegacyText)
    assert type(stand_in.model).__name__ == "LegacyTextWithKVStore"
    apply_kv_store(other)
    remove_kv_store(stand_in)
    assert has_kv_store(other) and not has_kv_store(stand_in)


def assert_refused(action) -> None:
    with pytest.raises(g4.CapabilityError) as error:
        action()
    assert "gradient checkpointing" in error.value.found
    assert "lose gradient silently" in error.value.wanted
    assert "mlx_gemma4.loss_and_grads" in error.value.do


def squares(call) -> mx.array:
    return (call(TOKENS) ** 2 * mx.arange(WIDTH)).sum()


def gradients(backbone, call=None) -> dict:
    return nn.value_and_grad(backbone, lambda: squares(call or backbone))()[1]


def checkpoint_class(kind, instance, monkeypatch) -> None:
    """Patch a class as mlx-lm's and mlx-vlm's trainers do; undone after the test."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    monkeypatch.setattr(kind, "__call__", kind.__call__)
    grad_checkpoint(instance)
    assert kind.__call__.__name__ == "checkpointed_fn"


@pytest.mark.parametrize("part", ["layer", "attention"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpointed_class_is_refused(stand_in, monkeypatch, part, when):
    layer = stand_in.model.layers[0]
    module = layer if part == "layer" else layer.self_attn
    if when == "after":
        apply_kv_store(stand_in)
        gradients(stand_in)
    checkpoint_class(type(module), module, monkeypatch)
    apply_kv_store(stand_in)
    assert relative_gap(stand_in(TOKENS), stand_in.model.right(TOKENS)) < 1e-5
    assert_refused(lambda: gradients(stand_in))


@pytest.mark.parametrize("wrapped", [(0,), (1,), (3,), (0, 1, 2, 3)], ids=str)
def test_layers_behind_a_checkpointed_function_are_refused(stand_in, wrapped):
    """Whether they fill a store, or only read one."""
    apply_kv_store(stand_in)
    stand_in.model.layers = [
        nn.utils.checkpoint(layer) if i in wrapped else layer
        for i, layer in enumerate(stand_in.model.layers)
    ]
    assert_refused(lambda: gradients(stand_in))


@pytest.mark.parametrize("index", [1, 2])
def test_an_attention_behind_a_checkpointed_function_is_refused(stand_in, index):
    apply_kv_store(stand_in)
    layer = stand_in.model.layers[index]
    layer.self_attn = nn.utils.checkpoint(layer.self_attn)
    assert_refused(lambda: gradients(stand_in))


def test_a_whole_pass_may_run_again(stand_in):
    """Each run of it has stores of its own, so that nothing is lost."""
    wanted = gradients(stand_in, stand_in.model.right)
    apply_kv_store(stand_in)
    embeds = stand_in.model.embed_tokens(TOKENS)
    again = nn.utils.checkpoint(stand_in.model)
    found = gradients(stand_in, lambda tokens: again(None, embeds))
    for name, grad in flat(wanted).items():
        if "embed" not in name:
            assert relative_gap(flat(found)[name], grad) < 1e-4, name


def test_why_rematerialisation_is_refused(stand_in):
    """A store inside a checkpointed layer keeps the loss and loses gradient of the source."""

    def loss(layers):
        def run():
            x = stand_in.model.embed_tokens(TOKENS)
            stores = [TrainingKVStore(), TrainingKVStore()]
            for layer, slot in zip(layers, stand_in.model.layer_idx_to_cache_idx):
                x = layer(x, None, stores[slot])
            return (x**2 * mx.arange(WIDTH)).sum()

        return nn.value_and_grad(stand_in, run)()

    plain = loss(stand_in.model.layers)
    again = loss([nn.utils.checkpoint(layer) for layer in stand_in.model.layers])
    assert float(again[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert relative_gap(flat(again[1])[name], flat(plain[1])[name]) > 0.05


@pytest.mark.parametrize("slots", ["no", [0, 1], (0, 1, 1, 1), None, {0: 0}], ids=str)
def test_a_backbone_of_another_shape_is_refused(stand_in, slots):
    stand_in.model.layer_idx_to_cache_idx = slots
    if slots == "no":
        del stand_in.model.layer_idx_to_cache_idx
    with pytest.raises(g4.CapabilityError) as error:
        apply_kv_store(stand_in)
    assert "LegacyText does not map its layers to caches" in error.value.found
    assert "pip install -U mlx-lm mlx-vlm" in error.value.do
    assert type(stand_in.model) is LegacyText


def test_a_native_backbone_needs_no_shim_and_is_told_so(gemma):
    assert gemma.loaded.verdict.native and not has_kv_store(gemma.backbone)
    kind = type(text_model(gemma.backbone))
    with pytest.raises(g4.CapabilityError) as error:
        apply_kv_store(gemma.backbone)
    assert "the gate says native" in error.value.found
    assert type(text_model(gemma.backbone)) is kind


def vlm(checkpoints, shape) -> g4.Gemma4:
    """The small checkpoint's weights in mlx-vlm's own modules, without a shim."""
    gemma = g4.load(checkpoints[shape])
    config = {**gemma.loaded.config, "vision_config": SMALL_VISION}
    backbone = build_backbone(gemma.plan, config)
    text = text_model(backbone)
    text.embed_tokens_per_layer = DiskEmbedding(gemma.loaded.ple_rows)
    weights = flat(gemma.backbone.parameters())
    prefix = "language_model.model."
    assert set(weights) == {n for n in flat(backbone.parameters()) if n.startswith(prefix)}
    backbone.load_weights(list(weights.items()), strict=False)
    backbone.freeze()
    verdict = inspect_backbone(backbone)
    return replace(gemma, loaded=replace(gemma.loaded, backbone=backbone, verdict=verdict))


@pytest.fixture(params=["e2b", "e4b"])
def with_vlm(request, checkpoints) -> g4.Gemma4:
    return vlm(checkpoints, request.param)


@pytest.fixture
def legacy(with_vlm) -> g4.Gemma4:
    """mlx-vlm's backbone where it is legacy."""
    if with_vlm.loaded.verdict.native:
        pytest.skip("the installed mlx-vlm threads keys and values natively")
    return with_vlm


def own_logits(gemma, tokens) -> mx.array:
    return gemma.backbone.language_model(tokens).logits


def test_mlx_vlms_own_forward_equals_the_training_forward(with_vlm):
    """Through the shim where the backbone is legacy, without it where it is native."""
    if not with_vlm.loaded.verdict.native:
        apply_kv_store(with_vlm.backbone)
    tokens = some_tokens(with_vlm.plan.vocab_size)
    difference = mx.abs(own_logits(with_vlm, tokens) - with_vlm.logits(tokens)).max()
    assert float(difference) < 1e-4

    with_vlm.train_all()
    batch = g4.Batch.from_tokens(tokens).with_ple_rows(with_vlm)

    def own_loss():
        logits = own_logits(with_vlm, batch.tokens_BT).astype(mx.float32)
        return (
            nn.losses.cross_entropy(logits.flatten(0, 1), batch.targets_R) * batch.weights_R
        ).sum()

    loss, grads = nn.value_and_grad(with_vlm.backbone, own_loss)()
    ours = g4.loss_and_grads(with_vlm, batch)
    assert float(ours[0]) == pytest.approx(float(loss), rel=1e-5)
    assert_same_grads(ours[2], grads, 1e-3)
    assert len(flat(grads)) > 50
    assert all(np.abs(np.array(grad)).max() > 0 for grad in flat(grads).values())


def test_a_pruned_legacy_backbone_cannot_run_without_the_shim(legacy):
    with pytest.raises(AttributeError, match="k_proj"):
        own_logits(legacy, some_tokens(legacy.plan.vocab_size))


def test_a_legacy_backbone_with_dead_weights_is_wrong_without_the_shim(legacy):
    tokens = some_tokens(legacy.plan.vocab_size)
    layers = text_model(legacy.backbone).layers
    for planned, layer in zip(legacy.plan.layers, layers):
        if planned.shares_kv:
            source, attn = layers[planned.kv_source].self_attn, layer.self_attn
            for part in ("k_proj", "v_proj"):
                like = getattr(source, part).weight
                dead = nn.Linear(like.shape[1], like.shape[0], bias=False)
                setattr(attn, part, dead)
            attn.k_norm, attn.v_norm = source.k_norm, source.v_norm
    assert relative_gap(own_logits(legacy, tokens), legacy.logits(tokens)) > 0.05
    apply_kv_store(legacy.backbone)
    assert relative_gap(own_logits(legacy, tokens), legacy.logits(tokens)) < 1e-5


def test_mlx_vlms_own_caches_do_not_cure_it(legacy):
    tokens = some_tokens(legacy.plan.vocab_size)
    caches = legacy.backbone.language_model.make_cache()
    cached = legacy.backbone.language_model(tokens, cache=caches).logits
    assert relative_gap(cached, legacy.logits(tokens)) > 0.05


def test_the_shim_on_mlx_vlm_is_per_instance_idempotent_and_removable(legacy, checkpoints):
    kind = type(text_model(legacy.backbone))
    call = kind.__call__
    other = build_backbone(legacy.plan, {**legacy.loaded.config, "vision_config": SMALL_VISION})
    apply_kv_store(legacy.backbone)
    shimmed = type(text_model(legacy.backbone))
    apply_kv_store(legacy.backbone)
    assert type(text_model(legacy.backbone)) is shimmed and issubclass(shimmed, kind)
    assert kind.__call__ is call and type(text_model(other)) is kind and not has_kv_store(other)
    remove_kv_store(legacy.backbone)
    assert type(text_model(legacy.backbone)) is kind and not has_kv_store(legacy.backbone)


def test_mlx_vlms_gradient_checkpointing_is_refused(legacy, monkeypatch):
    layer = text_model(legacy.backbone).layers[0]
    apply_kv_store(legacy.backbone)
    legacy.train_all()
    tokens = some_tokens(legacy.plan.vocab_size)

    def grads():
        return nn.value_and_grad(legacy.backbone, lambda: own_logits(legacy, tokens).sum())()

    grads()
    checkpoint_class(type(layer), layer, monkeypatch)
    own_logits(legacy, tokens)
    assert_refused(grads)


def test_the_training_forward_rematerialises_a_legacy_backbone(legacy):
    """What the refusal advises: the same gradients, with or without the shim."""
    legacy.train_all()
    batch = g4.Batch.from_tokens(some_tokens(legacy.plan.vocab_size))
    plain = g4.loss_and_grads(legacy, batch)
    apply_kv_store(legacy.backbone)
    again = g4.loss_and_grads(legacy, batch, rematerialize=True)
    assert float(again[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    assert_same_grads(again[2], plain[2], 1e-5)
