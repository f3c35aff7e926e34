"""Adapters in transformers and PEFT: ours loaded there, theirs loaded here, and merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapters import EXPERTS, KINDS, trained
from helpers import make_lora_nonzero
from media import ROWS, rows_with
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from reference import UNIFIED, VOCAB, Reference, add_tokenizer, build_reference, note

import mlx_gemma4 as g4
from mlx_gemma4.export import export
from mlx_gemma4.lora.formats.transformers import TransformersLibrary

LOGITS = 1e-4
SHAPES = ["dense", "e2b", "e4b", "moe", "text", *["unified"] * UNIFIED]
TOKENS = np.random.default_rng(5).integers(120, VOCAB, (2, 50))
EVERY = [
    *[(shape, "lora") for shape in SHAPES],
    *[("e2b", kind) for kind in KINDS if kind != "lora"],
    *[("moe", kind) for kind in ("dora", *EXPERTS)],
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints by shape, with small encoders, as transformers saves them."""

    class Lazily(dict):
        def __missing__(self, shape: str) -> Path:
            self[shape] = tmp_path_factory.mktemp(shape) / "model"
            build_reference(shape, self[shape], encoders=shape != "text")
            add_tokenizer(self[shape])
            return self[shape]

    return Lazily()


def theirs(base: Path, adapter: Path | None, causal: bool = False):
    model = TransformersLibrary(causal).load(base)
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(model, adapter).eval()


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS), use_cache=False).logits.float().numpy()


def gap(ours: g4.Gemma4, model) -> float:
    return float(np.abs(np.array(ours.logits(mx.array(TOKENS))) - logits(model)).max())


@pytest.mark.parametrize(("shape", "kind"), EVERY)
def test_peft_gives_our_logits(bases, tmp_path, shape, kind):
    """The adapter is loaded by hand here, besides what verify does."""
    gemma = trained(bases[shape], {**KINDS, **EXPERTS}[kind])
    (proof,) = export(gemma, tmp_path / "out", "peft")
    assert proof.by and proof.by.startswith("peft "), proof
    assert proof.difference < LOGITS and proof.moved_by > 0.1
    worst = gap(gemma, theirs(bases[shape], tmp_path / "out"))
    note("PEFT adapter", Reference(shape, None, bases[shape]), worst, LOGITS)
    assert worst < LOGITS


@pytest.mark.parametrize(("shape", "kind"), [("e2b", "dora"), ("moe", "experts"), ("text", "lora")])
def test_the_causal_class(bases, tmp_path, shape, kind):
    gemma = trained(bases[shape], {**KINDS, **EXPERTS}[kind])
    (proof,) = export(gemma, tmp_path / "out", "peft-causal")
    assert proof.by, proof
    model = theirs(bases[shape], tmp_path / "out", causal=True)
    assert type(model.base_model.model).__name__.endswith("ForCausalLM")
    assert gap(gemma, model) < LOGITS


def test_no_encoder_is_adapted(bases, tmp_path):
    gemma = trained(bases["e2b"], KINDS["lora"])
    export(gemma, tmp_path / "out", "peft", verify=False)
    model = theirs(bases["e2b"], tmp_path / "out")
    adapted = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert adapted and not [name for name in adapted if "tower" in name]
    encoders = [n for n, _ in model.named_modules() if "vision_tower" in n and n.endswith("q_proj")]
    assert encoders, "the base has an encoder with the same short names"


# ---------------------------------------------------------------- PEFT's own adapters

TEXT = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
THEIR_KINDS = {
    "lora": {"target_modules": TEXT},
    "rslora-dora": {"target_modules": TEXT, "use_rslora": True, "use_dora": True},
    # The encoder has no layer 2: PEFT refuses the short names of its modules.
    "some-layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2, 4]},
    "patterns": {
        "target_modules": TEXT,
        "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 5},
        "alpha_pattern": {"mlp.up_proj": 9},
    },
}
THEIR_EXPERTS = {
    "experts": {
        "target_modules": TEXT,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "gate-up": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "down": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "ranks": {
        "target_modules": TEXT,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 3, "k_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 5},
        "use_rslora": True,
    },
}


def their_adapter(base: Path, folder: Path, **settings):
    """An adapter that PEFT made, with random values in every tensor, and the model with it."""
    torch.manual_seed(3)
    model = get_peft_model(theirs(base, None), PeftConfig(r=4, lora_alpha=6, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*[("e2b", kind) for kind in THEIR_KINDS], *[("moe", kind) for kind in THEIR_EXPERTS]],
)
def test_an_adapter_of_pefts_loads_here(bases, tmp_path, shape, kind):
    settings = {**THEIR_KINDS, **THEIR_EXPERTS}[kind]
    model = their_adapter(bases[shape], tmp_path / "theirs", **settings)
    gemma = g4.load(bases[shape], adapter=tmp_path / "theirs")
    assert gap(gemma, model) < LOGITS
    assert gap(g4.load(bases[shape]), model) > 0.05
    (proof,) = export(gemma, tmp_path / "again", "peft")
    assert proof.difference < LOGITS
    export(gemma, tmp_path / "mlx", "mlx-lm", verify=False)
    assert gap(g4.load(bases[shape], adapter=tmp_path / "mlx"), model) < LOGITS


def test_what_is_left_of_pefts_adapter_is_named(bases, tmp_path):
    their_adapter(
        bases["e2b"],
        tmp_path / "theirs",
        target_modules=TEXT,
        modules_to_save=["per_layer_model_projection"],
    )
    with pytest.raises(g4.AdapterError, match=r"unexpected .*per_layer_model_projection"):
        g4.load(bases["e2b"], adapter=tmp_path / "theirs")


# ---------------------------------------------------------------- encoders

ENCODERS = ("q_proj", "vision_tower", "embed_vision")
IN_ENCODERS = (
    r".*vision_tower.*\.(q_proj|down_proj)\.linear|.*language_model.*v_proj"
    r"|.*embed_vision.*_projection"
)


def shown(unified: bool = False) -> dict:
    """A row with an image, as both models take it."""
    return rows_with(ROWS["images"], VOCAB, unified)


def media_gap(ours: g4.Gemma4, model) -> float:
    """The largest difference of logits on a row with images."""
    inputs = shown()
    names = [name for name in inputs if name not in ("tokens", "weights")]
    mine = ours.logits(mx.array(inputs["tokens"]), **{name: inputs[name] for name in names})
    with torch.no_grad():
        told = {name: torch.tensor(inputs[name]) for name in names}
        ids = torch.tensor(inputs["tokens"])
        logits = model(input_ids=ids, use_cache=False, **told).logits.float().numpy()
    return float(np.abs(np.array(mine) - logits).max())


@pytest.mark.skipif(not UNIFIED, reason="this transformers has other image masks")
@pytest.mark.parametrize("shape", ["e2b", "moe"])
def test_adapters_of_encoders(bases, tmp_path, shape):
    """There and back, loaded by PEFT, merged there and fused here; names are those of PEFT."""
    base = bases[shape]
    gemma = g4.load(base, encoders=True)
    gemma.add_lora(g4.LoraConfig(rank=2, targets=ENCODERS))
    make_lora_nonzero(gemma, size=0.2)
    export(gemma, tmp_path / "out", "peft", verify=False)
    names = dict(mx.load(str(tmp_path / "out" / "adapter_model.safetensors")))
    first = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    assert f"{first}.linear.lora_A.weight" in names
    model = theirs(base, tmp_path / "out")
    assert media_gap(gemma, model) < LOGITS
    assert media_gap(g4.load(base, encoders=True), model) > 100 * LOGITS
    again = g4.load(base, adapter=tmp_path / "out", encoders=True)
    assert media_gap(again, model) < LOGITS
    export(gemma, tmp_path / "fused", "fused", verify=False)
    assert media_gap(gemma, TransformersLibrary().load(tmp_path / "fused")) < LOGITS
    assert media_gap(g4.load(tmp_path / "fused", encoders=True), model) < LOGITS


@pytest.mark.skipif(not UNIFIED, reason="this transformers has other image masks")
def test_an_adapter_of_pefts_on_encoders_loads_here(bases, tmp_path):
    model = their_adapter(bases["e2b"], tmp_path / "theirs", target_modules=IN_ENCODERS)
    gemma = g4.load(bases["e2b"], adapter=tmp_path / "theirs", encoders=True)
    assert media_gap(gemma, model) < LOGITS
    with pytest.raises(g4.AdapterError, match="do not fit"):
        g4.load(bases["e2b"], adapter=tmp_path / "theirs")


# ---------------------------------------------------------------- merged


@pytest.mark.parametrize(("shape", "kind"), [("e2b", "dora"), ("moe", "experts")])
def test_peft_merges_to_our_fused_model(bases, tmp_path, shape, kind):
    gemma = trained(bases[shape], {**KINDS, **EXPERTS}[kind])
    export(gemma, tmp_path / "adapter", "peft", verify=False)
    merged = theirs(bases[shape], tmp_path / "adapter").merge_and_unload().state_dict()
    export(gemma, tmp_path / "fused", "fused", verify=False)
    fused = TransformersLibrary().load(tmp_path / "fused").state_dict()
    assert set(fused) == set(merged)
    for name, value in merged.items():
        assert torch.allclose(fused[name], value, rtol=0, atol=1e-5), name


def test_a_swapped_pair_shows_in_the_logits(bases, tmp_path):
    """The comparison fails where gate and up change places in the experts' B."""
    gemma = trained(bases["moe"], EXPERTS["experts"])
    export(gemma, tmp_path / "out", "peft", verify=False)
    path = tmp_path / "out" / "adapter_model.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    for name in [name for name in weights if "base_layer.lora_B" in name]:
        gate, up = mx.split(weights[name], 2, axis=0)
        weights[name] = mx.concatenate([up, gate], axis=0)
    mx.save_safetensors(str(path), weights)
    assert gap(gemma, theirs(bases["moe"], tmp_path / "out")) > 10 * LOGITS


def test_dora_trains_as_pefts_does(tmp_path):
    """Loss and the gradient of every tensor of DoRA, magnitudes included, with rsLoRA's scale."""
    from helpers import assert_same_grads
    from reference import random_batch
    from test_exact import LOSS, load

    from mlx_gemma4.model.names import flat

    reference = build_reference("e2b", tmp_path / "model")
    gemma = load(reference)
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=4, alpha=6.0, use_dora=True, use_rslora=True))
    make_lora_nonzero(gemma)
    export(gemma, tmp_path / "out", "peft", verify=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["inference_mode"]
    model = PeftModel.from_pretrained(reference.model, tmp_path / "out", is_trainable=True)
    batch = random_batch()
    wanted_sum = reference.loss_sum(batch)
    wanted_sum.backward()
    loss, _, grads = g4.loss_and_grads(gemma, batch)
    assert abs(float(loss) - float(wanted_sum)) < LOSS * float(wanted_sum)
    ends = {"lora_A.default.weight": "lora_a", "lora_B.default.weight": "lora_b"}
    wanted = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = name[name.index("layers.") :]
            path, part = inner.split(".lora_", 1)
            part = ends.get("lora_" + part, "m")
            grad = parameter.grad.numpy()
            wanted[f"language_model.model.{path}.{part}"] = grad.T
    assert_same_grads(flat(grads), wanted)
