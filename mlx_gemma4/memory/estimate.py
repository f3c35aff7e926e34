"""Will it fit? The memory of a training step, from config.json alone, as a formula.

Nothing is built, traced or downloaded: every term is a product of shapes, and `Estimate.terms`
lists them. A run that has the model measures instead (measure.py).

>>> from mlx_gemma4.memory.estimate import StepSettings, estimate
>>> from mlx_gemma4.model.plan import Plan, read_config
>>> plan = Plan.from_config(read_config(tiny))
>>> whole, lean = (estimate(plan, StepSettings(remat_layers=layers)) for layers in (0, 6))
>>> lean.step < whole.step, lean.resident == whole.resident
(True, True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from ..config import LoraConfig
from ..errors import ConfigError
from ..model.names import EXPERTS, ROUTER, is_meant
from ..model.plan import LayerPlan, Plan
from ..model.quantize import ROUTER as ROUTER_PACKING
from ..model.quantize import Packing
from ..model.targets import chosen_layers, chosen_modules, settings_of
from ..nn.attention import goes_blockwise
from ..nn.budgets import Budgets
from ..nn.mask import AttentionMask
from ..storage import size

COMPILES = tuple(map(int, version("mlx").split(".")[:2])) >= (0, 32)
"""Whether steps are compiled: MLX 0.31's compile fails where a learning rate is 0, and gets
dropout wrong."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MOMENTS = {"adam": 2, "adamw": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0}
"""Arrays that an optimizer of MLX keeps of the size of each trained one, in float32. SGD
makes its velocity without momentum too; Adafactor keeps a row and a column of a matrix."""

_ADAPTER_BYTES = 4
"""Adapters are float32 whatever the weights are; so is what DoRA and those of experts read."""

_SLABS_AHEAD, _SLABS_AHEAD_COMPILED_ON_CPU = 7, 13
"""Slabs of a frozen head whose arrays are alive together. MLX allocates for commands that wait for
the device, about a hundred on CPU."""

_CHUNKS_AHEAD, _CHUNKS_AHEAD_COMPILED_ON_CPU = 2, 4
"""The same of a head's chunks where it trains."""

_CHUNK_ARRAYS, _HIDDEN_ARRAYS = 3, 6
"""Of a trained head's chunk: logits, their exponentials and their gradient. And of every target's
hidden state around the head: the final norm's steps, and sums of the gradient."""

_MOVING_MLP, _MOVING_HIDDEN, _MOVING_QUERIES, _MOVING_SCORES = 5, 4, 3, 2
"""Gradients and sums that are alive in one layer's backward pass beside what it kept: of the MLP's
width, of the hidden state's, of the queries', and of one block of scores (or of all, if plain)."""

_AHEAD_HIDDEN = 2
"""The same of the hidden state's width, of the layer that a compiled step on CPU has gone on to."""

_UPDATE_AHEAD = 0.7
"""New parameters and moments, as a share of the gradients, that a compiled update allocates before
the old ones are free."""

_EXPERT_GELU = 6
"""Arrays of the experts' width that their activation keeps: mlx-lm's own, not gelu_times."""


@dataclass(frozen=True)
class StepSettings:
    """All that the memory of a step depends on beside the model.

    Attributes:
        batch_size, length: rows of a batch and positions of a row.
        longest: positions of the longest sequence of packed rows; None is one sequence a row.
        targets: the share of positions that have a target.
        remat_layers: layers, from the first, that are rematerialised.
        attention: "auto", "plain" or "blockwise".
        lora: what is adapted; None trains every weight.
        packing: of quantized weights; None is full precision.
        dtype: of weights that are not quantized.
        moments: arrays that the optimizer keeps for each trained one (MOMENTS).
        compiled: whether the step runs through mx.compile.
        budgets: how much is formed at a time.
    """

    batch_size: int = 1
    length: int = 2048
    longest: int | None = None
    targets: float = 1.0
    remat_layers: int = 0
    attention: str = "auto"
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    packing: Packing | None = None
    dtype: str = "bfloat16"
    moments: int = 2
    compiled: bool = COMPILES
    budgets: Budgets = field(default_factory=Budgets.here)

    def __post_init__(self) -> None:
        if isinstance(self.remat_layers, bool):
            raise TypeError("remat_layers is a number of layers, not whether there are any")
        if self.packing is not None and self.lora is None:
            raise ConfigError(
                f"fine_tune_type is full and the weights have {self.packing}",
                wanted="full precision: quantized weights have no gradient",
                do="train LoRA, or take the original checkpoint",
            )

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def on_cpu(self) -> bool:
        return self.budgets.gpu_memory is None

    @property
    def positions(self) -> int:
        """Positions of a batch."""
        return self.batch_size * self.length

    def blockwise(self, plan: Plan) -> bool:
        """Whether attention goes block by block."""
        if self.attention != "auto":
            return self.attention == "blockwise"
        return goes_blockwise(self.batch_size, plan.num_heads, self.length)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step.

    Attributes:
        resident: weights, adapters and optimizer state. The PLE table is on disk.
        step: the most that is alive at a time beside them, the batch included.
        terms: what both are made of, by name.
    """

    resident: int
    step: int
    terms: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def peak(self) -> int:
        """Bytes at the peak, all told."""
        return self.resident + self.step

    def __repr__(self) -> str:
        return f"peak {size(self.peak)}: {size(self.resident)} resident + {size(self.step)} a step"


def estimate(plan: Plan, settings: StepSettings) -> Estimate:
    """Bytes of one training step.

    Raises:
        AdapterError: a LoRA target that the model does not have.
    """
    weights = _weights(plan, settings)
    if settings.lora is None:
        trained = weights - len(plan.layers) * settings.itemsize  # layer scalars do not train
    else:
        trained = _adapters(plan, settings.lora)
    # Weights in half precision that train have float32 masters, and so are the moments.
    updated, copies = trained, settings.moments
    if settings.lora is None and settings.itemsize == 2:
        updated, copies = 2 * trained, copies + 1
    resident = {
        "weights": weights,
        "adapters": trained if settings.lora else 0,
        "optimizer state": copies * updated,
    }
    step = _step(plan, settings, updated)
    return Estimate(sum(resident.values()), sum(step.values()), resident | step)


def _weights(plan: Plan, s: StepSettings) -> int:
    """Bytes of the language model, without the PLE table."""
    D, ple, moe = plan.hidden_size, plan.ple, plan.moe
    weights = (1 if plan.tied else 2) * _stored("embed_tokens", (plan.vocab_size, D), s)
    vectors = D  # values of norms and scalars
    if ple:
        weights += _stored("per_layer_model_projection", (len(plan.layers) * ple.width, D), s)
        vectors += ple.width
    for layer in plan.layers:
        weights += sum(_stored(path, shape, s) for path, shape in _modules(plan, layer).items())
        vectors += 4 * D + layer.head_dim * (1 if layer.shares_kv else 2) + 1
        vectors += (D if ple else 0) + (4 * D + moe.num_experts if moe else 0)
    return weights + vectors * s.itemsize


def _stored(path: str, shape: tuple[int, ...], s: StepSettings) -> int:
    """Bytes of a matrix; quantized ones have a scale, most of them a bias, for each group."""
    packing = ROUTER_PACKING if s.packing and path == ROUTER else s.packing
    count = math.prod(shape)
    if packing is None or shape[-1] % packing.group_size:
        return count * s.itemsize
    of_group = 2 * s.itemsize if packing.mode == "affine" else 1
    return count * packing.bits // 8 + count // packing.group_size * of_group


def _modules(plan: Plan, layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Weights of a layer's matrices: path -> (out, in) or (E, out, in)."""
    D, M = plan.hidden_size, layer.mlp_width
    queries, keys = plan.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, D),
        "self_attn.o_proj": (D, queries),
        "mlp.gate_proj": (M, D),
        "mlp.up_proj": (M, D),
        "mlp.down_proj": (D, M),
    }
    if not layer.shares_kv:
        shapes["self_attn.k_proj"] = (keys, D)
        if not layer.k_eq_v:
            shapes["self_attn.v_proj"] = (keys, D)
    if plan.ple:
        shapes["per_layer_input_gate"] = (plan.ple.width, D)
        shapes["per_layer_projection"] = (D, plan.ple.width)
    if plan.moe:
        E, W = plan.moe.num_experts, plan.moe.width
        shapes |= dict(zip(EXPERTS, [(E, W, D), (E, W, D), (E, D, W)]))
        shapes[ROUTER] = (E, D)
    return shapes


def _adapters(plan: Plan, lora: LoraConfig) -> int:
    """Bytes of LoRA's matrices and DoRA's magnitudes; refuses what training would."""
    shapes = {
        (layer.index, path): shape
        for layer in plan.layers
        for path, shape in _modules(plan, layer).items()
    }
    values = 0
    for module in chosen_modules(lora, shapes, len(plan.layers)):
        *experts, out, into = shapes[module]
        rank, _ = settings_of(lora, module)
        values += math.prod(experts) * rank * (out + into) + (out if lora.use_dora else 0)
    return values * _ADAPTER_BYTES


def _ranks(plan: Plan, layer: LayerPlan, lora: LoraConfig | None) -> dict[str, int]:
    """The rank of each module of a layer that LoRA adapts, by its path."""
    if lora is None or layer.index not in chosen_layers(lora, len(plan.layers)):
        return {}
    modules = {path: (layer.index, path) for path in _modules(plan, layer)}
    return {
        path: settings_of(lora, module)[0]
        for path, module in modules.items()
        if any(is_meant(module, word) for word in lora.targets)
    }


def _step(plan: Plan, s: StepSettings, trained: int) -> dict[str, int]:
    """What is kept from the forward pass, and the most that any phase of the step adds to it."""
    hidden = s.positions * plan.hidden_size * s.itemsize
    again, plain = plan.layers[: s.remat_layers], plan.layers[s.remat_layers :]
    shared = sum(
        layer.num_kv_heads * layer.head_dim for layer in again if layer.index in plan.kv_sources
    )
    ple_rows = s.positions * len(plan.layers) * plan.ple.width * s.itemsize if plan.ple else 0
    of_layers = [sum(_kept(plan, layer, s)) for layer in plain]
    kept = {
        "PLE rows and per-layer inputs": 2 * ple_rows,
        "inputs of rematerialised layers": len(again) * hidden,
        "K/V that other layers share": 2 * s.positions * shared * s.itemsize,
        "kept by the other layers": sum(of_layers),
    }
    head = _head(plan, s, of_layers[-1] if of_layers else 0)
    layer = max(_backward(plan, layer, s) for layer in plan.layers)
    # The gradients, of the size of what trains, are whole when the last layer's backward pass, and
    # all it kept, is gone.
    gradients = round(trained * (1 + _UPDATE_AHEAD * (s.compiled and s.moments > 0)))
    before = sum(kept.values()) + max(head, layer)
    most = max(before, gradients + hidden)
    phase = "the head's chunks" if head >= layer else "one layer's backward pass"
    return {**kept, phase: max(head, layer), "gradients and the update": most - before}


def _head(plan: Plan, s: StepSettings, last_layer: int) -> int:
    """The head's slabs or chunks, as many as MLX runs ahead, and the stored gradient.

    Where there are fewer than that, MLX has not yet freed the last layer's passing arrays, about
    as much as it keeps. A head that trains makes every chunk's logits twice, and a share of its own
    gradient with each.
    """
    targets, trained = math.ceil(s.positions * s.targets), s.lora is None
    compiled_on_cpu = s.compiled and s.on_cpu
    if trained:
        ahead = _CHUNKS_AHEAD_COMPILED_ON_CPU if compiled_on_cpu else _CHUNKS_AHEAD
        rows = min(s.budgets.chunk(plan.vocab_size), targets)
        parts = 2 * math.ceil(targets / rows)
        alive = min(2 * targets, rows * max(ahead, 4))
        total = _CHUNK_ARRAYS * alive * plan.vocab_size * 4
        weights = min(parts // 2 + 1, ahead) * plan.vocab_size * plan.hidden_size
    else:
        ahead = _SLABS_AHEAD_COMPILED_ON_CPU if compiled_on_cpu else _SLABS_AHEAD
        width = min(s.budgets.slab(plan.vocab_size, targets), plan.vocab_size)
        parts = math.ceil(plan.vocab_size / width)
        alive = min(plan.vocab_size, width * ahead)
        total = targets * alive * (4 + s.itemsize)  # exponentials; logits, then their gradient
        weights = alive * plan.hidden_size if s.packing else 0
    waiting = max(0.0, 1 - parts / ahead) * last_layer
    hidden = _HIDDEN_ARRAYS * targets * plan.hidden_size
    return total + round(waiting) + (weights + hidden) * s.itemsize


def _backward(plan: Plan, layer: LayerPlan, s: StepSettings) -> int:
    """One layer's backward pass, beside what is counted as kept."""
    again, x = layer.index < s.remat_layers, s.itemsize
    queries, scores = plan.num_heads * layer.head_dim, s.length**2
    if s.blockwise(plan):
        mask = AttentionMask(s.length, layer.window, None, s.longest)
        block, together = s.budgets.block(s.batch_size, plan.num_heads, mask)
        scores = max(t.blocks * t.queries * t.keys for t in mask.tiles(block, together))
    mlp_positions = s.length
    if again:
        at_once = s.budgets.mlp_positions(s.batch_size, layer.mlp_width, x)
        mlp_positions = min(s.length, at_once)
    mlp = _MOVING_MLP * layer.mlp_width
    if plan.moe:
        mlp += plan.moe.top_k * (_MOVING_MLP * plan.moe.width + 2 * plan.hidden_size)
    hidden = _MOVING_HIDDEN + _AHEAD_HIDDEN * (s.compiled and s.on_cpu)
    total = s.positions * x * (hidden * plan.hidden_size + _MOVING_QUERIES * queries)
    total += _MOVING_SCORES * 4 * s.batch_size * plan.num_heads * scores
    total += s.batch_size * mlp_positions * x * mlp
    if again:
        attention, rest = _kept(plan, layer, s)
        total += attention + rest * mlp_positions // s.length
    return total


def _kept(plan: Plan, layer: LayerPlan, s: StepSettings) -> tuple[int, int]:
    """Bytes that a layer keeps for its backward pass when it is not rematerialised.

    A product keeps its input where its weight or adapter trains; a norm keeps its input, and
    where its weight trains also what that multiplies; products with frozen weights keep nothing.

    Returns:
        (for attention and between all adapters' two products, for what comes after attention).
    """
    x, D, full = s.itemsize, plan.hidden_size, s.lora is None
    queries, keys = plan.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    ranks = _ranks(plan, layer, s.lora)
    # On CPU a norm is float32 steps; on Metal it is one primitive that keeps its input as it is.
    normed = 4 if s.on_cpu else x

    def norm(width: int) -> int:
        return width * (normed + (x if full else 0))

    def product(width: int, *paths: str) -> int:
        """What the products `paths` keep of an input that they share."""
        adapted = [path for path in paths if path in ranks]
        copied = s.lora is not None and (s.lora.use_dora or bool(set(adapted) & set(EXPERTS)))
        return width * (_ADAPTER_BYTES if copied else x) * (full or bool(adapted))

    attn = [f"self_attn.{name}_proj" for name in "qkvo"]
    kept = norm(D) + product(D, *attn[:3])  # into the layer
    kept += norm(queries) + x * queries  # queries before their norm, and rotated
    if not layer.shares_kv:
        kept += norm(keys) + x * keys + normed * keys + x * keys  # keys, and values
    if s.blockwise(plan):
        kept += x * queries  # its output
    else:
        kept += (x * plan.num_heads + 1) * s.length  # softmax(QK^T), and the mask
    kept += product(queries, attn[3]) + norm(D)  # out of attention
    kept += _ADAPTER_BYTES * sum(ranks.values())  # between A and B

    rest = norm(D) + product(D, "mlp.gate_proj", "mlp.up_proj")
    rest += 2 * x * layer.mlp_width  # gelu_times: two derivatives, or its inputs
    rest += product(layer.mlp_width, "mlp.down_proj") + norm(D)
    if plan.ple:
        rest += product(D, "per_layer_input_gate") + x * plan.ple.width
        rest += product(plan.ple.width, "per_layer_projection") + norm(D)
    if plan.moe:
        k, W = plan.moe.top_k, plan.moe.width
        rest += product(k * D, *EXPERTS[:2]) + product(k * W, EXPERTS[2])
        rest += x * k * (_EXPERT_GELU * W + D)  # the activation, and each expert's output
        rest += 2 * norm(D) + product(D, ROUTER) + full * 2 * x * D
    return s.positions * kept, s.positions * rest
