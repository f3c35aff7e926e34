"""transformers and PEFT as the libraries that an export is for.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import ExportError
from ...model.plan import read_config

__all__ = ["PeftLibrary", "TransformersLibrary"]


class TransformersLibrary:
    """Gemma4ForConditionalGeneration.from_pretrained(base), or the class for text alone."""

    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, causal: bool = False):
        self._causal = causal

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

    def logits(self, model: Any, tokens_T: list[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens_T]), use_cache=False).logits
        found: np.ndarray = logits[0].float().numpy()
        return found


class PeftLibrary(TransformersLibrary):
    """PeftModel.from_pretrained(model, adapter)."""

    packages = ("torch", "transformers", "peft")

    def unfit(self) -> str:
        return ""

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

    def holds(self, model: Any) -> dict[str, mx.array]:
        import peft

        state: Mapping[str, Any] = peft.get_peft_model_state_dict(
            model, save_embedding_layers=False
        )
        return {name: mx.array(value.float().numpy()) for name, value in state.items()}


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """transformers without its progress bar and its report of encoders that are left out."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
