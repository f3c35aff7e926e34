"""What must hold of the training forward on any stack, without a reference model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import assert_same_grads, make_lora_nonzero, relative_gap, some_tokens
from mlx.utils import tree_map

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat, text_model
from mlx_gemma4.nn import forward as forward_module
from mlx_gemma4.nn.forward import forward
from mlx_gemma4.nn.head import batch_log_probs, logits
from mlx_gemma4.nn.mask import AttentionMask
from mlx_gemma4.objectives.sft import sft


@pytest.fixture
def gemma(checkpoints, shape) -> g4.Gemma4:
    """A model of every shape in turn."""
    return g4.load(checkpoints[shape])


def tokens_for(gemma, **kwargs) -> mx.array:
    return some_tokens(gemma.plan.vocab_size, **kwargs)


def test_equals_the_backbones_own_forward(gemma):
    tokens = tokens_for(gemma)
    assert relative_gap(gemma.logits(tokens), gemma.backbone(tokens)) < 1e-5


def test_own_gradients_equal_the_backbones(gemma):
    gemma.train_all()
    batch = g4.Batch.from_tokens(tokens_for(gemma)).with_ple_rows(gemma)

    def own_loss():
        logits = gemma.backbone(batch.tokens_BT).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits.flatten(0, 1), batch.targets_R)
        return (losses * batch.weights_R).sum()

    try:
        loss, grads = nn.value_and_grad(gemma.backbone, own_loss)()
    except ValueError as error:
        assert gemma.plan.moe and "VJP with respect to indices" in str(error)
        pytest.skip("the router of this mlx-lm has no gradient of its own")
    ours = g4.loss_and_grads(gemma, batch)
    assert float(ours[0]) == pytest.approx(float(loss), rel=1e-5)
    assert_same_grads(ours[2], grads)


def test_cached_equals_uncached(gemma):
    """Logits of generation, a token at a time through upstream's cache, past the window."""
    tokens = tokens_for(gemma, B=1, T=40)
    cache = gemma.backbone.make_cache()
    steps = [gemma.backbone(tokens[:, :30], cache=cache)]
    steps += [gemma.backbone(tokens[:, i : i + 1], cache=cache) for i in range(30, 40)]
    assert relative_gap(mx.concatenate(steps, axis=1), gemma.logits(tokens)) < 1e-4


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_no_leak_from_the_future(gemma, B, padded):
    tokens = np.array(tokens_for(gemma, B=B, T=50))
    if padded:
        tokens[0, 44:] = 0
    changed = tokens.copy()
    changed[:, 40] = (changed[:, 40] + 7) % gemma.plan.vocab_size
    before, after = (np.array(gemma.logits(mx.array(t))) for t in (tokens, changed))
    assert np.array_equal(before[:, :40], after[:, :40])
    assert not np.array_equal(before[:, 40:], after[:, 40:])


def test_rematerialized_is_the_same(gemma):
    gemma.train_all()
    batch = g4.Batch.from_tokens(tokens_for(gemma))
    plain = g4.loss_and_grads(gemma, batch)
    again = g4.loss_and_grads(gemma, batch, rematerialize=True)
    assert float(plain[0]) == pytest.approx(float(again[0]), rel=1e-6)
    assert_same_grads(again[2], plain[2], 1e-5)


@pytest.mark.parametrize("rematerialize", [False, True], ids=["kept", "rematerialized"])
def test_rebuilding_every_container_changes_nothing(gemma, monkeypatch, rematerialize):
    """As FSDP2 and tree_map do: no layer may rely on the identity of a container."""
    gemma.train_all()
    batch = g4.Batch.from_tokens(tokens_for(gemma))
    plain = g4.loss_and_grads(gemma, batch)
    layer = forward_module.decoder_layer

    def rebuilt(module, *values, **facts):
        values = tree_map(lambda leaf: leaf, list(values))
        return tree_map(lambda leaf: leaf, layer(module, *values, **facts))

    monkeypatch.setattr(forward_module, "decoder_layer", rebuilt)
    wrapped = g4.loss_and_grads(gemma, batch, rematerialize=rematerialize)
    assert float(plain[0]) == pytest.approx(float(wrapped[0]), rel=1e-6)
    assert_same_grads(wrapped[2], plain[2], 1e-5)


def test_packed_documents_equal_separate_ones(gemma):
    gemma.train_all()
    a, b = np.array(tokens_for(gemma, B=2, T=45))
    a, b = a[:35], b
    packed = g4.Batch.from_tokens(
        np.concatenate([a, b])[None], segments_BT=np.array([0] * len(a) + [1] * len(b))[None]
    )
    together = g4.loss_and_grads(gemma, packed)
    apart = [g4.loss_and_grads(gemma, g4.Batch.from_tokens(t[None])) for t in (a, b)]
    assert float(together[1]) == sum(float(count) for _, count, _ in apart) == len(a) + len(b) - 2
    assert float(together[0]) == pytest.approx(sum(float(loss) for loss, *_ in apart), rel=1e-5)
    assert_same_grads(together[2], tree_map(mx.add, apart[0][2], apart[1][2]), 1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dropout_draws_the_same_numbers_when_rematerialized(tiny, compiled):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=4, dropout=0.3))
    make_lora_nonzero(gemma)
    gemma.backbone.train()
    batch = g4.Batch.from_tokens(tokens_for(gemma)).with_ple_rows(gemma)

    def grads(rematerialize):
        def step():
            return g4.loss_and_grads(gemma, batch, rematerialize=rematerialize)

        state = [gemma.backbone.state, mx.random.state]
        run = mx.compile(step, inputs=state, outputs=state) if compiled else step
        mx.random.seed(5)
        return run()

    plain, again = grads(False), grads(True)
    assert float(plain[0]) == pytest.approx(float(again[0]), rel=1e-6)
    assert_same_grads(again[2], plain[2], 1e-4)
    mx.random.seed(6)
    other = g4.loss_and_grads(gemma, batch)
    assert float(other[0]) != pytest.approx(float(plain[0]), rel=1e-6)


def test_bfloat16_stays_bfloat16_and_logits_are_float32(tiny):
    gemma = g4.load(tiny)
    gemma.backbone.set_dtype(mx.bfloat16)
    tokens = tokens_for(gemma)
    hidden = forward(gemma, g4.Batch.of_prompt(tokens).with_ple_rows(gemma))
    assert hidden.dtype == mx.bfloat16
    assert logits(gemma, hidden).dtype == mx.float32


def test_buffers_never_train(gemma):
    gemma.train_all()
    trainable = flat(gemma.backbone.trainable_parameters())
    assert not any(name.endswith("layer_scalar") for name in trainable)
    assert set(flat(gemma.backbone.parameters())) - set(trainable) == {
        f"language_model.model.layers.{i}.layer_scalar" for i in range(len(gemma.plan.layers))
    }


def test_nothing_trainable_is_an_error(gemma):
    with pytest.raises(g4.TrainingError, match="nothing is trainable"):
        g4.loss_and_grads(gemma, g4.Batch.from_tokens(tokens_for(gemma)))


def test_the_forward_needs_ple_rows(tiny):
    gemma = g4.load(tiny)
    with pytest.raises(ValueError, match="needs PLE rows"):
        forward(gemma, g4.Batch.of_prompt(tokens_for(gemma)))


def test_loss_weights_scale_each_target(gemma):
    tokens = tokens_for(gemma)
    one, half = (
        sft(batch_log_probs(gemma, batch), batch).loss
        for batch in (
            g4.Batch.from_tokens(tokens, mx.full(tokens.shape, weight)).with_ple_rows(gemma)
            for weight in (1.0, 0.5)
        )
    )
    assert float(half) == pytest.approx(float(one) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("window", "segments", "allowed"),
    [
        (3, None, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]),
        (None, [[0, 0, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]),
        (1, [[0, 0, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_masks(window, segments, allowed):
    segments = mx.array(segments) if segments else None
    assert (
        np.array(AttentionMask(4, window, segments).whole()).reshape(4, 4).astype(int).tolist()
        == allowed
    )


def test_the_mask_is_plain_causal_within_the_window():
    assert AttentionMask(4).whole() == AttentionMask(4, window=4).whole() == "causal"


def test_upstreams_layers_may_be_wrapped(tiny):
    """A layer behind an object that forwards attributes is walked like the layer itself."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            object.__setattr__(self, "_inner", inner)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    gemma = g4.load(tiny)
    tokens = tokens_for(gemma)
    plain = gemma.logits(tokens)
    text = text_model(gemma.backbone)
    text.layers = [Wrapped(layer) for layer in text.layers]
    assert np.array_equal(np.array(gemma.logits(tokens)), np.array(plain))
