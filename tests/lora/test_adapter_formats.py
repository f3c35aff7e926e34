"""Each format knows its own folders, and no other's."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from adapters import KINDS, trained

import mlx_gemma4 as g4
from mlx_gemma4.lora.formats import ADAPTERS, Adapter, format_of
from mlx_gemma4.lora.state import adapter_of


@pytest.fixture(scope="module")
def adapter(checkpoints) -> Adapter:
    gemma = trained(checkpoints["e2b"], KINDS["lora"])
    return Adapter(gemma.lora, gemma.backbone, gemma.plan, gemma.name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_format_is_recognised_by_the_config_that_it_writes(adapter, name):
    config, _ = ADAPTERS[name].write(adapter)
    assert format_of(config).name == name.removesuffix("-causal")
    kinds = ["mlx-lm", "mlx-vlm-legacy", "peft"]
    others = [k for k in kinds if k != name.removesuffix("-causal") and k not in name]
    assert not any(ADAPTERS[other].recognises(config) for other in others if name != "mlx-vlm")


def test_a_run_s_own_config_and_one_that_says_nothing_are_mlx_lm_s(adapter):
    own, _ = adapter_of(adapter.backbone, adapter.lora, adapter.model)
    assert format_of(own).name == format_of({}).name == "mlx-lm"


def test_tensors_of_a_layer_that_is_not_there_are_named(adapter, tiny, tmp_path):
    """Without keys the modules come from the tensors' names."""
    config, tensors = ADAPTERS["mlx-lm"].write(adapter)
    del config["lora_parameters"]["keys"]
    name = "language_model.model.layers.77.mlp.up_proj.lora_a"
    tensors[name] = mx.ones((64, 4))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(g4.AdapterError, match=rf"unexpected  {name}"):
        g4.load(tiny, adapter=tmp_path)


@pytest.mark.parametrize("missing", ["rank", "alpha"])
def test_a_legacy_config_without_rank_or_alpha_is_refused(adapter, tiny, tmp_path, missing):
    config, tensors = ADAPTERS["mlx-vlm-legacy"].write(adapter)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {missing: None}))
    with pytest.raises(g4.AdapterError, match=f"lacks {missing}"):
        g4.load(tiny, adapter=tmp_path)


def test_the_installed_mlx_vlm_has_one_of_two_formats():
    pytest.importorskip("mlx_vlm")
    unfit = [bool(ADAPTERS[name].library.unfit()) for name in ("mlx-vlm", "mlx-vlm-legacy")]
    assert sorted(unfit) == [False, True]
