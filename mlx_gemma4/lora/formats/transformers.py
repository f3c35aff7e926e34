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

from ...model.plan import Plan, read_config


def architecture(plan: Plan, causal: bool = False) -> str:
    """The class of transformers for a checkpoint, or for its language model alone."""
    stem = "Gemma4Unified" if plan.is_unified else "Gemma4"
    is_text = causal or not plan.is_multimodal
    return stem + ("ForCausalLM" if is_text else "ForConditionalGeneration")


class TransformersLibrary:
    """Gemma4ForConditionalGeneration.from_pretrained(base), or the class for text alone."""

    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, causal: bool = False):
        self._causal = causal

    def load(self, base: Path) -> Any:
        import transformers

        plan = Plan.from_config(read_config(base))
        cls = getattr(transformers, architecture(plan, self._causal))
        options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
        options["trust_remote_code"] = False
        if self._causal and plan.is_multimodal:
            config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
            options["config"] = config.text_config
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

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "(?s).*missing adapter keys")
            return peft.PeftModel.from_pretrained(model, str(adapter)).eval()

    def prepare(self, model: Any) -> None:
        pass

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
