"""A LoRA adapter as a GGUF file, for llama.cpp's `--lora`.

llama.cpp adds alpha / rank * B A to the weight that the tensors are named after, with the rank of
each pair and one alpha for the file. The metadata keys are those of the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), the names those of the `gguf` package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import AdapterError, CapabilityError, ConfigError, listing
from ...model.names import Module
from ...model.plan import Plan
from ...storage import new_file
from ..attach import LowRank, low_rank_updates, require_effect

USE = """\
```bash
hf download {repo} {file} --local-dir .
llama-cli -m BASE.gguf --lora {file} -p "..."
```

`BASE.gguf` is {base}, converted with llama.cpp's `convert_hf_to_gguf.py`."""
"""How an adapter on the Hub is loaded."""


def write_gguf(backbone: nn.Module, plan: Plan, file: str | Path) -> int:
    """Write a model's LoRA as one GGUF file, whole or not at all.

    Returns:
        How many tensors it holds: two a module.

    Raises:
        AdapterError: something other than LoRA on modules that llama.cpp can adapt.
        CapabilityError: the gguf package is not installed, or does not know Gemma 4.
        ConfigError: the file cannot be written.
    """
    gguf = _package()
    arch = gguf.MODEL_ARCH.GEMMA4
    require_effect(backbone, "the model")
    names = gguf.get_tensor_name_map(arch, len(plan.layers))
    pairs = _pairs(low_rank_updates(backbone), names)
    file = Path(file).expanduser()
    alpha = Counter(update.scale * update.rank for update in pairs.values()).most_common(1)[0][0]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as partial:
            writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[arch])
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
            for name, update in pairs.items():
                # Equal ranks and scales leave B as it is; others are brought to the one alpha.
                b = update.b * (update.scale * update.rank / alpha)
                for last, value in (("lora_a", update.a), ("lora_b", b)):
                    values = np.ascontiguousarray(np.array(value.astype(mx.float32)))
                    writer.add_tensor(f"{name}.weight.{last}", values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise ConfigError(
            f"cannot write {file}: {error}", wanted="a file to write", do="name another output"
        ) from None
    return 2 * len(pairs)


def _pairs(updates: Mapping[Module, LowRank], names: Any) -> dict[str, LowRank]:
    """The updates under llama.cpp's names, such as `blk.3.attn_q`."""
    pairs: dict[str, LowRank] = {}
    refused = []
    for (index, inner), update in updates.items():
        path = f"layers.{index}.{inner}"
        name = names.get_name(f"model.{path}")
        if update.magnitude is not None:
            refused.append(f"{path}: DoRA; llama.cpp adds the low-rank part and nothing else")
        elif update.a.ndim == 3:
            refused.append(f"{path}: experts; llama.cpp scales an expert's output before it adds")
        elif name is None:
            refused.append(f"{path}: not a weight of llama.cpp's gemma4")
        else:
            pairs[name] = update
    if refused or not pairs:
        raise AdapterError(
            f"{len(refused)} modules cannot go into a GGUF adapter:{listing(refused)}"
            if refused
            else "the model carries no LoRA",
            wanted="LoRA on attention, the dense MLP, the router or the per-layer gates",
            do="export a fused model and convert that with llama.cpp's convert_hf_to_gguf.py",
        )
    return pairs


def _package() -> Any:
    try:
        import gguf

        gguf.MODEL_ARCH.GEMMA4  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise CapabilityError(
            f"no gguf package that knows Gemma 4: {error}",
            wanted="gguf 0.19.0 or later",
            do="pip install -U gguf",
        ) from None
    return gguf
