"""The load-balancing loss against Mixtral's in transformers: value and gradient."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch
from helpers import relative_gap
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mlx_gemma4.nn.routing import balance_loss, router_sums


def test_load_balancing_loss():
    scores = np.random.default_rng(0).normal(0, 2, (3, 2, 40, 16)).astype(np.float32)
    scores[..., 5] += 1.5
    for padding in (0, 11):
        real = np.ones((2, 40), bool)
        real[1, 40 - padding :] = False

        def ours(scores, real=mx.array(real)):
            return balance_loss(mx.stack([router_sums(layer, 4, real) for layer in scores]), 4)

        value, gradient = mx.value_and_grad(ours)(mx.array(scores))
        theirs = torch.tensor(scores, requires_grad=True)
        gates = tuple(layer.flatten(0, 1) for layer in theirs)
        loss = load_balancing_loss_func(gates, 16, 4, torch.tensor(real).long())
        loss.backward()
        assert relative_gap(value, loss.item()) < 1e-6
        assert relative_gap(gradient, theirs.grad) < 1e-5
