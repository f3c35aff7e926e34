"""llama.cpp as a client of what is exported: `make verify-gguf`.

For small checkpoints of every family shape: the base is converted by llama.cpp's own converter and
loaded alone, with our GGUF adapter, and as our fused model. Logits are compared with ours.

llama.cpp computes GELU through a table in half precision, so its logits differ from ours by about a
thousandth for the base too. TOLERANCE is a share of the largest logit; the adapters move logits by
more than half of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from shapes import SHAPES, build_shape

import mlx_gemma4 as g4
from mlx_gemma4.export.fuse import write_fused
from mlx_gemma4.lora.formats.gguf import write_gguf

TOLERANCE = 5e-3
TEXTS = ["Open the file, read a line, and close it again.\n", "A list holds values.\n"] * 30

# llama.cpp takes the last two layers with K/V of their own, a sliding and then a full one, for the
# sources of all others. So it is in the released models, and not in the smallest E4B.
SHAPES["e4b"] = {**SHAPES["e4b"], "num_kv_shared_layers": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("llama_cpp", type=Path, help="a folder with convert_hf_to_gguf.py")
    converter = parser.parse_args().llama_cpp / "convert_hf_to_gguf.py"
    if not converter.exists():
        parser.error(f"{converter} is not there: give the folder of a llama.cpp source tree")
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("llama-cpp-python", "gguf")
    ]
    print(f"{', '.join(versions)}; gaps are shares of the largest logit")
    print(f"{'':10}{'base':>10}{'adapter':>10}{'fused':>10}{'moved by':>10}")
    with tempfile.TemporaryDirectory() as folder:
        worst = max(verify(shape, Path(folder), converter) for shape in SHAPES)
    print(f"worst {worst:.1e}, tolerance {TOLERANCE:.0e}")
    sys.exit(worst > TOLERANCE)


def verify(shape: str, folder: Path, converter: Path) -> float:
    """Compare one family shape; returns the worst of its gaps."""
    base = build_shape(folder / shape, TEXTS, shape, seed=1)
    gemma = g4.load(base)
    tokens = np.random.default_rng(0).integers(3, gemma.plan.vocab_size, (1, 60))
    ours = {"base": gemma.logits(mx.array(tokens))}
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=8))
    train_a_little(gemma)
    ours["adapter"] = ours["fused"] = gemma.logits(mx.array(tokens))
    adapter, fused = folder / f"{shape}-lora.gguf", folder / f"{shape}-fused"
    write_gguf(gemma.backbone, gemma.plan, adapter)
    write_fused(gemma, fused)
    files = [convert(path, converter) for path in (base, base, fused)]
    gaps = []
    for (what, wanted), file in zip(ours.items(), files):
        found = llama_logits(file, tokens[0], adapter if what == "adapter" else None)
        gaps.append(gap(found, wanted))
    moved = gap(ours["adapter"], ours["base"])
    print(f"{shape:10}" + "".join(f"{value:10.1e}" for value in (*gaps, moved)), flush=True)
    return max(gaps)


def train_a_little(gemma: g4.Gemma4) -> None:
    """Give every lora_b values."""
    for index, module in enumerate(gemma.backbone.modules()):
        if "lora_b" in module:
            key = mx.random.key(index)
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=key)


def convert(folder: Path, converter: Path) -> Path:
    """A checkpoint as a float32 GGUF file."""
    file = folder.with_suffix(".gguf")
    if not file.exists():
        command = [sys.executable, converter, folder, "--outfile", file, "--outtype", "f32"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"llama.cpp cannot convert {folder.name}:\n{done.stderr}")
    return file


def llama_logits(file: Path, tokens: np.ndarray, adapter: Path | None) -> np.ndarray:
    """Logits (1, T, V) by llama.cpp, with K/V kept in float32."""
    from llama_cpp import Llama

    model = Llama(
        str(file), lora_path=str(adapter) if adapter else None, logits_all=True, n_ctx=256,
        type_k=0, type_v=0, flash_attn=False, verbose=False,
    )  # fmt: skip
    model.eval(tokens.tolist())
    return np.array(model.scores[: len(tokens)])[None]


def gap(found, wanted) -> float:
    """Largest difference over the largest value."""
    found, wanted = np.array(found, np.float64), np.array(wanted, np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


if __name__ == "__main__":
    main()
