"""config.json -> Plan: every key that is needed, both styles, and the sources of shared layers."""

from __future__ import annotations

import copy
import json
import random

import pytest
from shapes import SHAPES

import mlx_gemma4 as g4
from mlx_gemma4.model.plan import FULL, SLIDING, MoePlan, PlePlan, read_config

ALWAYS = [
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "rms_norm_eps",
    "final_logit_softcapping",
    "max_position_embeddings",
    "layer_types",
    "num_hidden_layers",
    "head_dim",
    "global_head_dim",
    "num_key_value_heads",
    "num_kv_shared_layers",
    "attention_k_eq_v",
    "sliding_window",
    "intermediate_size",
    "rope_parameters",
    f"rope_parameters.{SLIDING}",
    f"rope_parameters.{SLIDING}.rope_type",
    f"rope_parameters.{SLIDING}.rope_theta",
    f"rope_parameters.{FULL}",
    f"rope_parameters.{FULL}.rope_type",
    f"rope_parameters.{FULL}.rope_theta",
    f"rope_parameters.{FULL}.partial_rotary_factor",
]
_PLE = ["hidden_size_per_layer_input", "vocab_size_per_layer_input"]
_K_EQ_V = ["num_global_key_value_heads"]
_MOE = ["num_experts", "top_k_experts", "moe_intermediate_size"]
NEEDED = {
    "e2b": [*ALWAYS, *_PLE, "use_double_wide_mlp"],
    "e4b": [*ALWAYS, *_PLE, "use_double_wide_mlp"],
    "moe": [*ALWAYS, *_K_EQ_V, *_MOE, "hidden_size_per_layer_input"],
    "dense": [*ALWAYS, *_K_EQ_V, "hidden_size_per_layer_input"],
    "unified": [*ALWAYS, *_K_EQ_V],
}
SWITCHES = {"enable_moe_block", "use_bidirectional_attention", "tie_word_embeddings"}
"""Keys that turn a part on; a config without the part may leave them out."""


def config_of(shape: str = "e2b", **text) -> dict:
    """A config.json of a shape, in Google's style; keywords change its text_config."""
    unified = shape == "unified"
    values = {**copy.deepcopy(SHAPES[shape]), "vocab_size": 400}
    if unified:
        del values["hidden_size_per_layer_input"]
    else:
        values["vocab_size_per_layer_input"] = 300
    return {
        "model_type": "gemma4_unified" if unified else "gemma4",
        "text_config": {**values, **text},
        "vision_config": None,
        "audio_config": None,
    }


def plan_of(shape: str = "e2b", **text) -> g4.Plan:
    return g4.Plan.from_config(config_of(shape, **text))


def without(config: dict, path: str) -> dict:
    *parents, last = path.split(".")
    config = copy.deepcopy(config)
    inner = config
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    return config


def message(error: pytest.ExceptionInfo) -> str:
    """The whole message, after a check that all three of its parts say something."""
    assert error.value.found and error.value.wanted and error.value.do
    return str(error.value)


def test_the_small_checkpoints_have_a_plan(checkpoints, shape):
    plan = g4.Plan.from_config(read_config(checkpoints[shape]))
    assert [layer.index for layer in plan.layers] == list(range(SHAPES[shape]["num_hidden_layers"]))


@pytest.mark.parametrize(
    ("shape", "key"), [(shape, key) for shape, keys in NEEDED.items() for key in keys]
)
def test_a_missing_key_is_named_in_full(shape, key):
    config = config_of(shape)
    with pytest.raises(g4.ModelError) as error:
        g4.Plan.from_config(without(config, f"text_config.{key}"))
    assert f"config.json has no text_config.{key}\n" in message(error)
    with pytest.raises(g4.ModelError) as error:
        text_type = config["model_type"] + "_text"
        g4.Plan.from_config({**without(config["text_config"], key), "model_type": text_type})
    assert f"config.json has no {key}\n" in message(error)


def test_a_missing_text_config_is_named():
    with pytest.raises(g4.ModelError, match=r"config\.json has no text_config\n"):
        g4.Plan.from_config(without(config_of(), "text_config"))


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_every_other_key_may_be_absent(shape):
    """The list of needed keys is whole: no other key's absence changes the plan."""
    config = config_of(shape)
    plan = g4.Plan.from_config(config)
    others = set(config["text_config"]) - set(NEEDED[shape]) - SWITCHES
    assert others
    for key in others:
        assert g4.Plan.from_config(without(config, f"text_config.{key}")) == plan, key


@pytest.mark.parametrize("model_type", [None, "gemma3", "gemma4_vision", "Gemma4", 4])
def test_another_model_type_is_refused(model_type):
    with pytest.raises(g4.ModelError) as error:
        g4.Plan.from_config({**config_of(), "model_type": model_type})
    text = message(error)
    assert f"model_type {model_type!r}" in text
    assert "gemma4, gemma4_unified, gemma4_text, gemma4_unified_text" in text


@pytest.mark.parametrize("text_config", [None, [], "gemma4"])
def test_a_text_config_that_is_no_object_is_refused(text_config):
    with pytest.raises(g4.ModelError, match="text_config"):
        g4.Plan.from_config({**config_of(), "text_config": text_config})


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_text_only_config_gives_the_same_layers(shape):
    config = config_of(shape)
    whole = g4.Plan.from_config(config)
    text = {**config["text_config"], "model_type": config["model_type"] + "_text"}
    alone = g4.Plan.from_config(text)
    assert alone.layers == whole.layers and alone.ple == whole.ple and alone.moe == whole.moe
    assert whole.is_multimodal and not alone.is_multimodal
    assert whole.is_unified == alone.is_unified == (shape == "unified")


def as_transformers_writes(config: dict, number: str = "{}", **changed) -> dict:
    """The config in transformers' style: full layers' shapes by layer number."""
    config = copy.deepcopy(config)
    text = config["text_config"]
    layer = {"head_dim": text.pop("global_head_dim")}
    heads = text.pop("num_global_key_value_heads")
    if text["attention_k_eq_v"]:
        layer["num_key_value_heads"] = heads
    text["per_layer_config"] = {
        number.format(i): {**layer, **changed} if i == 5 else dict(layer)
        for i, kind in enumerate(text["layer_types"])
        if kind == FULL
    }
    return config


@pytest.mark.parametrize("number", ["{}", "{:02d}", "{:03d}"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_per_layer_config_equals_googles_style(shape, number):
    google = config_of(shape)
    assert "global_head_dim" in google["text_config"]
    plan = g4.Plan.from_config(as_transformers_writes(google, number))
    assert plan == g4.Plan.from_config(google)
    assert {layer.head_dim for layer in plan.layers if layer.kind == FULL} == {32}
    assert {layer.head_dim for layer in plan.layers if layer.kind == SLIDING} == {16}


@pytest.mark.parametrize("changed", [{"head_dim": 48}, {"num_key_value_heads": 2}])
def test_full_layers_of_two_shapes_are_refused(changed):
    with pytest.raises(g4.ModelError) as error:
        g4.Plan.from_config(as_transformers_writes(config_of("dense"), **changed))
    text = message(error)
    assert "per_layer_config gives full_attention layers the (head_dim, kv heads)" in text
    other = {"head_dim": 32, "num_key_value_heads": 1, **changed}
    assert str(tuple(other.values())) in text and "(32, 1)" in text


def test_a_shape_for_some_of_the_full_layers_is_refused():
    config = as_transformers_writes(config_of("dense"))
    del config["text_config"]["per_layer_config"]["5"]
    with pytest.raises(g4.ModelError, match="per_layer_config gives full_attention layers"):
        g4.Plan.from_config(config)


def test_global_key_value_heads_count_only_where_values_are_keys():
    assert {layer.num_kv_heads for layer in plan_of(num_global_key_value_heads=4).layers} == {1}
    by_kind = {layer.kind: layer for layer in plan_of("dense").layers}
    assert (by_kind[SLIDING].num_kv_heads, by_kind[FULL].num_kv_heads) == (2, 1)
    assert (by_kind[SLIDING].k_eq_v, by_kind[FULL].k_eq_v) == (False, True)


def test_windows_are_the_sliding_layers():
    assert [layer.window for layer in plan_of().layers] == [32, 32, None, 32, 32, None]


def test_the_moe_and_ple_parts():
    assert plan_of("moe").moe == MoePlan(num_experts=8, top_k=2, width=32)
    assert plan_of("dense").moe is None and plan_of("dense").ple is None
    assert plan_of("e2b").ple == PlePlan(vocab_size=300, width=8)
    assert plan_of("unified").ple is None


@pytest.mark.parametrize(
    ("shape", "changes", "widths"),
    [
        ("e2b", {}, [64, 64, 64, 128, 128, 128]),
        ("e2b", {"use_double_wide_mlp": False}, [64] * 6),
        ("e2b", {"num_kv_shared_layers": 0}, [64] * 6),
        ("e4b", {}, [64] * 8),
        ("dense", {"use_double_wide_mlp": True}, [64] * 6),
    ],
)
def test_double_wide_mlps_are_those_of_shared_layers(shape, changes, widths):
    assert [layer.mlp_width for layer in plan_of(shape, **changes).layers] == widths


def sources_by_index(kinds: list[str], num_shared: int) -> list[int]:
    """As transformers up to 5.5: each shared layer looks up a layer's number beforehand."""
    before = kinds[: len(kinds) - num_shared]
    return [
        i if i < len(before) else len(before) - 1 - before[::-1].index(kind)
        for i, kind in enumerate(kinds)
    ]


def sources_by_type(kinds: list[str], num_shared: int) -> list[int]:
    """As transformers from 5.8: layers store under their type's name while the model runs."""
    states, sources = {}, []
    for i, kind in enumerate(kinds):
        if i < len(kinds) - num_shared:
            states[kind] = i
        sources.append(states[kind])
    return [i if i < len(kinds) - num_shared else source for i, source in enumerate(sources)]


@pytest.mark.parametrize("seed", range(30))
def test_sources_equal_both_keyings(seed):
    rng = random.Random(seed)
    count = rng.randint(2, 40)
    kinds = [rng.choice([SLIDING, SLIDING, FULL]) for _ in range(count)]
    num_shared = rng.randint(0, count - 1)
    changes = {
        "layer_types": kinds,
        "num_hidden_layers": count,
        "num_kv_shared_layers": num_shared,
    }
    first_shared = count - num_shared
    orphans = [i for i in range(first_shared, count) if kinds[i] not in kinds[:first_shared]]
    if orphans:
        with pytest.raises(g4.ModelError, match=f"layer {orphans[0]} shares keys and values"):
            plan_of(**changes)
        return
    plan = plan_of(**changes)
    found = [layer.kv_source for layer in plan.layers]
    assert found == sources_by_index(kinds, num_shared) == sources_by_type(kinds, num_shared)
    assert [layer.shares_kv for layer in plan.layers] == [i >= first_shared for i in range(count)]
    assert plan.num_shared == num_shared
    assert plan.kv_sources == set(found[first_shared:])


def test_the_sources_of_the_small_model():
    plan = plan_of()
    assert [layer.kv_source for layer in plan.layers] == [0, 1, 2, 1, 1, 2]
    assert plan.kv_sources == {1, 2}


def test_a_shared_layer_without_a_source_names_the_layer():
    with pytest.raises(g4.ModelError) as error:
        plan_of(layer_types=[SLIDING] * 4 + [SLIDING, FULL])
    text = message(error)
    assert "layer 5 shares keys and values but config.json has no earlier full_attention" in text
    assert "among the first 3" in text
    assert "num_kv_shared_layers" in text


@pytest.mark.parametrize("num_shared", [-1, 6, 7])
def test_a_number_of_shared_layers_out_of_range_is_refused(num_shared):
    with pytest.raises(g4.ModelError) as error:
        plan_of(num_kv_shared_layers=num_shared)
    assert f"num_kv_shared_layers {num_shared}" in message(error)
    assert "at most 5" in message(error)


@pytest.mark.parametrize(
    ("kinds", "seen"),
    [
        ([SLIDING] * 5, "6 layers and 5 layer_types"),
        ([SLIDING] * 5 + ["linear_attention"], "linear_attention"),
    ],
)
def test_layer_types_that_do_not_fit_are_refused(kinds, seen):
    with pytest.raises(g4.ModelError) as error:
        plan_of(layer_types=kinds)
    assert seen in message(error)


@pytest.mark.parametrize("value", ["all", "images", True])
def test_other_bidirectional_attention_is_refused(value):
    with pytest.raises(g4.ModelError) as error:
        plan_of(use_bidirectional_attention=value)
    text = message(error)
    assert f"use_bidirectional_attention {value!r}" in text and "null or 'vision'" in text


def test_bidirectional_attention_of_the_members():
    assert plan_of("e2b").bidirectional is None
    assert plan_of("dense").bidirectional == "vision"


def test_the_head_is_tied_as_the_config_says_at_either_level():
    config = config_of()
    del config["text_config"]["tie_word_embeddings"]
    assert g4.Plan.from_config({**config, "tie_word_embeddings": True}).tied
    assert not g4.Plan.from_config({**config, "tie_word_embeddings": False}).tied
    assert not plan_of(tie_word_embeddings=False).tied


def test_encoders_are_those_of_the_config():
    config = config_of()
    assert g4.Plan.from_config(config).encoders == ()
    vision = g4.Plan.from_config({**config, "vision_config": {"hidden_size": 8}}).encoders
    audio = g4.Plan.from_config({**config, "audio_config": {"hidden_size": 8}}).encoders
    assert "vision_tower" in vision and not set(vision) & set(audio)
    assert set(audio) == {"audio_tower", "embed_audio"}


def test_member_is_the_released_size_or_the_shape():
    assert plan_of().member == "6 layers x 64"
    kinds = ([SLIDING] * 4 + [FULL]) * 7
    big = {"layer_types": kinds, "num_hidden_layers": 35, "num_kv_shared_layers": 20}
    plan = plan_of(hidden_size=1536, **big)
    assert plan.member == "E2B"
    assert plan.kv_sources == {13, 14}


def test_read_config_gives_what_the_file_says(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    assert read_config(tmp_path) == config_of()


def test_a_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(g4.ModelError) as error:
        read_config(tmp_path)
    text = message(error)
    assert f"{tmp_path} has no config.json" in text and "check the path" in text


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\x00"])
def test_a_config_that_is_not_json_is_an_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(g4.ModelError) as error:
        read_config(tmp_path)
    assert f"cannot read {tmp_path / 'config.json'}" in message(error)


@pytest.mark.parametrize("content", ["[]", '"gemma4"', "null"])
def test_a_config_that_is_no_object_is_an_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(g4.ModelError) as error:
        read_config(tmp_path)
    assert f"{tmp_path / 'config.json'} is not a JSON object" in message(error)
