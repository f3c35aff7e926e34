"""Next-token cross-entropy, summed over the targets of a batch, without the logits of all of them.

The sum, not the mean: sums of batches and ranks add up, and one division by the number of all
targets of a step makes their mean exact.

The head has the largest output of the model, so rows meet it a chunk at a time, and a chunk's
logits are turned into its share of the loss and of the gradient at once; only the gradient with
respect to the hidden states, a small array, waits for the backward pass.

Shapes: B rows, T tokens, D model, V vocabulary, R positions, C positions of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.names import flat, lm_head, text_model
from ..model.plan import Plan
from .forward import head
from .rematerialize import in_pieces, with_parameters

__all__ = ["cross_entropy_sum"]

_CHUNK_BYTES = 8 * 2**20
"""Logits that a chunk may have; 64 positions and up, so that its products still fill a GPU."""

_LEAST_ROWS = 64

_SAFE_EXPONENT = 60.0
"""exp of it, summed over any vocabulary, is far from float32's end."""


def cross_entropy_sum(
    backbone: nn.Module,
    plan: Plan,
    hidden_BTD: mx.array,
    targets_BT: mx.array,
    weights_BT: mx.array,
    rows_R: mx.array | None = None,
    *,
    gradient: bool = True,
) -> mx.array:
    """Sum over positions of weight * -log p(target), a float32 scalar.

    Args:
        hidden_BTD: final hidden states.
        targets_BT: the token that follows each position.
        weights_BT: weight of each target; 0 is no target.
        rows_R: flat positions that have a target; the others never meet the head. Repeated
            positions count once. None is all.
        gradient: whether the loss will be differentiated; without, half of the work is saved.
    """
    hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    weights = weights_BT.flatten().astype(mx.float32)
    if rows_R is not None:
        # A position that fills the bucket repeats the one before it, and counts once.
        first = mx.concatenate([mx.ones((1,)), (rows_R[1:] != rows_R[:-1]).astype(mx.float32)])
        hidden, targets, weights = hidden[rows_R], targets[rows_R], weights[rows_R] * first
    module = text_model(backbone).embed_tokens if plan.tied else lm_head(backbone)
    if gradient and _knows(module) and not flat(module.trainable_parameters()):
        return _with_frozen_head(module, plan, hidden, targets, weights)
    return _with_any_head(module, backbone, plan, hidden, targets, weights)


def _with_frozen_head(
    module: nn.Module, plan: Plan, hidden_RD: mx.array, targets_R: mx.array, weights_R: mx.array
) -> mx.array:
    """Loss and gradient in one pass over the chunks."""
    rows = _chunk_rows(plan)

    @mx.custom_function
    def total_and_grad(hidden_RD):
        total, grads, done = mx.zeros(()), [], None
        for start in range(0, hidden_RD.shape[0], rows):
            chunk = hidden_RD[start : start + rows]
            if done is not None:
                chunk = mx.depends(chunk, done)
            targets, weights = targets_R[start : start + rows], weights_R[start : start + rows]
            logits, weights = _project(module, chunk), weights[:, None]
            top, capped, exps = _capped_exps(logits, plan.softcap)
            sums = exps.sum(axis=-1, keepdims=True)
            picked = mx.take_along_axis(capped, targets[:, None], axis=-1)
            total = total + ((mx.log(sums) + top - picked) * weights).sum()
            # d loss / d logits = weight * (p - onehot(target)) * slope of the cap; the one-hot
            # part is a row of the head for each position, so it is never written out.
            flow = _flow(capped, exps, weights / sums, plan.softcap).astype(hidden_RD.dtype)
            own = _flow(picked, mx.ones_like(picked), weights, plan.softcap)
            grad = _project_back(module, flow)
            grad = grad - own.astype(hidden_RD.dtype) * _head_rows(module, targets)
            grads.append(grad)
            done = [grad, total]
        return total, mx.concatenate(grads, axis=0)

    @total_and_grad.vjp
    def vjp(hidden_RD: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]):
        return cotangents[0].astype(outputs[1].dtype) * outputs[1]

    outputs: Any = total_and_grad(hidden_RD)
    return outputs[0]


def _with_any_head(
    module: nn.Module,
    backbone: nn.Module,
    plan: Plan,
    hidden_RD: mx.array,
    targets_R: mx.array,
    weights_R: mx.array,
) -> mx.array:
    """Chunk after chunk through the head as it is: trained, adapted, or not differentiated.

    A chunk's logits are made again in the backward pass, where its share of the head's own
    gradient is added up.
    """

    def losses(hidden_CD: mx.array, targets_C: mx.array, weights_C: mx.array) -> mx.array:
        logits_CV = head(backbone, plan, hidden_CD)
        picked_C = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1).squeeze(-1)
        return (mx.logsumexp(logits_CV, axis=-1) - picked_C) * weights_C

    parameters = module.trainable_parameters()
    run = in_pieces(with_parameters(module, parameters, losses), _chunk_rows(plan), axis=0)
    return run(parameters, hidden_RD, targets_R, weights_R).sum()


def _chunk_rows(plan: Plan) -> int:
    return max(_LEAST_ROWS, _CHUNK_BYTES // (4 * plan.vocab_size) // 64 * 64)


def _capped_exps(
    logits_CV: mx.array, softcap: float | None
) -> tuple[mx.array | float, mx.array, mx.array]:
    """(shift, softcapped logits, exp(softcapped - shift)), float32.

    A small cap bounds the exponent by itself, and saves the pass that finds the largest logit.
    """
    if softcap is not None and softcap <= _SAFE_EXPONENT:
        return 0.0, *_cap_and_exp(logits_CV, mx.array(softcap))
    capped = logits_CV.astype(mx.float32)
    if softcap is not None:
        capped = mx.tanh(capped / softcap) * softcap
    top = capped.max(axis=-1, keepdims=True)
    return top, capped, mx.exp(capped - top)


@partial(mx.compile, shapeless=True)
def _cap_and_exp(logits_CV: mx.array, softcap: mx.array) -> tuple[mx.array, mx.array]:
    capped = mx.tanh(logits_CV.astype(mx.float32) / softcap) * softcap
    return capped, mx.exp(capped)


def _flow(capped: mx.array, p: mx.array, weights: mx.array, softcap: float | None) -> mx.array:
    """p * weight * d capped / d logits."""
    if softcap is None:
        return p * weights
    return _capped_flow(capped, p, weights, mx.array(1 / softcap))


@partial(mx.compile, shapeless=True)
def _capped_flow(
    capped: mx.array, p: mx.array, weights: mx.array, inverse_cap: mx.array
) -> mx.array:
    return p * (1 - mx.square(capped * inverse_cap)) * weights


def _knows(module: nn.Module) -> bool:
    kinds = (nn.Embedding, nn.Linear, nn.QuantizedEmbedding, nn.QuantizedLinear)
    return type(module) in kinds and "bias" not in module


def _project(module: nn.Module, hidden_CD: mx.array) -> mx.array:
    """(C, D) -> logits (C, V)."""
    return module.as_linear(hidden_CD) if hasattr(module, "as_linear") else module(hidden_CD)


def _project_back(module: nn.Module, flow_CV: mx.array) -> mx.array:
    """(C, V) -> (C, D): the gradient of `_project`."""
    if "scales" not in module:
        return flow_CV @ module.weight
    return mx.quantized_matmul(
        flow_CV,
        module.weight,
        module.scales,
        module.get("biases"),
        transpose=False,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


def _head_rows(module: nn.Module, targets_C: mx.array) -> mx.array:
    """Rows of the head (C, D)."""
    if "scales" not in module:
        return module.weight[targets_C]
    biases = module.get("biases")
    return mx.dequantize(
        module.weight[targets_C],
        module.scales[targets_C],
        biases[targets_C] if biases is not None else None,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
