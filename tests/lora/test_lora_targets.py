"""Which modules LoRA adapts, and adapters on disk: whole, or refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers import CHAT, make_lora_nonzero, relative_gap, some_tokens, write_rows
from mlx.utils import tree_flatten

import mlx_gemma4 as g4
from mlx_gemma4.lora.attach import adapted_modules
from mlx_gemma4.lora.state import save_adapter
from mlx_gemma4.lora.targets import adaptable_modules
from mlx_gemma4.memory import estimate
from mlx_gemma4.model.names import flat

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {f"experts.switch_glu.{name}_proj" for name in ("gate", "up", "down")}
ROUND_TRIPS = {
    "e2b": ("e2b", {}),
    "moe": ("moe", {"targets": ("experts", "q_proj")}),
    "last-layers": ("dense", {"num_layers": 2}),
    "one-path": ("e2b", {"targets": ("per_layer_input_gate",), "rank": 2, "alpha": 5.0}),
    "dropout": ("e2b", {"dropout": 0.25}),
    "all-linear": ("moe", {"targets": ("all-linear",), "rank": 2}),
}


@pytest.fixture(params=ROUND_TRIPS)
def saved(request, checkpoints, tmp_path):
    """A model with an adapter that does something, its checkpoint, and the adapter on disk."""
    shape, settings = ROUND_TRIPS[request.param]
    gemma = with_lora(checkpoints[shape], **settings)
    return gemma, checkpoints[shape], save(gemma, tmp_path / "adapter")


@pytest.fixture
def adapter(tiny, tmp_path) -> Path:
    return save(with_lora(tiny, rank=2), tmp_path / "adapter")


def with_lora(checkpoint: Path, **settings) -> g4.Gemma4:
    gemma = g4.load(checkpoint)
    gemma.add_lora(g4.LoraConfig(**settings))
    make_lora_nonzero(gemma)
    return gemma


def save(gemma: g4.Gemma4, folder: Path) -> Path:
    save_adapter(gemma.backbone, folder, gemma.lora, gemma.name)
    return folder


def trainable(gemma: g4.Gemma4) -> dict[str, np.ndarray]:
    return {n: np.array(v) for n, v in flat(gemma.backbone.trainable_parameters()).items()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def change_tensors(adapter: Path, change) -> None:
    """Rewrite an adapter's tensors, a mapping by name."""
    path = adapter / "adapters.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path), weights)


def change_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(checkpoint: Path, adapter: Path) -> g4.AdapterError:
    with pytest.raises(g4.AdapterError) as error:
        g4.load(checkpoint, adapter=adapter)
    return error.value


@pytest.fixture(scope="session")
def as_mlx_lm_loads_it(checkpoints, tmp_path_factory):
    """Checkpoints with dead K/V on shared layers, as Google ships them and every mlx-lm loads."""
    folder = tmp_path_factory.mktemp("with-dead-kv") / "e2b"
    shutil.copytree(checkpoints["e2b"], folder)
    stored = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(stored)
    plan = g4.load(folder).plan
    for layer in plan.layers:
        if layer.shares_kv:
            for name in ("k_proj", "v_proj", "k_norm"):
                part = f"layers.{layer.kv_source}.self_attn.{name}.weight"
                dead = f"layers.{layer.index}.self_attn.{name}.weight"
                outer = "model.language_model."
                stored[outer + dead] = 1 + stored[outer + part]
    mx.save_safetensors(str(folder / "model.safetensors"), stored, {"format": "pt"})
    return {**checkpoints, "e2b": folder}


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ("e2b", {"q": 6, "k": 3, "v": 3, "o": 6, "gate": 6, "up": 6, "down": 6}),
        ("e4b", {"q": 8, "k": 5, "v": 5, "o": 8, "gate": 8, "up": 8, "down": 8}),
        ("moe", {"q": 6, "k": 6, "v": 4, "o": 6, "gate": 6, "up": 6, "down": 6}),
        ("dense", {"q": 6, "k": 6, "v": 4, "o": 6, "gate": 6, "up": 6, "down": 6}),
        ("unified", {"q": 6, "k": 6, "v": 4, "o": 6, "gate": 6, "up": 6, "down": 6}),
    ],
)
def test_defaults_adapt_attention_and_mlp_where_they_are(checkpoints, shape, counts):
    gemma = g4.load(checkpoints[shape])
    told = gemma.add_lora()
    assert {path.split(".")[1].removesuffix("_proj"): n for path, n in told.items()} == counts
    assert set(told) == ATTENTION | MLP
    assert Counter(told) == adapted_modules(gemma.backbone)


def test_nothing_but_lora_trains(checkpoints, shape):
    gemma = g4.load(checkpoints[shape])
    gemma.add_lora()
    names = list(flat(gemma.backbone.trainable_parameters()))
    assert names
    assert all(name.endswith((".lora_a", ".lora_b")) for name in names)
    never = ("router", "per_layer", "experts", "tower", "embed", "norm", "layer_scalar")
    assert [name for name in names if any(part in name for part in never)] == []


def test_a_fresh_adapter_changes_nothing(tiny):
    gemma = g4.load(tiny)
    tokens = some_tokens(gemma.plan.vocab_size)
    before = np.array(gemma.logits(tokens))
    gemma.add_lora()
    assert np.array_equal(np.array(gemma.logits(tokens)), before)


def test_shapes_and_scale_are_those_of_the_config(tiny):
    gemma = with_lora(tiny, rank=3, alpha=6.0, targets=("q_proj",))
    q_proj = gemma.backbone.language_model.model.layers[0].self_attn.q_proj
    assert (q_proj.lora_a.shape, q_proj.lora_b.shape) == ((64, 3), (3, 64))
    assert q_proj.scale == 2.0


def test_short_names_mean_attention_and_the_dense_mlp(checkpoints):
    gemma = g4.load(checkpoints["moe"])
    assert gemma.add_lora(g4.LoraConfig(targets=("up_proj", "o_proj"))) == {
        "mlp.up_proj": 6,
        "self_attn.o_proj": 6,
    }


def test_experts_are_the_three_projections_of_every_expert(checkpoints):
    gemma = g4.load(checkpoints["moe"])
    told = gemma.add_lora(g4.LoraConfig(rank=2, targets=("experts",)))
    assert told == dict.fromkeys(EXPERTS, 6)
    shapes = {
        name.split("switch_glu.")[1]: value.shape
        for name, value in flat(gemma.backbone.trainable_parameters()).items()
    }
    assert shapes["gate_proj.lora_a"] == (8, 2, 64)
    assert shapes["down_proj.lora_b"] == (8, 64, 2)


def test_a_path_within_a_layer_is_a_target(tiny):
    gemma = g4.load(tiny)
    targets = ("per_layer_input_gate", "self_attn.q_proj")
    assert gemma.add_lora(g4.LoraConfig(targets=targets)) == {
        "per_layer_input_gate": 6,
        "self_attn.q_proj": 6,
    }


def test_all_linear_is_every_module_and_the_estimate_agrees(checkpoints, shape):
    gemma = g4.load(checkpoints[shape])
    known = adaptable_modules(gemma.backbone)
    lora = g4.LoraConfig(rank=2, targets=("all-linear",), rank_pattern={"all-linear": 3})
    told = gemma.add_lora(lora)
    known = {module: size for module, size in known.items() if module[1] != "router.proj"}
    assert told == Counter(path for _, path in known)
    values = sum(value.size for value in flat(gemma.backbone.trainable_parameters()).values())
    sizes = [math.prod(shape[:-2]) * (shape[-1] + shape[-2]) for shape in known.values()]
    assert values == 3 * sum(sizes)
    assert estimate._adapters(gemma.plan, lora) == 4 * values


PRESETS = {
    "attention": ATTENTION,
    "mlp": MLP,
    "experts": EXPERTS,
    "ple-projections": {"per_layer_input_gate", "per_layer_projection"},
}


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ("moe", ("attention",)),
        ("moe", ("mlp",)),
        ("moe", ("experts", "attention")),
        ("e2b", ("ple-projections", "mlp")),
    ],
)
def test_presets(checkpoints, shape, targets):
    gemma = g4.load(checkpoints[shape])
    lora = g4.LoraConfig(rank=2, targets=targets, rank_pattern={targets[0]: 3})
    told = gemma.add_lora(lora)
    assert set(told) == set().union(*(PRESETS[target] for target in targets))
    ranks = {
        (name.split("layers.")[1].split(".", 1)[1].removesuffix(".lora_b"), value.shape)
        for name, value in flat(gemma.backbone.trainable_parameters()).items()
        if name.endswith("lora_b")
    }
    for path, size in ranks:
        rank = size[-1] if len(size) == 3 else size[0]
        assert rank == (3 if path in PRESETS[targets[0]] else 2), path
    values = sum(value.size for value in flat(gemma.backbone.trainable_parameters()).values())
    assert estimate._adapters(gemma.plan, lora) == 4 * values


def test_the_router_is_adapted_by_its_name_alone_with_a_warning(checkpoints, tmp_path):
    data = write_rows(tmp_path / "rows", train=CHAT[:1])
    notes = {}
    for targets in (("all-linear",), ("q_proj", "router.proj")):
        gemma = g4.load(checkpoints["moe"])
        config = g4.TrainConfig(iters=1, rematerialize="none")
        lora = g4.LoraConfig(rank=2, targets=targets)
        run = g4.finetune(gemma, g4.read(data, gemma), config, lora=lora, console=False)
        notes[targets] = [note for note in run.notes if "router.proj is adapted" in note]
        assert ("router.proj" in adapted_modules(gemma.backbone)) == bool(notes[targets])
    assert [len(found) for found in notes.values()] == [0, 1]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("0-2", {0, 1, 2}), ("5,0", {0, 5}), (3, {3}), ("1-2,4-4", {1, 2, 4}), ("0-5", set(range(6)))],
)
def test_layers_by_number_and_range(tiny, tmp_path, layers, wanted):
    gemma = with_lora(tiny, rank=2, layers=layers)
    assert layers_with_lora(gemma) == wanted
    again = g4.load(tiny, adapter=save(gemma, tmp_path / "adapter"))
    assert_same(trainable(again), trainable(gemma))
    values = sum(value.size for value in flat(gemma.backbone.trainable_parameters()).values())
    assert estimate._adapters(gemma.plan, gemma.lora) == 4 * values
    plan = gemma.plan
    ranked = {layer.index for layer in plan.layers if estimate._ranks(plan, layer, gemma.lora)}
    assert ranked == wanted


def test_layers_that_the_model_does_not_have(tiny):
    with pytest.raises(g4.AdapterError, match="lora_layers is 4-6") as error:
        g4.load(tiny).add_lora(g4.LoraConfig(layers="4-6"))
    assert error.value.wanted == "the model's layers, 0 to 5"


def test_layers_without_the_target(tiny):
    with pytest.raises(g4.AdapterError, match="none of layers 4, 5 has k_proj"):
        g4.load(tiny).add_lora(g4.LoraConfig(layers="4-5", targets=("k_proj",)))


def test_all_linear_keeps_to_the_last_layers(tiny):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(targets=("all-linear",), num_layers=1))
    assert layers_with_lora(gemma) == {5}


def layers_with_lora(gemma: g4.Gemma4) -> set[int]:
    names = flat(gemma.backbone.trainable_parameters())
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}


def test_num_layers_adapts_the_last_ones(checkpoints):
    gemma = g4.load(checkpoints["dense"])
    told = gemma.add_lora(g4.LoraConfig(num_layers=2))
    assert layers_with_lora(gemma) == {4, 5}
    assert told["self_attn.q_proj"] == 2


def test_num_layers_within_the_shared_tail_adapts_what_is_there(tiny):
    """The tail has no k_proj and v_proj, and the default targets name both."""
    gemma = g4.load(tiny)
    told = gemma.add_lora(g4.LoraConfig(num_layers=2))
    assert set(told) == (ATTENTION | MLP) - {"self_attn.k_proj", "self_attn.v_proj"}
    assert layers_with_lora(gemma) == {4, 5}


def test_num_layers_may_be_all(tiny):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(num_layers=6))
    assert layers_with_lora(gemma) == set(range(6))


def test_more_layers_than_there_are_is_an_error(tiny):
    with pytest.raises(g4.AdapterError) as error:
        g4.load(tiny).add_lora(g4.LoraConfig(num_layers=7))
    assert error.value.found == "num_layers is 7"
    assert "the model's 6 layers" in error.value.wanted


def test_no_layer_at_all_is_an_error_about_num_layers(tiny):
    with pytest.raises(g4.Gemma4Error, match="num_layers is 0"):
        g4.load(tiny).add_lora(g4.LoraConfig(num_layers=0))


@pytest.mark.parametrize("target", ["qproj", "experts", "self_attn", "layers.9.self_attn.q_proj"])
def test_an_unmatched_target_lists_the_known_names(tiny, target):
    gemma = g4.load(tiny)
    with pytest.raises(g4.AdapterError) as error:
        gemma.add_lora(g4.LoraConfig(targets=("q_proj", target)))
    assert error.value.found.startswith(f"LoRA target {target!r} matches no module")
    for name in ATTENTION | MLP | {"per_layer_input_gate"}:
        assert name in error.value.wanted
    assert error.value.do == "change lora_targets"
    assert not adapted_modules(gemma.backbone)


def test_a_model_can_be_used_after_an_unmatched_target(tiny):
    gemma = g4.load(tiny)
    with pytest.raises(g4.AdapterError):
        gemma.add_lora(g4.LoraConfig(targets=("qproj",)))
    assert gemma.add_lora(g4.LoraConfig(targets=("q_proj",))) == {"self_attn.q_proj": 6}


def test_lora_on_lora_is_refused(tiny):
    gemma = with_lora(tiny)
    with pytest.raises(g4.AdapterError, match="carries LoRA layers already"):
        gemma.add_lora()


def test_lora_on_a_loaded_adapter_is_refused(tiny, adapter):
    with pytest.raises(g4.AdapterError, match="carries LoRA layers already"):
        g4.load(tiny, adapter=adapter).add_lora()


def test_dropout_is_off_until_training_begins(tiny):
    gemma = with_lora(tiny, dropout=0.5)
    tokens = some_tokens(gemma.plan.vocab_size)
    once, twice = gemma.logits(tokens), gemma.logits(tokens)
    assert np.array_equal(np.array(once), np.array(twice))


# ---------------------------------------------------------------- to disk and back


def test_an_adapter_comes_back_bit_by_bit(saved):
    gemma, checkpoint, folder = saved
    again = g4.load(checkpoint, adapter=folder)
    assert_same(trainable(again), trainable(gemma))
    assert adapted_modules(again.backbone) == adapted_modules(gemma.backbone)
    facts = ("rank", "scale", "dropout", "num_layers")
    assert [getattr(again.lora, f) for f in facts] == [getattr(gemma.lora, f) for f in facts]
    tokens = some_tokens(gemma.plan.vocab_size)
    assert np.array_equal(np.array(again.logits(tokens)), np.array(gemma.logits(tokens)))


def test_an_adapter_of_a_loaded_adapter_is_the_same(saved, tmp_path):
    _, checkpoint, folder = saved
    again = save(g4.load(checkpoint, adapter=folder), tmp_path / "again")
    one, other = (
        json.loads((path / "adapter_config.json").read_text()) for path in (folder, again)
    )
    assert one == other


def test_full_weights_come_back_bit_by_bit(tiny, tmp_path):
    gemma = g4.load(tiny)
    gemma.train_all()
    noise = [(n, v + 0.01) for n, v in flat(gemma.backbone.trainable_parameters()).items()]
    gemma.backbone.load_weights(noise, strict=False)
    again = g4.load(tiny, adapter=save(gemma, tmp_path / "adapter"))
    assert again.lora is None
    again.train_all()
    assert_same(trainable(again), trainable(gemma))
    tokens = some_tokens(gemma.plan.vocab_size)
    assert np.array_equal(np.array(again.logits(tokens)), np.array(gemma.logits(tokens)))
    assert relative_gap(again.logits(tokens), g4.load(tiny).logits(tokens)) > 1e-3


def test_the_config_is_mlx_lms(saved):
    gemma, _, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["model"] == gemma.name
    parameters = config["lora_parameters"]
    assert parameters["rank"] == gemma.lora.rank
    assert parameters["scale"] == gemma.lora.alpha / gemma.lora.rank
    assert parameters["dropout"] == gemma.lora.dropout
    assert parameters["keys"] == sorted(adapted_modules(gemma.backbone))
    wanted = gemma.lora.num_layers if gemma.lora.num_layers > 0 else len(gemma.plan.layers)
    assert config["num_layers"] == wanted


def test_nothing_trainable_is_not_saved(tiny, tmp_path):
    gemma = g4.load(tiny)
    with pytest.raises(g4.AdapterError, match="no trainable parameters"):
        save(gemma, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_values_that_are_not_finite_are_not_saved(tiny, tmp_path):
    gemma = with_lora(tiny)
    folder = save(gemma, tmp_path / "adapter")
    before = (folder / "adapters.safetensors").read_bytes()
    gemma.backbone.language_model.model.layers[1].self_attn.q_proj.lora_a *= float("nan")
    with pytest.raises(g4.AdapterError) as error:
        save(gemma, folder)
    assert "1 tensors are not finite" in error.value.found
    assert "layers.1.self_attn.q_proj.lora_a" in error.value.found
    assert (folder / "adapters.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("shape", "train", "lora"),
    [
        ("e2b", {}, g4.LoraConfig(rank=2)),
        ("e2b", {"fine_tune_type": "full"}, None),
        ("moe", {}, g4.LoraConfig(rank=2, targets=("experts", "q_proj"))),
        ("dense", {}, g4.LoraConfig(rank=2, num_layers=3)),
    ],
    ids=["e2b", "e2b-full", "moe-experts", "dense-last-3"],
)
def test_mlx_lm_loads_a_trained_run_with_the_same_logits(
    as_mlx_lm_loads_it, tmp_path, shape, train, lora
):
    checkpoint = as_mlx_lm_loads_it[shape]
    gemma = g4.load(checkpoint)
    tokens = some_tokens(gemma.plan.vocab_size)
    untrained = gemma.logits(tokens)
    mx.eval(untrained)
    data = g4.read(write_rows(tmp_path / "rows", train=CHAT), gemma)
    config = g4.TrainConfig(iters=3, batch_size=2, learning_rate=1e-2, **train)
    g4.finetune(gemma, data, config, lora=lora, output=tmp_path / "out", callbacks=[])
    theirs, _ = mlx_lm.load(str(checkpoint), adapter_path=str(tmp_path / "out" / "adapter"))
    assert relative_gap(theirs(tokens), gemma.logits(tokens)) < 1e-5
    assert relative_gap(untrained, gemma.logits(tokens)) > 1e-3


@pytest.mark.parametrize("shape", ["e2b", "moe", "dense"])
def test_an_adapter_of_mlx_lms_trainer_without_keys_loads(as_mlx_lm_loads_it, tmp_path, shape):
    """Without keys mlx-lm adapts every linear module of a layer."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0}
    theirs, _ = mlx_lm.load(str(as_mlx_lm_loads_it[shape]))
    theirs.freeze()
    mx.random.seed(4)
    linear_to_lora_layers(theirs, 4, parameters)
    weights = {
        name: 0.05 * mx.random.normal(value.shape)
        for name, value in tree_flatten(theirs.trainable_parameters())
    }
    theirs.load_weights(list(weights.items()), strict=False)
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    gemma = g4.load(as_mlx_lm_loads_it[shape], adapter=folder)
    assert set(adapted_modules(gemma.backbone)) > MLP
    tokens = some_tokens(gemma.plan.vocab_size)
    assert relative_gap(gemma.logits(tokens), theirs(tokens)) < 1e-5


# ---------------------------------------------------------------- adapters that do not fit

Q0 = "language_model.model.layers.0.self_attn.q_proj.lora_a"


def drop(weights):
    del weights[Q0]


def rename(weights):
    weights["model.layers.0.self_attn.q_proj.lora_A"] = weights.pop(Q0)


def add(weights):
    weights[Q0.replace("layers.0", "layers.9")] = weights[Q0]


def transpose(weights):
    weights[Q0] = mx.contiguous(weights[Q0].T)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop, [f"missing     {Q0}"]),
        (rename, [f"missing     {Q0}", "unexpected  model.layers.0.self_attn.q_proj.lora_A"]),
        (add, [f"unexpected  {Q0.replace('layers.0', 'layers.9')}"]),
        (transpose, [f"misshapen   {Q0}: (2, 64), wanted (64, 2)"]),
    ],
    ids=["dropped", "renamed", "extra", "transposed"],
)
def test_a_tensor_that_does_not_fit_is_named(tiny, adapter, change, told):
    change_tensors(adapter, change)
    error = refused(tiny, adapter)
    assert error.found.startswith(f"{len(told)} tensors of {adapter} do not fit this model:")
    for line in told:
        assert line in error.found
    assert error.do == "name the model that the adapter was trained on"


def test_full_weights_that_do_not_fit_are_refused(tiny, tmp_path):
    gemma = g4.load(tiny)
    gemma.train_all()
    folder = save(gemma, tmp_path / "adapter")
    change_tensors(folder, lambda weights: weights.update(extra=mx.ones(2)))
    assert "unexpected  extra" in refused(tiny, folder).found


def test_full_weights_that_lost_a_tensor_are_refused(tiny, tmp_path):
    gemma = g4.load(tiny)
    gemma.train_all()
    folder = save(gemma, tmp_path / "adapter")
    lost = "language_model.model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, lambda weights: weights.pop(lost))
    assert f"missing     {lost}" in refused(tiny, folder).found


def test_an_adapter_of_another_model_is_refused(checkpoints, adapter):
    error = refused(checkpoints["e4b"], adapter)
    assert "missing     language_model.model.layers.7.mlp.down_proj.lora_a" in error.found
    assert error.wanted == "the adapter of this model, whole"


def test_an_adapter_without_keys_that_lost_half_a_pair_is_refused(tiny, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["lora_parameters"]["keys"]
    change_config(adapter, **config)
    change_tensors(adapter, drop)
    assert f"missing     {Q0}" in refused(tiny, adapter).found


def test_peft_names_are_refused_with_the_wanted_ones(tiny, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["lora_parameters"]["keys"]
    change_config(adapter, **config)

    def to_peft(weights):
        values = list(weights.values())
        weights.clear()
        weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = values[0]

    change_tensors(adapter, to_peft)
    error = refused(tiny, adapter)
    assert "holds no lora_a or lora_b of this model's layers" in error.found
    assert "language_model.model.layers.0.self_attn.q_proj.lora_a" in error.wanted


def test_an_adapter_that_changes_nothing_is_refused(tiny, tmp_path):
    gemma = g4.load(tiny)
    gemma.add_lora()
    error = refused(tiny, save(gemma, tmp_path / "adapter"))
    assert error.found == f"every lora_b of {tmp_path / 'adapter'} is zero"
    assert error.do == "train it first"


def test_an_adapter_may_leave_a_module_as_it_was(tiny, adapter):
    """A lora_b of zeros is nothing unusual, as long as another is not."""
    name = Q0.replace("lora_a", "lora_b")
    change_tensors(adapter, lambda weights: weights.update({name: mx.zeros((2, 64))}))
    assert g4.load(tiny, adapter=adapter).lora.rank == 2


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(tiny, adapter, name):
    (adapter / name).unlink()
    error = refused(tiny, adapter)
    assert error.found == f"{adapter} has no {name}"
    assert "OUTPUT/adapter" in error.do


def test_a_folder_that_is_not_there(tiny, tmp_path):
    assert str(tmp_path / "none") in refused(tiny, tmp_path / "none").found


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.01, 0.0])
def test_truncated_tensors_are_refused(tiny, adapter, kept):
    path = adapter / "adapters.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    error = refused(tiny, adapter)
    assert error.found.startswith(f"{adapter} cannot be read")
    assert error.do == "copy the adapter again"


@pytest.mark.parametrize("text", ["", "{", "not json", "[]", "3"])
def test_a_config_that_is_no_json_object_is_refused(tiny, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    assert str(adapter) in refused(tiny, adapter).found


@pytest.mark.parametrize(
    "parameters", [None, {}, {"rank": 2}, {"scale": 2.0}, {"rank": "two", "scale": 2.0}]
)
def test_a_config_without_rank_or_scale_is_refused(tiny, adapter, parameters):
    change_config(adapter, lora_parameters=parameters)
    error = refused(tiny, adapter)
    assert str(adapter / "adapter_config.json") in error.found
    assert "rank, scale and keys" in error.wanted


def test_another_kind_of_adapter_is_refused(tiny, adapter):
    change_config(adapter, fine_tune_type="prefix")
    error = refused(tiny, adapter)
    assert error.found == f"{adapter} holds a prefix adapter"
    assert error.wanted == "fine_tune_type lora, dora or full"


def test_another_rank_in_the_config_than_in_the_tensors_is_refused(tiny, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    change_config(adapter, lora_parameters={**config["lora_parameters"], "rank": 4})
    assert "(64, 2), wanted (64, 4)" in refused(tiny, adapter).found
