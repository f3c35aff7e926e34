"""What a step forms at a time on a device: attention scores, MLP activations, logits.

On a CPU what is formed should stay near its caches, and exp is dear. On a GPU every kernel costs a
launch, every array its bytes, and products want many rows: there the sizes are shares of the memory
that it may use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from .mask import AttentionMask

_MLP_SHARE, _SCORES_SHARE, _LOGITS_SHARE = 1 / 50, 1 / 50, 1 / 100
"""Of a GPU's memory: for a piece of the MLP, for the scores of a block, and for a slab of the head,
of which several are alive."""

_MLP_ARRAYS, _SCORE_BYTES, _LOGIT_BYTES = 10, 10, 8
"""Arrays of the MLP's width that a piece forms, gradients included; bytes that a block forms of
each score, and a slab of each logit."""

_TILE = 64
"""Queries, positions and rows of the head come in multiples of it, and no fewer."""


@dataclass(frozen=True)
class Budgets:
    """How much of a step is formed at a time.

    Attributes:
        gpu_memory: bytes that a GPU's programs may use; None is a CPU.
    """

    gpu_memory: int | None = None

    @classmethod
    def here(cls) -> Budgets:
        """Those of MLX's default device.

        >>> from mlx_gemma4.nn.budgets import Budgets
        >>> Budgets().block(1, 8, AttentionMask(2048, window=512))
        (128, 1)
        >>> Budgets(gpu_memory=16 * 10**9).block(1, 8, AttentionMask(2048, window=512))
        (256, 20)
        """
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return cls(machine_memory() if on_gpu else None)

    def block(self, B: int, N: int, mask: AttentionMask) -> tuple[int, int]:
        """(queries of a block of attention, blocks of a window that are taken together).

        A block of C queries forms C + reach - 1 scores for each: the less the smaller it is.
        """
        reach = mask.reach
        if self.gpu_memory is None:
            return _tiles(min(2**21 // (B * N * reach), reach // 4, 512)), 1
        scores = int(self.gpu_memory * _SCORES_SHARE) // (_SCORE_BYTES * B * N)
        queries = _tiles(min(scores // reach, max(128, min(reach // 2, 512))))
        return queries, max(1, scores // (queries * (queries + reach)))

    def mlp_positions(self, B: int, width: int, itemsize: int) -> int:
        """Positions of a row that go through a rematerialised layer's MLP together."""
        if self.gpu_memory is None:
            positions = 2**21 // (B * width * itemsize)
        else:
            per_position = _MLP_ARRAYS * B * width * itemsize
            positions = int(self.gpu_memory * _MLP_SHARE) // per_position
        return _tiles(positions, at_least=256)

    def slab(self, vocabulary: int, targets: int) -> int:
        """Rows of a frozen head that meet so many targets together."""
        logits = 16 * vocabulary
        if self.gpu_memory is not None:
            logits = int(self.gpu_memory * _LOGITS_SHARE) // _LOGIT_BYTES
        return _tiles(logits // targets, at_least=256)

    def chunk(self, vocabulary: int) -> int:
        """Targets that meet all of a head that trains together."""
        logits = 2**21
        if self.gpu_memory is not None:
            logits = int(self.gpu_memory * _LOGITS_SHARE) // _LOGIT_BYTES
        return _tiles(logits // vocabulary)

    @property
    def keeps_derivatives(self) -> bool:
        """Whether GELU keeps its derivatives, which spares exps, or its inputs: fewer bytes."""
        return self.gpu_memory is None


@cache
def machine_memory() -> int:
    """Bytes that training may use here: what the GPU's driver recommends, or the RAM."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _tiles(number: int, at_least: int = _TILE) -> int:
    return max(at_least, number // _TILE * _TILE)
