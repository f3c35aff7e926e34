"""LoRA on our side equals PEFT's on transformers': logits, loss and every adapter gradient."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import assert_same_grads, make_lora_nonzero, small_budgets, worst_gap
from mlx.utils import tree_map
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from reference import UNIFIED, build_reference, note, random_batch
from test_exact import GRADS, LOSS, assert_logits, load

import mlx_gemma4 as g4
from mlx_gemma4.model.names import flat
from mlx_gemma4.train.optim import make_optimizer

SHAPES = ["dense", "e2b", "e4b", "moe", "text", "unified"] if UNIFIED else [
    "dense", "e2b", "e4b", "moe", "text"
]  # fmt: skip


@pytest.fixture(params=SHAPES)
def reference(request, tmp_path):
    """A reference of its own, since PEFT changes the model that it is given."""
    return build_reference(request.param, tmp_path / "model")


@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_every_adapter_gradient(reference, lean, monkeypatch):
    """Lean: attention and loss in several blocks, every layer run again."""
    small_budgets(monkeypatch)
    gemma = load(reference)
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=4, alpha=6.0))
    make_lora_nonzero(gemma)
    peft_model = with_the_same_lora(gemma, reference)
    batch = random_batch(T=150, padded=True)

    wanted_sum = reference.loss_sum(batch)
    wanted_sum.backward()
    wanted_loss = float(wanted_sum.detach())
    loss, _, grads = g4.loss_and_grads(
        gemma, batch, rematerialize=lean, attention="blockwise" if lean else "plain"
    )

    assert_logits(gemma, reference, batch)
    assert abs(float(loss) - wanted_loss) < LOSS * wanted_loss
    wanted = {
        ours_name(name): parameter.grad.numpy().T
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }
    ours = {name.removeprefix("language_model."): grad for name, grad in flat(grads).items()}
    note("LoRA gradient", reference, worst_gap(ours, wanted)[1], GRADS)
    assert_same_grads(ours, wanted, GRADS)


def peft_config(use_dora: bool = False) -> PeftConfig:
    return PeftConfig(
        r=4,
        lora_alpha=6.0,
        target_modules=r".*layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        use_dora=use_dora,
    )


def with_the_same_lora(gemma, reference):
    """PEFT on the reference, with our adapter's values."""
    peft_model = get_peft_model(reference.model, peft_config())
    values = flat(gemma.backbone.trainable_parameters())
    values = {name.removeprefix("language_model."): value for name, value in values.items()}
    named = {n: p for n, p in peft_model.named_parameters() if "lora_" in n}
    assert {ours_name(name) for name in named} == set(values)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.tensor(np.array(values[ours_name(name)].T)))
    return peft_model


def ours_name(name: str) -> str:
    """`base_model.model.model.language_model.layers.0....lora_A.default.weight`, as we call it."""
    inner = name[name.index("layers.") :].replace("lora_magnitude_vector.default.weight", "m")
    inner = inner.replace(".default.weight", "")
    return "model." + inner.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_gives_each_parameter_pefts_rate(tmp_path, use_dora):
    reference = build_reference("e2b", tmp_path / "model")
    gemma = load(reference)
    gemma.add_lora(g4.LoraConfig(rank=4, use_dora=use_dora))
    config = g4.TrainConfig(optimizer="sgd", learning_rate=1e-3, lora_plus_ratio=16)
    before = gemma.backbone.trainable_parameters()
    optimizer = make_optimizer(config, 10, before)
    after = flat(optimizer.apply_gradients(tree_map(mx.ones_like, before), before))
    ours = {
        name.removeprefix("language_model."): float((value - after[name]).mean())
        for name, value in flat(before).items()
    }

    peft_model = get_peft_model(reference.model, peft_config(use_dora))
    theirs = create_loraplus_optimizer(peft_model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    wanted = {
        ours_name(name): rates[id(parameter)]
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }
    assert ours == pytest.approx(wanted, rel=1e-3)


def test_experts_against_weights_with_the_delta_merged(tmp_path):
    """`experts` targets: the adapted model equals one whose expert weights carry the update."""
    reference = build_reference("moe", tmp_path / "model")
    gemma = load(reference)
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=4, alpha=6.0, targets=("experts",)))
    make_lora_nonzero(gemma)
    with torch.no_grad():
        for index, layer in enumerate(reference.text.layers):
            glu = gemma.backbone.language_model.model.layers[index].experts.switch_glu
            delta = {}
            for part in ("gate_proj", "up_proj", "down_proj"):
                lora = getattr(glu, part)
                delta[part] = np.array(lora.scale * mx.matmul(lora.lora_b, lora.lora_a))
            gate_up = np.concatenate([delta["gate_proj"], delta["up_proj"]], axis=1)
            layer.experts.gate_up_proj += torch.tensor(gate_up)
            layer.experts.down_proj += torch.tensor(delta["down_proj"])
    assert_logits(gemma, reference, random_batch())
