"""The head: a log-probability for every target, without the logits of all of them at once.

Objectives are functions of these log-probabilities (objectives/). The head has the largest output
of the model, so hidden states meet it a chunk at a time. Where the head itself does not train, a
chunk's logits give its log-probabilities and their gradient with respect to the hidden states in
one pass; only that gradient, a small array, waits for the backward pass, which multiplies it by
the cotangent of each target.

Shapes: D model, V vocabulary, R targets, C targets of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.names import flat, lm_head, text_model
from ..model.plan import Plan
from .batch import Batch, StepOptions
from .forward import Model, forward
from .remat import in_pieces, with_parameters

_CHUNK_BYTES = 8 * 2**20
"""Logits that a chunk may have; 64 targets and up, so that its products still fill a GPU."""

_LEAST_TARGETS = 64

_SAFE_EXPONENT = 60.0
"""exp of it, summed over any vocabulary, is far from float32's end."""


def batch_log_probs(
    gemma: Model, batch: Batch, options: StepOptions = StepOptions(), *, gradient: bool = True
) -> mx.array:
    """Log-probabilities (R,) of a batch's targets, float32.

    Args:
        gemma: a `Gemma4`.
        options: how the pass is computed.
        gradient: whether they will be differentiated; without, half of the head's work is saved.
    """
    hidden_RD = forward(gemma, batch, options).flatten(0, 1)
    if batch.positions_R is not None:
        hidden_RD = hidden_RD[batch.positions_R]
    return token_log_probs(gemma, hidden_RD, batch.targets_R, gradient=gradient)


def token_log_probs(
    gemma: Model, hidden_RD: mx.array, targets_R: mx.array, *, gradient: bool = True
) -> mx.array:
    """log p(target) of each hidden state, (R,) in float32.

    Args:
        gemma: a `Gemma4`, whose head may be tied or not, quantized, adapted or trained.
        hidden_RD: final hidden states, after the last norm.
        targets_R: the token to predict from each.
        gradient: as in `batch_log_probs`.
    """
    module = _head_module(gemma)
    if gradient and _is_plain(module) and not flat(module.trainable_parameters()):
        return _with_frozen_head(module, gemma.plan, hidden_RD, targets_R)

    def log_probs(hidden_CD: mx.array, targets_C: mx.array) -> mx.array:
        logits_CV = logits(gemma, hidden_CD)
        picked_C = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1).squeeze(-1)
        return picked_C - mx.logsumexp(logits_CV, axis=-1)

    # A chunk's logits are made again in the backward pass, where its share of the head's own
    # gradient is added up.
    parameters = module.trainable_parameters()
    run = in_pieces(with_parameters(module, parameters, log_probs), _chunk_size(gemma.plan), axis=0)
    return run(parameters, hidden_RD, targets_R)


def logits(gemma: Model, hidden: mx.array) -> mx.array:
    """Logits (..., V) in float32 of final hidden states (..., D), softcapped."""
    return _capped(_project(_head_module(gemma), hidden), gemma.plan.softcap)


def _head_module(gemma: Model) -> Any:
    if gemma.plan.tied:
        return text_model(gemma.backbone).embed_tokens
    return lm_head(gemma.backbone)


def _with_frozen_head(
    module: nn.Module, plan: Plan, hidden_RD: mx.array, targets_R: mx.array
) -> mx.array:
    """Log-probabilities and their gradient in one pass over the chunks."""
    size, softcap = _chunk_size(plan), plan.softcap

    @mx.custom_function
    def log_probs_and_grads(hidden_RD):
        log_probs, grads = mx.zeros((0,)), list[mx.array]()
        for start in range(0, hidden_RD.shape[0], size):
            chunk = hidden_RD[start : start + size]
            if grads:
                chunk = mx.depends(chunk, [grads[-1], log_probs])
            targets_C1 = targets_R[start : start + size, None]
            logits_CV = _project(module, chunk)
            picked, normaliser, flow = _softmax_and_flow(logits_CV, targets_C1, softcap)
            log_probs = mx.concatenate([log_probs, (picked - normaliser).squeeze(-1)])
            # d log p / d logits = (onehot(target) - p) * slope of the cap; the one-hot part is a
            # row of the head for each target, so it is never written out.
            expected = _project_back(module, flow.astype(hidden_RD.dtype))
            rows = _head_rows(module, targets_C1.squeeze(-1))
            grads.append(expected - _slope(picked, softcap).astype(hidden_RD.dtype) * rows)
        return log_probs, mx.concatenate(grads, axis=0)

    @log_probs_and_grads.vjp
    def vjp(hidden_RD: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]):
        return (-cotangents[0][:, None] * outputs[1]).astype(outputs[1].dtype)

    outputs: Any = log_probs_and_grads(hidden_RD)
    return outputs[0]


def _chunk_size(plan: Plan) -> int:
    """Targets of a chunk: a multiple of 64 whose logits stay within the budget."""
    return max(_LEAST_TARGETS, _CHUNK_BYTES // (4 * plan.vocab_size) // 64 * 64)


def _softmax_and_flow(
    logits_CV: mx.array, targets_C1: mx.array, softcap: float | None
) -> tuple[mx.array, mx.array, mx.array]:
    """(the target's softcapped logit, log of the sum of exps, p * slope of the cap), float32.

    A small cap bounds the exponent by itself: no largest logit is looked for, and the exponentials,
    of which the softcapped logits are the logarithms, are all that is kept of a chunk.
    """
    if softcap is not None and softcap <= _SAFE_EXPONENT:
        exps = _bounded_exps(logits_CV, mx.array(softcap))
        sums = exps.sum(axis=-1, keepdims=True)
        picked = mx.log(mx.take_along_axis(exps, targets_C1, axis=-1))
        return picked, mx.log(sums), _bounded_flow(exps, 1 / sums, mx.array(1 / softcap))
    capped = _capped(logits_CV, softcap)
    picked = mx.take_along_axis(capped, targets_C1, axis=-1)
    top = capped.max(axis=-1, keepdims=True)
    exps = mx.exp(capped - top)
    sums = exps.sum(axis=-1, keepdims=True)
    return picked, top + mx.log(sums), exps * (1 / sums) * _slope(capped, softcap)


@partial(mx.compile, shapeless=True)
def _bounded_exps(logits_CV: mx.array, softcap: mx.array) -> mx.array:
    return mx.exp(mx.tanh(logits_CV.astype(mx.float32) / softcap) * softcap)


@partial(mx.compile, shapeless=True)
def _bounded_flow(exps: mx.array, factor: mx.array, inverse_cap: mx.array) -> mx.array:
    return exps * (1 - mx.square(mx.log(exps) * inverse_cap)) * factor


def _capped(logits: mx.array, softcap: float | None) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits if softcap is None else mx.tanh(logits / softcap) * softcap


def _slope(capped: mx.array, softcap: float | None) -> mx.array:
    """d capped / d logits."""
    return mx.ones_like(capped) if softcap is None else 1 - mx.square(capped / softcap)


def _is_plain(module: nn.Module) -> bool:
    """Whether the gradient of `_project` is known here: no bias, no adapter."""
    kinds = (nn.Embedding, nn.Linear, nn.QuantizedEmbedding, nn.QuantizedLinear)
    return type(module) in kinds and "bias" not in module


def _project(module: nn.Module, hidden: mx.array) -> mx.array:
    """(..., D) -> (..., V)."""
    return module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)


def _project_back(module: nn.Module, flow_CV: mx.array) -> mx.array:
    """(C, V) -> (C, D): the gradient of `_project`."""
    if "scales" not in module:
        return flow_CV @ module.weight
    tensors = module.weight, module.scales, module.get("biases")
    return mx.quantized_matmul(flow_CV, *tensors, transpose=False, **_packing(module))


def _head_rows(module: nn.Module, targets_C: mx.array) -> mx.array:
    """Rows of the head (C, D)."""
    if "scales" not in module:
        return module.weight[targets_C]
    biases = module.get("biases")
    return mx.dequantize(
        module.weight[targets_C],
        module.scales[targets_C],
        None if biases is None else biases[targets_C],
        **_packing(module),
    )


def _packing(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("group_size", "bits", "mode")}
