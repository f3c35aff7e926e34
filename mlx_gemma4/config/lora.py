"""What LoRA adapts, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from .schema import Settings, flatten, setting, wrong


@dataclass(frozen=True)
class LoraConfig(Settings):
    """LoRA: y = W x + (alpha / rank) B A x (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    The words are PEFT's: rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024,
    arXiv:2402.09353), and patterns, which give single modules a rank or alpha of their own.
    """

    rank: int = setting(8, "rank of the adapters", prefix="lora_", at_least=1)
    alpha: float = setting(16.0, "scale the update by alpha / rank", prefix="lora_", above=0.0)
    dropout: float = setting(0.0, "share of its inputs dropped", prefix="lora_", at_least=0.0)
    targets: tuple[str, ...] = setting(
        ("attention", "mlp"),
        "modules to adapt: attention, mlp, experts, ple-projections, all-linear (all but the "
        "router), or single ones: q_proj, router.proj, layers.3.mlp.up_proj",
        prefix="lora_",
    )
    layers: str | int | None = setting(
        None, "adapt only these layers, from 0: 0-9,20; default: all", prefix="lora_"
    )
    num_layers: int = setting(-1, "adapt only the last N layers; -1 is all", at_least=-1)
    use_rslora: bool = setting(False, "scale by alpha / sqrt(rank), for high ranks")
    use_dora: bool = setting(False, "learn the length of each weight row too (DoRA)")
    qat: bool = setting(
        False,
        "quantization-aware: round the update into the quantized weights in each step, as a fused "
        "export with --quantize base does, so that it loses nothing",
    )
    rank_pattern: Mapping[str, int] | None = setting(
        None, "ranks of single modules, in the words of lora_targets: down_proj=4"
    )
    alpha_pattern: Mapping[str, float] | None = setting(None, "alphas of single modules: q_proj=32")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for name, value in (getattr(self, key) or {}).items():
                if not least <= value < math.inf:
                    raise wrong(f"{key}.{name}", value, f"{least} or more")
        if not self.dropout < 1:
            raise wrong("lora_dropout", self.dropout, "below 1")
        if self.num_layers == 0:
            raise wrong("num_layers", 0, "1 or more, or -1 for all")
        if self.layers is not None and self.num_layers != -1:
            found = f"lora_layers is {self.layers} and num_layers is {self.num_layers}"
            raise ConfigError(found, wanted="one of them", do="leave out lora_layers or num_layers")
        if self.layers is not None and not all(self.layer_spans):
            raise wrong("lora_layers", self.layers, "layers and ranges of them, such as 0-9,20")
        if self.qat and (self.use_dora or self.dropout):
            other = "use_dora" if self.use_dora else "lora_dropout"
            raise ConfigError(
                f"qat and {other}",
                wanted="an update that a fused export rounds into the weights as it is trained",
                do=f"leave out qat or {other}",
            )
        if not self.targets:
            raise wrong("lora_targets", "empty", "at least one module")

    def __hash__(self) -> int:
        return hash(repr(sorted(flatten(self).items(), key=lambda pair: pair[0])))

    @property
    def layer_spans(self) -> list[range]:
        """The ranges of `layers`; an empty one for each that is none."""
        spans = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in str(self.layers).split(",")]
        return [range(int(s[1]), int(s[2] or s[1]) + 1) if s else range(0) for s in spans]

    @property
    def scale(self) -> float:
        """The factor on the low-rank update: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        """The factor for a module's own rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)
