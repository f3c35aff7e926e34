"""The libraries that receive exports: how each loads a base and an adapter, and computes logits.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import ExportError
from ..model.capability import inspect_backbone
from ..model.kv_store import apply_kv_store
from ..model.names import flat
from ..model.plan import read_config

__all__ = ["MlxLm", "MlxVlm", "Receiver", "Transformers", "missing_packages"]


class Receiver(Protocol):
    """One library, as it would be used.

    Attributes:
        packages: what has to be installed.
    """

    packages: tuple[str, ...]

    def unfit(self) -> str:
        """Why the installed version cannot judge the export; empty if it can."""

    def load(self, base: Path) -> Any:
        """The library's model of a checkpoint folder."""

    def attach(self, model: Any, adapter: Path) -> Any:
        """The model with an adapter folder on it."""

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        """Logits (T, V), float32."""

    def holds(self, model: Any) -> dict[str, mx.array]:
        """The adapter's tensors as the model holds them, by the names of the file, and others."""


def missing_packages(receiver: Receiver) -> list[str]:
    """The packages of a receiver that are not installed."""
    return [name for name in receiver.packages if importlib.util.find_spec(name) is None]


class MlxLm:
    """mlx-lm: mlx_lm.load(base, adapter_path=adapter)."""

    packages: tuple[str, ...] = ("mlx_lm",)

    def unfit(self) -> str:
        return ""

    def load(self, base: Path) -> Any:
        from mlx_lm.utils import load_model

        model, _ = load_model(base)
        return model

    def attach(self, model: Any, adapter: Path) -> Any:
        from mlx_lm.tuner.utils import load_adapters

        model = load_adapters(model, str(adapter))
        model.eval()
        return model

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        return np.array(model(mx.array([tokens_T]))[0].astype(mx.float32))

    def holds(self, model: Any) -> dict[str, mx.array]:
        return flat(model.parameters())


class MlxVlm(MlxLm):
    """mlx-vlm: mlx_vlm.load(base, adapter_path=adapter), without the processor."""

    packages: tuple[str, ...] = ("mlx_vlm",)

    def __init__(self, legacy: bool = False):
        self._legacy = legacy

    def unfit(self) -> str:
        from mlx_vlm.utils import apply_lora_layers

        made_by = apply_lora_layers.__globals__["get_peft_model"]
        parameters = inspect.signature(made_by).parameters
        if ("legacy" not in parameters) == self._legacy:
            return ""
        return "it has another layout; export with --format mlx-vlm" + "-legacy" * (
            not self._legacy
        )

    def load(self, base: Path) -> Any:
        from mlx_vlm.utils import load_model

        model = load_model(base)
        text = model.language_model.model
        unshared = getattr(text, "first_kv_shared_layer_idx", len(text.layers))
        if unshared < len(text.layers) and not inspect_backbone(model).native:
            apply_kv_store(model)
        return model

    def attach(self, model: Any, adapter: Path) -> Any:
        from mlx_vlm.utils import apply_lora_layers

        with contextlib.redirect_stdout(io.StringIO()):  # it prints counts of parameters
            model = apply_lora_layers(model, adapter)
        model.eval()
        return model

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        return np.array(model.language_model(mx.array([tokens_T])).logits[0].astype(mx.float32))


class Transformers:
    """transformers and PEFT: PeftModel.from_pretrained(model, adapter)."""

    def __init__(self, causal: bool, merged: bool = False):
        self._causal = causal
        self.packages: tuple[str, ...] = ("torch", "transformers") + ("peft",) * (not merged)

    def unfit(self) -> str:
        return ""

    def load(self, base: Path) -> Any:
        import transformers

        config = read_config(base)
        kind = config["model_type"].removesuffix("_text")
        text = self._causal or config["model_type"].endswith("_text")
        stem = "Gemma4Unified" if kind == "gemma4_unified" else "Gemma4"
        cls = getattr(transformers, stem + ("ForCausalLM" if text else "ForConditionalGeneration"))
        options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
        if text and kind == config["model_type"]:
            options["config"] = transformers.AutoConfig.from_pretrained(base).text_config
            options["key_mapping"] = {r"^model\.language_model\.": "model."}
        with _quiet(transformers.utils.logging):
            model, info = cls.from_pretrained(base, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"it finds no {sorted(info['missing_keys'])[0]}")
        return model.eval()

    def attach(self, model: Any, adapter: Path) -> Any:
        import peft

        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(model, str(adapter))
        lost = [str(w.message) for w in told if "missing adapter keys" in str(w.message)]
        if lost:
            raise ExportError(
                f"PEFT does not find all of {adapter}: {lost[0]}",
                wanted="a tensor for every module that the config names",
                do="report this; the export was not kept",
            )
        return model.eval()

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens_T]), use_cache=False).logits
        found: np.ndarray = logits[0].float().numpy()
        return found

    def holds(self, model: Any) -> dict[str, mx.array]:
        import peft

        state: Mapping[str, Any] = peft.get_peft_model_state_dict(
            model, save_embedding_layers=False
        )
        return {name: mx.array(value.float().numpy()) for name, value in state.items()}


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """transformers without its progress bar and its report of towers that are left out."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
