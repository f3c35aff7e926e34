"""Will it fit? The peak of memory of a training step, from config.json alone.

The step itself is traced, without computing anything, and MLX's evaluator is simulated over its
graph (`evaluator.py`): which buffers are taken over, which are copied, when each is free. So the
forecast follows the code that trains, and no formula has to be kept in step with it.

A graph grows with layers and with blocks of attention. Of a deep model a few layers of each kind
are traced, and the rest counted: what a layer adds is the same every time. Lengths over 4096 are
counted from two shorter ones in the same way.

`tiny` is the folder of a small checkpoint:

>>> from mlx_gemma4.model.plan import Plan, read_config
>>> from mlx_gemma4.train.memory import forecast
>>> plan = Plan.from_config(read_config(tiny))
>>> whole = forecast(plan, batch_size=1, length=256)
>>> lean = forecast(plan, batch_size=1, length=256, rematerialize=True)
>>> lean.peak < whole.peak, lean.resident == whole.resident
(True, True)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..config import LoraConfig
from ..model.plan import LayerPlan, Plan
from .simulator.evaluator import CPU, METAL, Held, Pace, simulate
from .simulator.fusion import fuse
from .simulator.skeleton import build_batch, build_skeleton
from .step import COMPILES

__all__ = ["Forecast", "forecast", "resident_bytes"]

_OF_EACH_KIND = 3
_LENGTHS_TRACED = (2048, 4096)

Group = tuple[int, int, tuple[int, ...], str]
"""Buffers of one kind at the peak: bytes, how many, their shape, the primitive they are of."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of one training step.

    Attributes:
        resident: weights, adapters and optimizer state. The PLE table is on disk.
        step: the most that is alive at a time beside them, the batch included, with MLX's
            evaluator as far ahead of the device as it may run.
        least: the same if the evaluator waited for the device after every primitive.
        floor: layer boundaries, one layer's working set and one chunk of the head.
        held: what is alive at the peak beside inputs, largest first, where it was asked for: of
            a deep model, of the few layers that were traced.
    """

    resident: int
    step: int
    least: int
    floor: int
    held: tuple[Group, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes at the peak, all told."""
        return self.resident + self.step

    def __repr__(self) -> str:
        ratio = self.step / max(self.floor, 1)
        return (
            f"peak {size(self.peak)}: {size(self.resident)} resident + {size(self.step)} a step "
            f"({size(self.least)} if MLX did not run ahead; floor {size(self.floor)}, "
            f"{ratio:.1f} times)"
        )

    def profile(self, count: int = 8) -> str:
        """What is alive at the peak, a line each."""
        lines = [
            f"{size(nbytes):>9}  {number:4} x {'x'.join(map(str, shape)) or 'scalar'}  {op}"
            for nbytes, number, shape, op in self.held[:count]
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Settings:
    """All that a step's memory depends on, hashable, so that nothing is traced twice."""

    lora: LoraConfig | None
    bits: int | None
    group_size: int
    dtype: str
    B: int
    T: int
    longest: int | None
    targets: float
    rematerialize: bool | int
    attention: str
    compiled: bool
    pace: Pace


def forecast(
    plan: Plan | Mapping[str, Any],
    *,
    batch_size: int = 4,
    length: int = 2048,
    longest: int | None = None,
    targets: float = 1.0,
    fine_tune_type: str = "lora",
    lora: LoraConfig = LoraConfig(),
    bits: int | None = None,
    group_size: int = 64,
    dtype: str = "bfloat16",
    rematerialize: bool | int = False,
    attention: str = "auto",
    compiled: bool = COMPILES,
    pace: Pace | None = None,
    profile: bool = False,
) -> Forecast:
    """Bytes of one step of `train_step`, with Adam.

    Args:
        plan: a Plan, or a parsed config.json.
        batch_size, length: rows and tokens of a batch.
        longest: of the documents of packed rows; None is one document per row.
        targets: the share of tokens that are learned.
        fine_tune_type: lora or full.
        bits, group_size, dtype: of the weights; None bits is full precision.
        rematerialize, attention: as in `train_step`.
        compiled: whether the step runs through mx.compile.
        pace: how the evaluator runs ahead; by default as on this machine's device.
        profile: say what is alive at the peak.

    Raises:
        Gemma4Error: no Gemma 4, unknown targets, full fine-tuning of quantized weights, or (a
            CapabilityError) a step that MLX cannot export.
    """
    if not isinstance(plan, Plan):
        plan = Plan.from_config(plan)
    settings = _Settings(
        lora=lora if fine_tune_type == "lora" else None, bits=bits, group_size=group_size,
        dtype=dtype, B=batch_size, T=length, longest=longest, targets=targets,
        rematerialize=rematerialize, attention=attention, compiled=compiled,
        pace=pace or _own_pace(),
    )  # fmt: skip
    key = _Hashed(plan)
    step, least = _step_bytes(key, settings)
    return Forecast(
        resident=resident_bytes(plan, settings.lora, bits, group_size, dtype),
        step=step,
        least=least,
        floor=floor_bytes(plan, batch_size, length, dtype),
        held=_profile(key, settings) if profile else (),
    )


def _own_pace() -> Pace:
    return METAL if mx.default_device().type == mx.DeviceType.gpu else CPU


def resident_bytes(
    plan: Plan, lora: LoraConfig | None, bits: int | None, group_size: int, dtype: str
) -> int:
    """Weights, adapters and optimizer state; nothing is traced."""
    return _skeleton(_Hashed(plan), lora, bits, group_size, dtype).resident


def floor_bytes(plan: Plan, B: int, T: int, dtype: str) -> int:
    """What no rematerialised step can do without, for its method.

    The input of every layer, the activations that one layer's backward pass reads, the PLE rows
    of the batch, and one chunk of logits.
    """
    itemsize = getattr(mx, dtype).size
    widest = max(_working_set(plan, layer) for layer in plan.layers)
    boundaries = (len(plan.layers) + 1) * plan.hidden_size
    rows = len(plan.layers) * plan.ple.width if plan.ple else 0
    chunk = max(64 * plan.vocab_size * 4, min(8 * 2**20, B * T * plan.vocab_size * 4))
    return B * T * itemsize * (boundaries + widest + rows) + chunk


def _working_set(plan: Plan, layer: LayerPlan) -> int:
    """Values per token that the backward pass of a layer reads."""
    attention = 2 * plan.num_heads * layer.head_dim + 2 * layer.num_kv_heads * layer.head_dim
    experts = 3 * plan.moe.top_k * plan.moe.width if plan.moe else 0
    return 4 * plan.hidden_size + attention + 3 * layer.mlp_width + experts


def size(nbytes: float) -> str:
    """Bytes for people: 12.3 GB, 45 MB."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if abs(nbytes) >= power:
            return f"{nbytes / power:.{1 if unit == 'GB' or nbytes < 1e7 else 0}f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


# ---------------------------------------------------------------- tracing and counting


class _Hashed:
    """A plan as a key: plans hold dictionaries."""

    def __init__(self, plan: Plan):
        self.plan, self._key = plan, repr(plan)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key


def _step_bytes(plan: _Hashed, settings: _Settings) -> tuple[int, int]:
    """(step, least), counted in length where it is long."""
    low, high = _LENGTHS_TRACED
    if high >= settings.T or settings.attention == "plain":
        return _over_layers(plan, settings)
    at_low = _over_layers(plan, dataclasses.replace(settings, T=low))
    at_high = _over_layers(plan, dataclasses.replace(settings, T=high))
    share = (settings.T - high) / (high - low)
    step, least = (round(b + (b - a) * share) for a, b in zip(at_low, at_high))
    return step, least


def _over_layers(plan: _Hashed, settings: _Settings) -> tuple[int, int]:
    """(step, least), of a few layers of each kind and what one more of each adds."""
    counts, base = _few_layers(plan.plan)
    if counts == base:
        return _traced(plan, settings)[:2]
    lean = settings.rematerialize
    if not isinstance(lean, bool):
        none, all_of_them = (
            _over_layers(plan, dataclasses.replace(settings, rematerialize=r))
            for r in (False, True)
        )
        share = min(1.0, lean / len(plan.plan.layers))
        step, least = (round(a + (b - a) * share) for a, b in zip(none, all_of_them))
        return step, least
    start = _traced(_Hashed(_with_layers(plan.plan, base)), settings)[:2]
    step, least = start
    # Its input is kept, even if a few layers peak where that does not show yet.
    boundary = settings.B * settings.T * plan.plan.hidden_size * getattr(mx, settings.dtype).size
    for kind, count in counts.items():
        if count > base[kind]:
            more = _with_layers(plan.plan, base | {kind: base[kind] + 1})
            added = _traced(_Hashed(more), settings)[:2]
            step += (count - base[kind]) * max(added[0] - start[0], boundary)
            least += (count - base[kind]) * max(added[1] - start[1], boundary)
    return step, least


def _profile(plan: _Hashed, settings: _Settings) -> tuple[Group, ...]:
    settings = dataclasses.replace(settings, T=min(settings.T, _LENGTHS_TRACED[1]))
    plan = _Hashed(_with_layers(plan.plan, _few_layers(plan.plan)[1]))
    return _traced(plan, settings, with_held=True)[2]


def _few_layers(plan: Plan) -> tuple[dict[Any, int], dict[Any, int]]:
    """Layers of each kind: all, and those of the model that is traced instead, if it is quicker."""
    counts = Counter(_kind(layer) for layer in plan.layers)
    base = {kind: min(_OF_EACH_KIND, count) for kind, count in counts.items()}
    more = [kind for kind in counts if counts[kind] > base[kind]]
    traced = sum(base.values()) * (1 + len(more)) + len(more)
    return dict(counts), (base if traced < len(plan.layers) else dict(counts))


def _kind(layer: LayerPlan) -> tuple[bool, str]:
    return layer.shares_kv, layer.kind


def _with_layers(plan: Plan, wanted: Mapping[tuple[bool, str], int]) -> Plan:
    """The plan with its last layers of each kind, `wanted` of them, and sources among those."""
    left, kept = dict(wanted), []
    for layer in reversed(plan.layers):
        kind = _kind(layer)
        if left.get(kind):
            left[kind] -= 1
            kept.append(layer)
    kept.reverse()
    position = {layer.index: i for i, layer in enumerate(kept)}
    layers = tuple(
        dataclasses.replace(layer, index=i, kv_source=position[layer.kv_source])
        for i, layer in enumerate(kept)
    )
    return dataclasses.replace(plan, layers=layers)


@lru_cache(maxsize=8)
def _skeleton(plan: _Hashed, lora: Any, bits: Any, group_size: int, dtype: str) -> Any:
    return build_skeleton(
        plan.plan, lora=lora, bits=bits, group_size=group_size, dtype=getattr(mx, dtype)
    )


@lru_cache(maxsize=256)
def _traced(
    plan: _Hashed, settings: _Settings, with_held: bool = False
) -> tuple[int, int, tuple[Group, ...]]:
    """(step, least, what is held at the peak) of a plan as it is."""
    skeleton = _skeleton(plan, settings.lora, settings.bits, settings.group_size, settings.dtype)
    batch = build_batch(
        plan.plan,
        settings.B,
        settings.T,
        longest=settings.longest,
        targets=settings.targets,
        dtype=getattr(mx, settings.dtype),
    )
    graph, replaced = skeleton.trace(
        batch,
        merged=settings.compiled,
        rematerialize=settings.rematerialize,
        attention=settings.attention,
    )
    if settings.compiled:
        graph = fuse(graph)
    ahead = simulate(graph, released=replaced, pace=settings.pace, with_held=with_held)
    waiting = simulate(graph, released=replaced, pace=dataclasses.replace(settings.pace, tasks=0))
    resident = skeleton.resident
    return ahead.peak - resident, waiting.peak - resident, _grouped(ahead.held)


def _grouped(held: list[Held]) -> tuple[Group, ...]:
    counts: Counter[Held] = Counter(held)
    groups = [(x.nbytes * count, count, x.shape, x.op) for x, count in counts.items()]
    return tuple(sorted(groups, reverse=True))
