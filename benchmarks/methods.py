"""What each method and each optimizer makes of the embedded default: its validation loss.

    python benchmarks/methods.py --steps 60
    python benchmarks/methods.py --only LoRA DoRA

Every row is a run of so many steps from the same base on the same rows, with the settings that are
shown, which are flags of `python -m mlx_gemma4.train` too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_gemma4 as g4
from mlx_gemma4.config import DataConfig, LoraConfig, TrainConfig, build
from mlx_gemma4.export.fuse import save_quantized
from mlx_gemma4.train import embedded

Settings = dict[str, Any]

METHODS: dict[str, Settings] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA+": {"lora_plus_ratio": 4.0, "learning_rate": 1e-3},
    "LoRA, dropout": {"lora_dropout": 0.1},
    "LoRA, attention": {"lora_targets": ("attention",)},
    "LoRA, all-linear": {"lora_targets": ("all-linear",)},
    "LoRA, ple-projections": {"lora_targets": ("ple-projections",)},
    "LoRA, layers 3-5": {"lora_layers": "3-5"},
    "QLoRA, 4 bits": {"quantize": "4"},
    "QLoRA, q4_0": {"quantize": "q4_0"},
    "QLoRA, mxfp8": {"quantize": "mxfp8"},
    "QAT, 4 bits": {"quantize": "4", "qat": True},
    "QAT, q4_0": {"quantize": "q4_0", "qat": True},
    "full": {"fine_tune_type": "full"},
    "full, norms": {"train_parts": ("norms",)},
    "full, last-2-layers": {"train_parts": ("last-2-layers",)},
    "full, ple-projections": {"train_parts": ("ple-projections",)},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3},
    "muon": {"optimizer": "muon", "learning_rate": 1e-2},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.3},
}


def trained(
    model: Path, data: Path, method: Settings, steps: int, folder: Path, **given: Any
) -> tuple[float, float]:
    """The validation loss before and after a run with a method's settings.

    Args:
        folder: where a quantized model may be written.
        given: more settings of the run.
    """
    values = {
        key: value
        for key, value in embedded.DEFAULTS.items()
        if key not in ("eval_every", "save_every", "report_every")
    }
    values |= {"iters": steps, "eval_every": steps, "report_every": steps, **given, **method}
    if "train_parts" in values:
        values["fine_tune_type"] = "full"
    quantize = values.pop("quantize", None)
    data_config, config, lora = build([DataConfig, TrainConfig, LoraConfig], values, "a method")
    if quantize:
        model, base = folder / f"quantized-{quantize}", model
        if not model.exists():
            save_quantized(base, model, quantize)
    gemma = g4.load(model)
    kinds = {"lora": lora} if config.fine_tune_type == "lora" else {}
    run = g4.finetune(gemma, g4.read(data, gemma, data_config), config, console=False, **kinds)
    return run.summary["val_loss_before"], run.summary["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        model, data = embedded.prepare()
    print("| method | settings | before | after |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            losses = trained(model, data, METHODS[name], given.steps, Path(folder))
            settings = ", ".join(
                f"{key} {' '.join(value) if isinstance(value, tuple) else value}"
                for key, value in METHODS[name].items()
            )
            print(f"| {name} | {settings} | {losses[0]:.3f} | {losses[1]:.3f} |", flush=True)
            mx.clear_cache()


if __name__ == "__main__":
    main()
