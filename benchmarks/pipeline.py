"""An experiment: layers split over two ranks, against one process.

mlx.launch -n 2 python benchmarks/pipeline.py

Each rank keeps half of the layers. The first sends its hidden states, and the keys and values that
later layers share; the second sends back their cotangents. Printed: loss, the worst difference of a
LoRA gradient, and the peak memory of each rank's step, weights included.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_gemma4 as g4
from mlx_gemma4.data import stdlib
from mlx_gemma4.model.names import flat, text_model
from mlx_gemma4.model.tiny import TEXT, build_tiny
from mlx_gemma4.nn.forward import _masks, _per_layer_inputs, decoder_layer
from mlx_gemma4.nn.head import token_log_probs

SHAPE = {**TEXT, "hidden_size": 256, "intermediate_size": 1024}


def stage(gemma: g4.Gemma4, batch: g4.Batch, first: int, last: int, hidden: Any, shared: list):
    """Layers `first` to `last` of the forward pass; K/V of sources go in and out as a list."""
    text, plan = text_model(gemma.backbone), gemma.plan
    embedded = text.embed_tokens(batch.tokens_BT) * plan.hidden_size**0.5
    inputs = _per_layer_inputs(text, plan, embedded, batch.ple_BTLP)
    hidden, masks = embedded if hidden is None else hidden, _masks(plan, batch)
    kept = dict(zip(sorted(plan.kv_sources), shared))
    for layer in plan.layers[first:last]:
        hidden, kv = decoder_layer(
            text.layers[layer.index], hidden, inputs[layer.index], kept.get(layer.kv_source),
            plan=plan, layer_plan=layer, mask=masks[layer.kind], positions_BT=None, method="plain",
        )  # fmt: skip
        if layer.index in plan.kv_sources:
            kept[layer.index] = kv
    return hidden, [array for source in sorted(kept) for array in kept[source]]


def pairs(arrays: list[mx.array]) -> list[tuple[mx.array, ...]]:
    return list(zip(arrays[::2], arrays[1::2]))


def split_step(gemma: g4.Gemma4, batch: g4.Batch, rank: int, cut: int) -> tuple[Any, dict]:
    """(the loss, on rank 1; this rank's gradients)."""
    backbone, layers = gemma.backbone, len(gemma.plan.layers)
    own = flat(backbone.trainable_parameters())
    names = [n for n in own if (int(n.split("layers.")[1].split(".")[0]) >= cut) == bool(rank)]

    def on_first(*values):
        backbone.load_weights(list(zip(names, values)), strict=False)
        hidden, shared = stage(gemma, batch, 0, cut, None, [])
        return [hidden, *shared]

    def on_second(*values):
        backbone.load_weights(list(zip(names, values[: len(names)])), strict=False)
        hidden, *shared = values[len(names) :]
        hidden, _ = stage(gemma, batch, cut, layers, hidden, pairs(shared))
        hidden = text_model(backbone).norm(hidden).flatten(0, 1)
        return [-(batch.weights_R * token_log_probs(gemma, hidden, batch.targets_R)).sum()]

    values = [own[name] for name in names]
    like = shapes(gemma, batch, cut)
    if rank == 0:
        # Lazy: nothing is received before the eval of the gradients, when the other rank has sent.
        cotangents = [mx.distributed.recv(shape, mx.float32, 1) for shape in like]
        outputs, grads = mx.vjp(on_first, values, cotangents)
        for output in outputs:
            mx.eval(mx.distributed.send(output, 1))
        for cotangent in cotangents:
            mx.eval(cotangent)
        mx.eval(grads)
        return None, dict(zip(names, grads))
    received = [mx.distributed.recv(shape, mx.float32, 0) for shape in like]
    for array in received:
        mx.eval(array)
    (loss,), grads = mx.vjp(on_second, values + received, [mx.array(1.0)])
    mx.eval(loss, grads)
    for cotangent in grads[len(names) :]:
        mx.eval(mx.distributed.send(cotangent, 0))
    return loss, dict(zip(names, grads))


def shapes(gemma: g4.Gemma4, batch: g4.Batch, cut: int) -> list[tuple[int, ...]]:
    """Of what the first rank sends: hidden states, then keys and values of its sources."""
    B, T = batch.tokens_BT.shape
    found: list[tuple[int, ...]] = [(B, T, gemma.plan.hidden_size)]
    for index in sorted(i for i in gemma.plan.kv_sources if i < cut):
        layer = gemma.plan.layers[index]
        found += [(B, layer.num_kv_heads, T, layer.head_dim)] * 2
    return found


def main() -> None:
    group = mx.distributed.init()
    rank = group.rank()
    assert group.size() == 2, "start it with mlx.launch -n 2"
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"{signature}: {answer}\n" for _, signature, answer in stdlib.docstrings()]
        gemma = g4.load(build_tiny(Path(folder) / "model", texts[:500], text=SHAPE))
    mx.random.seed(0)
    gemma.add_lora(g4.LoraConfig(rank=4))
    for name, value in flat(gemma.backbone.trainable_parameters()).items():
        if name.endswith("lora_b"):
            key = mx.random.key(len(name))
            weights = [(name, 0.05 * mx.random.normal(value.shape, key=key))]
            gemma.backbone.load_weights(weights, strict=False)
    vocabulary = text_model(gemma.backbone).embed_tokens.weight.shape[0]
    tokens = np.random.default_rng(0).integers(3, vocabulary, (2, 257))
    batch = g4.Batch.from_tokens(mx.array(tokens)).with_ple_rows(gemma)
    layers = text_model(gemma.backbone).layers
    for cut in range(1, len(layers)):
        mx.reset_peak_memory()
        loss, _, expected = g4.loss_and_grads(gemma, batch, attention="plain")
        expected = flat(expected)
        mx.eval(loss, expected)
        whole = mx.get_peak_memory()
        found_loss, grads = split_step(gemma, batch, rank, cut)
        gaps = [
            float(mx.abs(grads[n] - expected[n]).max() / mx.abs(expected[n]).max()) for n in grads
        ]
        told = f"rank {rank}, cut at {cut}: {len(grads)} gradients, worst {max(gaps):.1e}"
        if found_loss is not None:
            told += f", loss {found_loss.item():.6f} of {loss.item():.6f}"
        print(told, flush=True)
    cut = len(layers) // 2
    # What a rank would not have read.
    for layer in [*layers[cut:]] if rank == 0 else [*layers[:cut]]:
        layer.load_weights(
            [(n, mx.zeros((1,))) for n, v in flat(layer.parameters()).items() if "lora" not in n],
            strict=False,
        )
    del expected, grads, loss, found_loss
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    split_step(gemma, batch, rank, cut)
    print(f"rank {rank}: peak {mx.get_peak_memory() / 1e6:.0f} MB of {whole / 1e6:.0f}", flush=True)


if __name__ == "__main__":
    main()
