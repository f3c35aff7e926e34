"""The head: a log-probability for every target, without the logits of all of them at once.

Objectives are functions of these log-probabilities (objectives/). The head has the largest output
of the model. Where it does not train, it is read once, a slab of the vocabulary at a time: the
softcap bounds every logit, so their exponentials are summed as they are, and the sum, known at the
end, divides what belongs to it. A slab's logits give its share of the gradient with respect to the
hidden states too, which is all that waits for the backward pass, where it is multiplied by the
cotangent of each target. Any other head meets the hidden states a chunk at a time, and once more in
the backward pass.

Shapes: D model, V vocabulary, S rows of the head in a slab, R targets, C targets of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.names import flat, lm_head, text_model
from ..model.plan import Plan
from .batch import Batch, StepOptions
from .budgets import Budgets
from .forward import Model, forward
from .remat import in_pieces, with_parameters

_SAFE_EXPONENT = 30.0
"""exp of it and of its negative, times a hidden state and summed over any vocabulary, are far from
the ends of float32 and bfloat16."""


def batch_log_probs(
    gemma: Model, batch: Batch, options: StepOptions = StepOptions(), *, gradient: bool = True
) -> mx.array:
    """Log-probabilities (R,) of a batch's targets, float32.

    Args:
        gemma: a `Gemma4`.
        options: how the pass is computed.
        gradient: whether they will be differentiated; without, half of the head's work is saved.
    """
    hidden_BTD = forward(gemma, batch, options)
    return target_log_probs(gemma, hidden_BTD, batch, options.budgets, gradient=gradient)


def target_log_probs(
    gemma: Model,
    hidden_BTD: mx.array,
    batch: Batch,
    budgets: Budgets | None = None,
    *,
    gradient: bool = True,
) -> mx.array:
    """`batch_log_probs` of final hidden states (B, T, D)."""
    hidden_RD = _of_targets(hidden_BTD, batch)
    return token_log_probs(gemma, hidden_RD, batch.targets_R, budgets, gradient=gradient)


def token_log_probs(
    gemma: Model,
    hidden_RD: mx.array,
    targets_R: mx.array,
    budgets: Budgets | None = None,
    *,
    gradient: bool = True,
) -> mx.array:
    """log p(target) of each hidden state, (R,) in float32.

    Args:
        gemma: a `Gemma4`, whose head may be tied or not, quantized, adapted or trained.
        hidden_RD: final hidden states, after the last norm.
        targets_R: the token to predict from each.
        budgets: say how much of the head is read at a time; default: those of this device.
        gradient: as in `batch_log_probs`.
    """
    module, budgets = _head_module(gemma), budgets or Budgets.here()
    if _has_slabs(module, gemma.plan, hidden_RD.dtype):
        size = budgets.slab(gemma.plan.vocab_size, targets_R.size)
        return _by_slabs(module, gemma.plan, hidden_RD, targets_R, size, gradient)

    def log_probs(hidden_CD: mx.array, targets_C: mx.array) -> mx.array:
        logits_CV = logits(gemma, hidden_CD)
        picked_C = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1).squeeze(-1)
        return picked_C - mx.logsumexp(logits_CV, axis=-1)

    # A chunk's logits are made again in the backward pass, where its share of the head's own
    # gradient is added up.
    parameters = module.trainable_parameters()
    size = budgets.chunk(gemma.plan.vocab_size)
    run = in_pieces(with_parameters(module, parameters, log_probs), size, axis=0)
    return run(parameters, hidden_RD, targets_R)


def batch_scores(
    gemma: Model, batch: Batch, options: StepOptions = StepOptions()
) -> tuple[mx.array, mx.array]:
    """For a batch's targets (log p, whether it is the likeliest token), each (R,); no gradient."""
    hidden_RD = _of_targets(forward(gemma, batch, options), batch)
    size = options.budgets.chunk(gemma.plan.vocab_size)
    parts: list[tuple[mx.array, mx.array]] = []
    for start in range(0, batch.targets_R.size, size):
        targets_C = batch.targets_R[start : start + size]
        if parts:
            (hidden_RD,) = mx.depends([hidden_RD], list(parts[-1]))  # one chunk is alive at a time
        logits_CV = logits(gemma, hidden_RD[start : start + size])
        picked_C = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1).squeeze(-1)
        is_top_C = mx.argmax(logits_CV, axis=-1) == targets_C
        parts.append((picked_C - mx.logsumexp(logits_CV, axis=-1), is_top_C))
    log_probs, is_top = zip(*parts)
    return mx.concatenate(list(log_probs)), mx.concatenate(list(is_top))


def _of_targets(hidden_BTD: mx.array, batch: Batch) -> mx.array:
    """The final hidden state (R, D) that each target is predicted from."""
    hidden_RD = hidden_BTD.flatten(0, 1)
    return hidden_RD if batch.positions_R is None else hidden_RD[batch.positions_R]


def logits(gemma: Model, hidden: mx.array) -> mx.array:
    """Logits (..., V) in float32 of final hidden states (..., D), softcapped."""
    return _capped(_project(_head_module(gemma), hidden), gemma.plan.softcap)


def _head_module(gemma: Model) -> Any:
    if gemma.plan.tied:
        return text_model(gemma.backbone).embed_tokens
    return lm_head(gemma.backbone)


def _has_slabs(module: nn.Module, plan: Plan, dtype: mx.Dtype) -> bool:
    """Whether the head is frozen and plain, and exponentials of its logits fit in `dtype`."""
    kinds = (nn.Embedding, nn.Linear, nn.QuantizedEmbedding, nn.QuantizedLinear)
    frozen = type(module) in kinds and not flat(module.trainable_parameters())
    bounded = plan.softcap is not None and plan.softcap <= _SAFE_EXPONENT and dtype != mx.float16
    return frozen and bounded and "bias" not in module


def _by_slabs(
    module: nn.Module,
    plan: Plan,
    hidden_RD: mx.array,
    targets_R: mx.array,
    size: int,
    gradient: bool,
) -> mx.array:
    """Log-probabilities, and their gradient if it is asked for, in one pass over a frozen head.

    Args:
        size: rows of the head in a slab.
    """
    assert plan.softcap is not None
    softcap, inverse_cap = mx.array(plan.softcap), mx.array(1 / plan.softcap)
    targets_R1 = targets_R[:, None]

    @mx.custom_function
    def log_probs_and_grads(hidden_RD: mx.array) -> tuple[mx.array, mx.array]:
        sums_R1, found_R1 = list[mx.array](), list[mx.array]()  # of each slab
        expected_RD = mx.zeros(hidden_RD.shape)  # under exp(logits), not divided by their sum yet
        done: list[mx.array] = []
        for start in range(0, plan.vocab_size, size):
            slab_SD = _head_rows(module, slice(start, start + size), hidden_RD.dtype)
            (hidden_RD,) = mx.depends([hidden_RD], done)  # one slab is alive at a time
            logits_RS = hidden_RD @ slab_SD.T
            within_R1 = mx.minimum(targets_R1 % size, logits_RS.shape[1] - 1)
            found_R1.append(mx.take_along_axis(logits_RS, within_R1, axis=1))
            exps_RS = _exps(logits_RS, softcap)
            sums_R1.append(exps_RS.sum(axis=1, keepdims=True))
            done = [found_R1[-1], sums_R1[-1]]
            if gradient:
                flow_RS = _flow(exps_RS, inverse_cap).astype(slab_SD.dtype)
                expected_RD = expected_RD + flow_RS @ slab_SD
                done.append(expected_RD)
        sum_R1 = mx.concatenate(sums_R1, axis=1).sum(axis=1, keepdims=True)
        picked_R1 = mx.take_along_axis(mx.concatenate(found_R1, axis=1), targets_R1 // size, axis=1)
        picked_R1 = _capped(picked_R1, plan.softcap)
        # d log p / d logits = (onehot(target) - p) * slope of the cap.
        target_rows_RD = _head_rows(module, targets_R, hidden_RD.dtype)
        rows_RD = (1 - mx.square(picked_R1 * inverse_cap)) * target_rows_RD
        grads_RD = (expected_RD / sum_R1 - rows_RD).astype(hidden_RD.dtype)
        return (picked_R1 - mx.log(sum_R1)).squeeze(1), grads_RD

    @log_probs_and_grads.vjp
    def vjp(hidden_RD: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]):
        return (-cotangents[0][:, None] * outputs[1]).astype(outputs[1].dtype)

    outputs: Any = log_probs_and_grads(hidden_RD)
    return outputs[0]


@partial(mx.compile, shapeless=True)
def _exps(logits: mx.array, softcap: mx.array) -> mx.array:
    return mx.exp(mx.tanh(logits.astype(mx.float32) / softcap) * softcap)


@partial(mx.compile, shapeless=True)
def _flow(exps: mx.array, inverse_cap: mx.array) -> mx.array:
    """Times the slope of the cap. The softcapped logits, their logarithms, are not kept."""
    return exps * (1 - mx.square(mx.log(exps) * inverse_cap))


def _capped(logits: mx.array, softcap: float | None) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits if softcap is None else mx.tanh(logits / softcap) * softcap


def _project(module: nn.Module, hidden: mx.array) -> mx.array:
    """(..., D) -> (..., V)."""
    return module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)


def _head_rows(module: nn.Module, which: slice | mx.array, dtype: mx.Dtype) -> mx.array:
    """Rows of the head (S, D), unpacked to a dtype: some modes of MLX would unpack to bfloat16."""
    tensors = [module[name][which] for name in ("weight", "scales", "biases") if name in module]
    if len(tensors) == 1:
        return tensors[0]
    packing = {name: getattr(module, name) for name in ("group_size", "bits", "mode")}
    return mx.dequantize(*tensors, **packing).astype(dtype)
