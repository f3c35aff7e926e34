"""Will it fit? The memory of a training step, from config.json alone, as a formula.

Nothing is built, traced or downloaded: every term is a product of shapes, and `Estimate.terms`
lists them. A run that has the model measures instead (measure.py).

Shapes: B rows, T tokens, D model, N query heads, K key/value heads, H head dim, M width of the MLP,
V vocabulary, L layers, P width of per-layer embeddings.

>>> from mlx_gemma4.memory.estimate import StepSettings, estimate
>>> from mlx_gemma4.model.plan import Plan, read_config
>>> plan = Plan.from_config(read_config(tiny))
>>> whole = estimate(plan, StepSettings(length=256))
>>> lean = estimate(plan, StepSettings(length=256, remat_layers=len(plan.layers)))
>>> lean.step < whole.step, lean.resident == whole.resident
(True, True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import mlx.core as mx

from ..config import LoraConfig
from ..errors import ConfigError
from ..model.names import EXPERTS, is_meant
from ..model.plan import LayerPlan, Plan
from ..model.targets import chosen_modules, settings_of
from ..nn.attention import _AUTO_BYTES, _queries_of_a_block
from ..nn.forward import _LEAST_POSITIONS, _PIECE_BYTES
from ..nn.head import _chunk_size
from ..nn.mask import AttentionMask
from ..storage import size

__all__ = ["Estimate", "StepSettings", "estimate", "resident_bytes"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MOMENTS = {"adam": 2, "adamw": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0}
"""Arrays that an optimizer of MLX keeps of the size of each trained one, in that one's dtype. SGD
makes its velocity without momentum too; Adafactor keeps a row and a column of a matrix."""

_ADAPTER_BYTES = 4
"""Adapters are float32 whatever the weights are, and so is what they read."""

_HEAD_ARRAYS = 3
"""Arrays of a chunk's logits at a time: logits, their exponentials, their gradient."""

_CHUNKS_AHEAD = {"compiled": 4, "plain": 2}
"""Chunks of the head whose arrays are alive together. One would do, but MLX allocates for commands
that wait for the device: about a hundred on CPU (10 tasks of 10), which is four compiled chunks or
two of single operations. On Metal it is fewer commands; nobody has measured it."""

_LEAST_AHEAD = 2
"""The same on a GPU: the chunk that is computed and the one that is encoded."""

_HIDDEN_ARRAYS = 6
"""Of a hidden state of every target around the head: the final norm's steps, the stored gradient
in pieces and whole."""

_MOVING_MLP, _MOVING_HIDDEN, _MOVING_QUERIES, _MOVING_SCORES = 5, 4, 3, 2
"""Gradients and sums that are alive in one layer's backward pass beside what it kept: of the MLP's
width, of the hidden state's, of the queries', and of one block of scores (or of all, if plain)."""

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
        bits, group_size: of quantized weights; None bits is full precision.
        dtype: of weights that are not quantized.
        moments: arrays that the optimizer keeps for each trained one (MOMENTS).
        compiled: whether the step runs through mx.compile, which MLX before 0.32 gets wrong.
        device: "cpu" or "gpu".
    """

    batch_size: int = 1
    length: int = 2048
    longest: int | None = None
    targets: float = 1.0
    remat_layers: int = 0
    attention: str = "auto"
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    bits: int | None = None
    group_size: int = 64
    dtype: str = "bfloat16"
    moments: int = 2
    compiled: bool = tuple(map(int, version("mlx").split(".")[:2])) >= (0, 32)
    device: str = field(default_factory=lambda: mx.default_device().type.name)

    def __post_init__(self) -> None:
        if isinstance(self.remat_layers, bool):
            raise TypeError("remat_layers is a number of layers, not whether there are any")
        if self.bits is not None and self.lora is None:
            raise ConfigError(
                f"fine_tune_type is full and the weights have {self.bits} bits",
                wanted="full precision: quantized weights have no gradient",
                do="train LoRA, or take the original checkpoint",
            )

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return DTYPE_BYTES[self.dtype]

    def mask(self, layer: LayerPlan) -> AttentionMask:
        """The attention mask of a layer, without arrays."""
        return AttentionMask(self.length, layer.window, None, self.longest)

    def blockwise(self, plan: Plan) -> bool:
        """Whether attention goes block by block."""
        if self.attention != "auto":
            return self.attention == "blockwise"
        return self.batch_size * plan.num_heads * self.length**2 * 4 > _AUTO_BYTES


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
    resident = _resident(plan, settings)
    step = _step(plan, settings)
    return Estimate(sum(resident.values()), sum(step.values()), resident | step)


def resident_bytes(plan: Plan, settings: StepSettings) -> int:
    """Weights, adapters and optimizer state."""
    return sum(_resident(plan, settings).values())


# ---------------------------------------------------------------- what stays


def _resident(plan: Plan, s: StepSettings) -> dict[str, int]:
    weights = _weights(plan, s)
    trained = _trained(plan, s)
    return {
        "weights": weights,
        "adapters": trained if s.lora else 0,
        "optimizer state": s.moments * trained,
    }


def _trained(plan: Plan, s: StepSettings) -> int:
    """Bytes of what trains, which are those of its gradient too."""
    if s.lora is None:
        return _weights(plan, s) - len(plan.layers) * s.itemsize  # layer scalars do not train
    _check_targets(plan, s.lora)
    return sum(count for layer in plan.layers for count in _adapters(plan, layer, s).values())


def _weights(plan: Plan, s: StepSettings) -> int:
    """Bytes of the language model, without the PLE table."""
    matrices = [shape for layer in plan.layers for shape in _modules(plan, layer).values()]
    matrices += [(plan.vocab_size, plan.hidden_size)] * (1 if plan.tied else 2)
    vectors = sum(_vectors(plan, layer) for layer in plan.layers) + plan.hidden_size
    if plan.ple:
        matrices.append((len(plan.layers) * plan.ple.width, plan.hidden_size))
        vectors += plan.ple.width
    weights = sum(_stored(shape, s, s.bits, s.group_size) for shape in matrices)
    if plan.moe:
        router = _stored((plan.moe.num_experts, plan.hidden_size), s, s.bits and 8, 64)
        weights += len(plan.layers) * router
    return weights + vectors * s.itemsize


def _stored(shape: tuple[int, ...], s: StepSettings, bits: int | None, group_size: int) -> int:
    """Bytes of a matrix; quantized ones have a scale and a bias for each group."""
    count = math.prod(shape)
    if bits is None or shape[-1] % group_size:
        return count * s.itemsize
    return count * bits // 8 + 2 * (count // group_size) * s.itemsize


def _modules(plan: Plan, layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Weights of a layer's matrices, but the router's: path -> (out, in) or (E, out, in)."""
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
    return shapes


def _vectors(plan: Plan, layer: LayerPlan) -> int:
    """Values of norms and scalars of a layer."""
    count = 4 * plan.hidden_size + layer.head_dim * (1 if layer.shares_kv else 2) + 1
    if plan.ple:
        count += plan.hidden_size
    if plan.moe:
        count += 4 * plan.hidden_size + plan.moe.num_experts
    return count


# ---------------------------------------------------------------- what LoRA adapts


def _adapters(plan: Plan, layer: LayerPlan, s: StepSettings) -> dict[str, int]:
    """Bytes of the adapter of each module of a layer that has one."""
    assert s.lora is not None
    modules = _modules(plan, layer)
    if plan.moe:
        modules["router.proj"] = (plan.moe.num_experts, plan.hidden_size)
    sizes = {}
    for path, shape in modules.items():
        if s.lora.num_layers >= 0 and layer.index < len(plan.layers) - s.lora.num_layers:
            continue
        if any(is_meant((layer.index, path), word) for word in s.lora.targets):
            *experts, out, into = shape
            rank, _ = settings_of(s.lora, (layer.index, path))
            values = math.prod(experts) * rank * (out + into) + (out if s.lora.use_dora else 0)
            sizes[path] = values * _ADAPTER_BYTES
    return sizes


def _check_targets(plan: Plan, lora: LoraConfig) -> None:
    known = {(layer.index, path) for layer in plan.layers for path in _modules(plan, layer)}
    known |= {(layer.index, "router.proj") for layer in plan.layers if plan.moe}
    chosen_modules(lora, known, len(plan.layers))


# ---------------------------------------------------------------- what a step takes


def _step(plan: Plan, s: StepSettings) -> dict[str, int]:
    """What is kept from the forward pass, and the most that any phase of the step adds to it."""
    positions = s.batch_size * s.length
    hidden = positions * plan.hidden_size * s.itemsize
    again, plain = plan.layers[: s.remat_layers], plan.layers[s.remat_layers :]
    kept = {
        "PLE rows and per-layer inputs": 2 * _ple_rows(plan, s) if plan.ple else 0,
        "inputs of rematerialised layers": len(again) * hidden,
        "K/V that other layers share": sum(
            2 * positions * layer.num_kv_heads * layer.head_dim * s.itemsize
            for layer in again
            if layer.index in plan.kv_sources
        ),
        "kept by the other layers": sum(_kept(plan, layer, s) for layer in plain),
    }
    last = plan.layers[-1]
    head = _head(plan, s, _kept(plan, last, s) if plain else 0)
    layer = max(_backward(plan, layer, s) for layer in plan.layers)
    # The gradients are whole when the last layer's backward pass, and all it kept, is gone.
    gradients = round(_trained(plan, s) * (1 + _UPDATE_AHEAD * (s.compiled and s.moments > 0)))
    before = sum(kept.values()) + max(head, layer)
    most = max(before, gradients + hidden)
    phase = "the head's chunks" if head >= layer else "one layer's backward pass"
    return {
        **kept,
        phase: max(head, layer),
        "gradients and the update": most - before,
    }


def _ple_rows(plan: Plan, s: StepSettings) -> int:
    assert plan.ple is not None
    return s.batch_size * s.length * len(plan.layers) * plan.ple.width * s.itemsize


def _head(plan: Plan, s: StepSettings, last_layer: int) -> int:
    """The head's chunks, as many as MLX runs ahead, and the stored gradient.

    Where the head has fewer chunks than that, MLX has not yet freed the last layer's passing
    arrays, about as much as it keeps. A head that trains makes every chunk's logits twice, and a
    share of its own gradient with each.
    """
    targets = math.ceil(s.batch_size * s.length * s.targets)
    rows = min(_chunk_size(plan), targets)
    chunks, trained = math.ceil(targets / rows), s.lora is None
    ahead = _chunks_ahead(s)
    alive = min(2 * targets, rows * max(ahead, 4)) if trained else min(targets, rows * ahead)
    total = _HEAD_ARRAYS * alive * plan.vocab_size * 4
    if trained:
        total += min(chunks + 1, ahead) * plan.vocab_size * plan.hidden_size * s.itemsize
    waiting = max(0.0, 1 - (1 + trained) * chunks / ahead) * last_layer
    return total + round(waiting) + _HIDDEN_ARRAYS * targets * plan.hidden_size * s.itemsize


def _chunks_ahead(s: StepSettings) -> int:
    if s.device != "cpu":
        return _LEAST_AHEAD
    return _CHUNKS_AHEAD["compiled" if s.compiled else "plain"]


def _backward(plan: Plan, layer: LayerPlan, s: StepSettings) -> int:
    """One layer's backward pass, beside what is counted as kept."""
    again = layer.index < s.remat_layers
    x, positions = s.itemsize, s.batch_size * s.length
    queries = plan.num_heads * layer.head_dim
    moving = positions * x * (_MOVING_HIDDEN * plan.hidden_size + _MOVING_QUERIES * queries)
    scores = _MOVING_SCORES * 4 * s.batch_size * plan.num_heads * _scores(plan, layer, s)
    mlp_positions = s.length
    if again:
        at_once = _PIECE_BYTES // (s.batch_size * layer.mlp_width * x) // 64 * 64
        mlp_positions = min(s.length, max(_LEAST_POSITIONS, at_once))
    mlp = _MOVING_MLP * layer.mlp_width
    if plan.moe:
        mlp += plan.moe.top_k * (_MOVING_MLP * plan.moe.width + 2 * plan.hidden_size)
    total = moving + scores + s.batch_size * mlp_positions * x * mlp
    if again:
        attention = _kept(plan, layer, s, mlp=False)
        rest = _kept(plan, layer, s) - attention
        total += attention + rest * mlp_positions // s.length
    return total


def _scores(plan: Plan, layer: LayerPlan, s: StepSettings) -> int:
    """Pairs of a query and a key that one block of attention has, or all if it is plain."""
    if not s.blockwise(plan):
        return s.length**2
    mask = s.mask(layer)
    queries = min(s.length, _queries_of_a_block(s.batch_size, plan.num_heads, mask))
    return queries * min(s.length, queries + mask.reach)


# ---------------------------------------------------------------- what a layer keeps


def _kept(plan: Plan, layer: LayerPlan, s: StepSettings, *, mlp: bool = True) -> int:
    """Bytes that a layer keeps for its backward pass when it is not rematerialised.

    A product keeps its input where its weight or adapter trains; a norm keeps its input, and
    where its weight trains also what that multiplies; products with frozen weights keep nothing.

    Args:
        mlp: count what comes after attention too.
    """
    x, D, full = s.itemsize, plan.hidden_size, s.lora is None
    queries, keys = plan.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    adapted = {} if s.lora is None else _adapters(plan, layer, s)
    # On CPU a norm is float32 steps; on Metal it is one primitive that keeps its input as it is.
    normed = 4 if s.device == "cpu" else x

    def norm(width: int) -> int:
        return width * (normed + (x if full else 0))

    def product(width: int, *paths: str) -> int:
        """What the products `paths` keep of an input that they share."""
        return width * x if full else width * _ADAPTER_BYTES * any(p in adapted for p in paths)

    attn = [f"self_attn.{name}_proj" for name in "qkvo"]
    kept = norm(D) + product(D, *attn[:3])  # into the layer
    kept += norm(queries) + x * queries  # queries before their norm, and rotated
    if not layer.shares_kv:
        kept += norm(keys) + x * keys + normed * keys + x * keys  # keys, and values
    if s.blockwise(plan):
        kept += x * queries + 4 * plan.num_heads  # its output and log-sum-exp
    else:
        kept += (x * plan.num_heads + 1) * s.length  # softmax(QK^T), and the mask
    kept += product(queries, attn[3]) + norm(D)  # out of attention
    if mlp:
        kept += norm(D) + product(D, "mlp.gate_proj", "mlp.up_proj")
        kept += 2 * x * layer.mlp_width  # gelu_times: two derivatives
        kept += product(layer.mlp_width, "mlp.down_proj") + norm(D)
        if plan.ple:
            kept += product(D, "per_layer_input_gate") + x * plan.ple.width
            kept += product(plan.ple.width, "per_layer_projection") + norm(D)
        if plan.moe:
            k, W = plan.moe.top_k, plan.moe.width
            kept += product(k * D, *EXPERTS[:2]) + product(k * W, EXPERTS[2])
            kept += x * k * (_EXPERT_GELU * W + D)  # the activation, and each expert's output
            kept += 2 * norm(D) + product(D, "router.proj") + full * 2 * x * D
    if s.lora is not None:
        ranks = sum(settings_of(s.lora, (layer.index, path))[0] for path in adapted)
        kept += _ADAPTER_BYTES * ranks  # between A and B
    return s.batch_size * s.length * kept
