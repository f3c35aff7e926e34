"""Log-probabilities of targets: chunked equals plain, for every kind of head and any objective."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import assert_same_grads, relative_gap, small_budgets, some_tokens
from mlx_lm.tuner.lora import LoRALinear

import mlx_gemma4 as g4
from mlx_gemma4.model.names import text_model
from mlx_gemma4.nn.forward import forward
from mlx_gemma4.nn.head import batch_log_probs, logits, token_log_probs
from mlx_gemma4.objectives.sft import sft

CAPS = {"no cap": None, "large cap": 500.0}


@pytest.fixture(params=["tied", "untied", "quantized", "no cap", "large cap", "bfloat16"])
def model(request, tiny):
    """A model with a frozen head of each kind."""
    gemma = g4.load(tiny)
    backbone, plan = gemma.backbone, gemma.plan
    if request.param == "untied":
        language = backbone.language_model
        language.lm_head = nn.Linear(plan.hidden_size, plan.vocab_size, bias=False)
        language.lm_head.freeze()
        plan = dataclasses.replace(plan, tied=False)
    if request.param == "quantized":
        nn.quantize(backbone, 32, 8, class_predicate=lambda path, _: path.endswith("embed_tokens"))
    if request.param in CAPS:
        plan = dataclasses.replace(plan, softcap=CAPS[request.param])
    if request.param == "bfloat16":
        backbone.set_dtype(mx.bfloat16)
    return SimpleNamespace(backbone=backbone, plan=plan)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    small_budgets(monkeypatch)


def inputs(gemma, R=180):
    """Hidden states (R, D), targets (R,), and a random cotangent for each target."""
    keys = mx.random.split(mx.random.key(0), 3)
    dtype = text_model(gemma.backbone).norm.weight.dtype
    hidden = (3 * mx.random.normal((R, gemma.plan.hidden_size), key=keys[0])).astype(dtype)
    targets = mx.random.randint(0, gemma.plan.vocab_size, (R,), key=keys[1])
    return hidden, targets, mx.random.normal((R,), key=keys[2])


def plain(gemma, hidden, targets, gradient=True):
    """Through all logits at once."""
    every = logits(gemma, hidden)
    picked = mx.take_along_axis(every, targets[:, None], axis=-1).squeeze(-1)
    return picked - mx.logsumexp(every, axis=-1)


def smooth(log_probs, coefficients):
    """A random smooth objective in which the targets meet each other."""
    mixed = mx.tanh(log_probs * 0.1 + coefficients)
    return (mixed * mixed[::-1]).sum() + mx.logsumexp(coefficients * log_probs * 0.05)


def test_log_probs_and_the_gradient_of_any_objective(model):
    hidden, targets, coefficients = inputs(model)
    low = hidden.dtype == mx.bfloat16

    def run(log_probs_of):
        return mx.value_and_grad(lambda h: smooth(log_probs_of(model, h, targets), coefficients))(
            hidden
        )

    (wanted, wanted_grad), (value, grad) = run(plain), run(token_log_probs)
    assert float(value) == pytest.approx(float(wanted), rel=1e-3 if low else 1e-5)
    gap = relative_gap(grad.astype(mx.float32), wanted_grad.astype(mx.float32))
    assert gap < (0.02 if low else 1e-5)
    ours, theirs = token_log_probs(model, hidden, targets), plain(model, hidden, targets)
    assert relative_gap(ours, theirs) < (1e-3 if low else 1e-6)


def test_without_a_gradient_they_are_the_same(model):
    hidden, targets, _ = inputs(model)
    only = token_log_probs(model, hidden, targets, gradient=False)
    gap = relative_gap(only, token_log_probs(model, hidden, targets))
    assert gap < (1e-3 if hidden.dtype == mx.bfloat16 else 1e-6)


@pytest.mark.parametrize("kind", ["tied", "untied", "adapted"])
def test_a_head_that_trains(tiny, kind):
    """The gradients of hidden states and head, chunk by chunk, through any objective."""
    gemma = g4.load(tiny)
    backbone, plan = gemma.backbone, gemma.plan
    if kind != "tied":
        language = backbone.language_model
        language.lm_head = nn.Linear(plan.hidden_size, plan.vocab_size, bias=False)
        plan = dataclasses.replace(plan, tied=False)
        module = language.lm_head
        if kind == "adapted":
            module.freeze()
            language.lm_head = module = LoRALinear.from_base(module, r=3)
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(4))
    else:
        module = text_model(backbone).embed_tokens
    model = SimpleNamespace(backbone=backbone, plan=plan)
    hidden, targets, coefficients = inputs(model)
    backbone.freeze()
    module.unfreeze(keys=["lora_a", "lora_b"] if kind == "adapted" else None)

    def total(log_probs_of):
        def run(parameters, hidden):
            module.update(parameters)
            return smooth(log_probs_of(model, hidden, targets), coefficients)

        parameters = module.trainable_parameters()
        result = mx.value_and_grad(run, argnums=(0, 1))(parameters, hidden)
        module.update(parameters)
        return result

    wanted, wanted_grads = total(plain)
    value, grads = total(token_log_probs)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    assert_same_grads(grads[0], wanted_grads[0], 1e-5)
    assert relative_gap(grads[1], wanted_grads[1]) < 1e-5


def test_only_positions_with_a_target_meet_the_head(tiny):
    """The rest may be anything, and targets of weight 0 that fill up the list count nothing."""
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=2))
    tokens = some_tokens(gemma.plan.vocab_size)
    weights = (mx.random.uniform(shape=tokens.shape, key=mx.random.key(1)) < 0.3) * 1.5
    every = g4.Batch.from_tokens(tokens, weights).with_ple_rows(gemma)
    learned = mx.array([i for i, w in enumerate(every.weights_R.tolist()) if w])
    fill = mx.full((37,), learned[-1].item(), learned.dtype)
    positions = mx.concatenate([learned, fill])
    few = dataclasses.replace(
        every,
        positions_R=positions,
        targets_R=every.targets_R[positions],
        weights_R=mx.concatenate([every.weights_R[learned], mx.zeros((37,))]),
        sequences_R=every.sequences_R[positions],
    )
    wanted, got = g4.loss_and_grads(gemma, every), g4.loss_and_grads(gemma, few)
    assert float(got[0]) == pytest.approx(float(wanted[0]), rel=1e-6)
    assert float(got[1]) == pytest.approx(float(wanted[1]), rel=1e-6)
    assert_same_grads(got[2], wanted[2], 1e-5)


def test_an_objective_over_packed_sequences(tiny):
    """Mean log-probability of each sequence: packed, padded, and through full logits."""
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=2))
    tokens = some_tokens(gemma.plan.vocab_size, B=2, T=60)
    segments = mx.broadcast_to((mx.arange(60) >= 25).astype(mx.int32), (2, 60))
    packed = g4.Batch.from_tokens(tokens, segments_BT=segments).with_ple_rows(gemma)

    def by_length(log_probs, batch):
        sums = batch.per_sequence(batch.weights_R * log_probs)
        counts = batch.per_sequence(batch.weights_R)
        return g4.Sums(-(sums / mx.maximum(counts, 1)).sum(), (counts > 0).sum())

    loss, count, grads = g4.loss_and_grads(gemma, packed, by_length)
    assert float(count) == 4
    apart = [
        g4.loss_and_grads(gemma, g4.Batch.from_tokens(tokens[:, part]), by_length)
        for part in (slice(0, 25), slice(25, 60))
    ]
    assert float(loss) == pytest.approx(sum(float(one[0]) for one in apart), rel=1e-5)

    def full():
        hidden = forward(gemma, packed).flatten(0, 1)
        return by_length(plain(gemma, hidden, packed.targets_R), packed).loss

    wanted, wanted_grads = nn.value_and_grad(gemma.backbone, full)()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert_same_grads(grads, wanted_grads, 1e-5)


def peak_of(run) -> int:
    mx.clear_cache()
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - resident


def wide_head(tiny):
    gemma = g4.load(tiny)
    plan = dataclasses.replace(gemma.plan, vocab_size=8192)
    text_model(gemma.backbone).embed_tokens = nn.Embedding(8192, plan.hidden_size)
    gemma.backbone.freeze()
    return SimpleNamespace(backbone=gemma.backbone, plan=plan)


def test_memory_is_a_few_chunks_whatever_the_objective(tiny):
    model = wide_head(tiny)
    hidden, targets, coefficients = inputs(model, R=1024)
    mx.eval(model.backbone.parameters(), hidden, targets, coefficients)
    peaks = {
        (log_probs_of.__name__, objective.__name__): peak_of(
            lambda log_probs_of=log_probs_of, objective=objective: mx.grad(
                lambda h: objective(log_probs_of(model, h, targets), coefficients)
            )(hidden)
        )
        for log_probs_of in (plain, token_log_probs)
        for objective in (smooth, weighted)
    }
    ours = peaks["token_log_probs", "smooth"]
    assert ours < peaks["plain", "smooth"] / 5
    assert ours < 1.05 * peaks["token_log_probs", "weighted"]


def weighted(log_probs, coefficients):
    return -(log_probs * coefficients).sum()


def test_a_head_that_trains_keeps_no_logits(tiny):
    """Its gradient is as large as the head; all logits would be many times that."""
    gemma = g4.load(tiny)
    gemma.train_all()
    hidden, targets, coefficients = inputs(gemma, R=4096)
    mx.eval(hidden, targets, coefficients)
    module = text_model(gemma.backbone).embed_tokens

    def peak(log_probs_of):
        def run(parameters, hidden):
            module.update(parameters)
            return weighted(log_probs_of(gemma, hidden, targets), coefficients)

        parameters = module.trainable_parameters()
        found = peak_of(lambda: mx.grad(run, argnums=(0, 1))(parameters, hidden))
        module.update(parameters)
        return found

    assert peak(token_log_probs) < peak(plain) / 4


def test_sft_is_the_weighted_cross_entropy(tiny):
    gemma = g4.load(tiny)
    tokens = some_tokens(gemma.plan.vocab_size, B=2, T=40)
    weights = mx.random.uniform(shape=tokens.shape, key=mx.random.key(2))
    batch = g4.Batch.from_tokens(tokens, weights).with_ple_rows(gemma)
    sums = sft(batch_log_probs(gemma, batch), batch)
    losses = nn.losses.cross_entropy(gemma.logits(tokens)[:, :-1], tokens[:, 1:])
    assert float(sums.loss) == pytest.approx(float((losses * weights[:, 1:]).sum()), rel=1e-5)
    assert float(sums.count) == pytest.approx(float(weights[:, 1:].sum()), rel=1e-6)
