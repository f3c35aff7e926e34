"""How a run goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from .schema import Settings, setting, wrong

_SERVICES = ("tensorboard", "wandb", "trackio", "swanlab")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How the run goes. An iteration is one optimizer step."""

    fine_tune_type: Literal["lora", "full"] = setting(
        "lora", "train LoRA adapters, or every weight of the language model"
    )
    train_parts: tuple[str, ...] | None = setting(
        None,
        "full fine-tuning of these parts only: norms, embeddings, last-N-layers, and words of "
        "lora_targets such as ple-projections; default: all",
    )
    iters: int | None = setting(None, "optimizer steps; default: one epoch", at_least=1)
    epochs: float | None = setting(None, "passes over the data, instead of iters", above=0.0)
    packing: bool = setting(
        True,
        "put several examples into a row of max_seq_length tokens; none sees another. "
        "Without it every example is a row",
    )
    batch_size: int = setting(1, "rows in a batch", at_least=1)
    grad_accumulation_steps: int = setting(
        1, "batches summed into one optimizer step, weighted by their target tokens", at_least=1
    )
    optimizer: Literal["adam", "adamw", "adafactor", "lion", "muon", "sgd"] = setting(
        "adam", "from mlx.optimizers"
    )
    bias_correction: bool = setting(
        False,
        "correct Adam's averages for their start, as PEFT and TRL do; without, the first "
        "hundreds of updates are larger, as in MLX and mlx-lm",
    )
    learning_rate: float = setting(1e-4, "the optimizer's learning rate", at_least=0.0)
    lora_plus_ratio: float | None = setting(
        None, "LoRA+: the learning rate of B over that of A; default: both are one", at_least=1.0
    )
    embedding_learning_rate: float | None = setting(
        None,
        "full fine-tuning: the rate of the token embeddings, lower for continued pretraining",
        at_least=0.0,
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "how the learning rate falls over the run"
    )
    min_learning_rate: float = setting(0.0, "where a linear or cosine schedule ends", at_least=0.0)
    warmup_steps: int = setting(0, "steps over which the learning rate rises first", at_least=0)
    router_metrics: bool = setting(
        False,
        "experts: each expert's share of its layer's tokens, the routers' entropy and "
        "load-balancing loss, in metrics.jsonl",
    )
    router_aux_loss_coef: float = setting(
        0.0, "experts: the load-balancing loss, times this, is trained too", at_least=0.0
    )
    weight_decay: float = setting(0.0, "of matrices; norms and biases do not decay", at_least=0.0)
    max_grad_norm: float | None = setting(None, "clip gradients to this global norm", at_least=0.0)
    rematerialize: str | int = setting(
        "auto",
        "gradient checkpointing: how many layers, from the first, keep only their input and run "
        "again in the backward pass; none, all, a number, or auto: as many as the memory asks for",
    )
    memory: str | None = setting(None, "what the run may take, such as 16GB; default: all there is")
    attention: Literal["auto", "plain", "blockwise"] = setting(
        "auto", "form all attention scores at once, or block by block; the values are the same"
    )
    verbose: bool = setting(
        False, "say more: how the model was loaded, what memory was forecast, compilations"
    )
    seed: int = setting(0, "the order of examples, LoRA's start and dropout", at_least=0)
    report_every: int = setting(
        10, "steps between reports: metrics.jsonl, and a printed line", at_least=1
    )
    eval_every: int = setting(200, "steps between evaluations on valid.jsonl", at_least=1)
    val_batches: int | None = setting(None, "batches of an evaluation; default: all", at_least=1)
    save_every: int = setting(100, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep, beside the best", at_least=1)
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "a loss or gradient that is not finite changes no weight; save a report and stop, or go on",
    )
    sample_prompts: str | None = setting(
        None,
        "a file of prompts, a line each (.jsonl: prompt or messages), answered at each evaluation "
        "and kept in report.html",
    )
    report_to: tuple[str, ...] = setting(
        (), "send figures to tensorboard, wandb, trackio or swanlab too"
    )
    max_minutes: float | None = setting(
        None, "save and stop after so many; time asleep does not count", above=0.0
    )
    patience: int | None = setting(
        None, "save and stop after so many evaluations without a lower validation loss", at_least=1
    )

    @property
    def balance(self) -> float | None:
        """As in StepOptions."""
        asked = self.router_metrics or self.router_aux_loss_coef
        return self.router_aux_loss_coef if asked else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iters is not None and self.epochs is not None:
            found = f"iters is {self.iters} and epochs is {self.epochs}"
            raise ConfigError(found, wanted="one of them", do="leave out iters or epochs")
        if self.weight_decay and self.optimizer == "adam":
            raise ConfigError(
                f"weight_decay is {self.weight_decay} and optimizer is adam",
                wanted="an optimizer that has weight decay",
                do="take optimizer adamw, or leave out weight_decay",
            )
        if self.train_parts is not None and (self.fine_tune_type == "lora" or not self.train_parts):
            raise ConfigError(
                f"fine_tune_type is {self.fine_tune_type} and train_parts is "
                f"{', '.join(self.train_parts) or 'empty'}",
                wanted="full fine-tuning, and parts of the model",
                do="set fine_tune_type full, or leave out train_parts",
            )
        if self.lora_plus_ratio is not None and self.fine_tune_type == "full":
            raise ConfigError(
                f"fine_tune_type is full and lora_plus_ratio is {self.lora_plus_ratio}",
                wanted="LoRA or full fine-tuning",
                do="leave out lora_plus_ratio, or set fine_tune_type lora",
            )
        if self.embedding_learning_rate is not None and (
            self.fine_tune_type == "lora" or not self.learning_rate
        ):
            raise ConfigError(
                f"embedding_learning_rate is {self.embedding_learning_rate}, fine_tune_type is "
                f"{self.fine_tune_type} and learning_rate is {self.learning_rate}",
                wanted="embeddings that train, beside weights that train",
                do="set fine_tune_type full, or leave out embedding_learning_rate",
            )
        if unknown := sorted({*self.report_to} - {*_SERVICES}):
            raise wrong("report_to", ", ".join(unknown), "some of " + ", ".join(_SERVICES))
        if self.min_learning_rate > self.learning_rate:
            most = f"at most learning_rate, {self.learning_rate}"
            raise wrong("min_learning_rate", self.min_learning_rate, most)
        # "layer" is the earlier word for all.
        word = "all" if self.rematerialize == "layer" else str(self.rematerialize)
        object.__setattr__(self, "rematerialize", word)
        if word not in ("none", "all", "auto") and not word.isdecimal():
            raise wrong("rematerialize", repr(word), "none, all, auto or a number of layers")
