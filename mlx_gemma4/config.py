"""The settings of a run, declared once: Python, flags, YAML and help all read these dataclasses.

A field's name, its flag and its YAML key are one word: `batch_size` is `--batch-size` and
`batch_size:`. `LoraConfig`'s rank, alpha, dropout and targets carry the prefix `lora_` outside
Python. A flag wins over the YAML file, the file over the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError

__all__ = ["DataConfig", "LoraConfig", "RunConfig", "TrainConfig"]


def _setting(default: Any, help: str, *, prefix: str = "", at_least: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "prefix": prefix, "at_least": at_least})


@dataclass(frozen=True)
class _Settings:
    """Checks types and bounds of every field when it is made, whoever makes it."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _coerce(getattr(self, item.name), hints[item.name], _key(item))
            lower = item.metadata["at_least"]
            if lower is not None and value is not None and not lower <= value < math.inf:
                raise ConfigError(
                    f"{_key(item)} is {value}",
                    wanted=f"{lower} or more",
                    do=f"change {_key(item)}",
                )
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class RunConfig(_Settings):
    """What a run reads and where it writes."""

    model: str | None = _setting(
        None,
        "a model folder or a Hugging Face id, such as google/gemma-4-E2B-it; "
        "without it a small Gemma 4 that is built on this machine is trained",
    )
    data: str | None = _setting(
        None,
        "a folder with train (valid, test) files, one file, or a Hub dataset; "
        "several are mixed: chat.jsonl=2,code.parquet=0.5",
    )
    output: str | None = _setting(
        None, "folder for the adapter, checkpoints and metrics; default: runs/1, runs/2, ..."
    )
    fit: str | None = _setting(
        None,
        "choose settings that fit a memory, such as 16GB: rematerialize, then batch_size, "
        "then max_seq_length",
    )
    resume: bool = _setting(False, "go on from the newest checkpoint in the output folder")


@dataclass(frozen=True)
class DataConfig(_Settings):
    """How rows become examples."""

    train_on: Literal["assistant", "last", "all", "completion"] = _setting(
        "assistant",
        "the tokens that are learned: every assistant turn, the last one only, all tokens, "
        "or the completion of a prompt",
    )
    thinking: Literal["keep", "drop", "mask"] = _setting(
        "keep", "thoughts of assistant turns: learn them, leave them out, or show without learning"
    )
    max_seq_length: int = _setting(2048, "the most tokens of an example", at_least=2)
    overlong: Literal["skip", "error", "truncate"] = _setting(
        "skip", "what to do with an example over max_seq_length; skipping and cutting are counted"
    )
    truncate_from: Literal["end", "start"] = _setting(
        "end", "the side that overlong: truncate cuts; the first token stays either way"
    )
    on_bad_row: Literal["error", "skip"] = _setting(
        "error", "what to do with a row that cannot be used; skipped ones are counted and listed"
    )
    valid_fraction: float | None = _setting(
        None, "share of the training rows to hold out, where there is no valid file", at_least=0.0
    )
    columns: tuple[str, ...] = _setting(
        (), "names of the fields in your rows: prompt=question completion=answer"
    )
    dataset_config: str | None = _setting(None, "the configuration of a Hub dataset")
    dataset_split: str | None = _setting(
        None, "the part of a Hub dataset to train on, such as train[:1000]"
    )
    media_anywhere: bool = _setting(
        False, "let rows name images and audio outside the folder of their file"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid_fraction is not None and not 0 < self.valid_fraction < 1:
            raise ConfigError(
                f"valid_fraction is {self.valid_fraction}",
                wanted="between 0 and 1",
                do="change valid_fraction",
            )


@dataclass(frozen=True)
class TrainConfig(_Settings):
    """How the run goes. An iteration is one optimizer step."""

    fine_tune_type: Literal["lora", "full"] = _setting(
        "lora", "train LoRA adapters, or every weight of the language model"
    )
    iters: int | None = _setting(None, "optimizer steps; default: one epoch", at_least=1)
    epochs: float | None = _setting(
        None, "passes over the training examples, instead of iters", at_least=0.0
    )
    packing: bool = _setting(
        True,
        "put several examples into a row of max_seq_length tokens; none sees another. "
        "Without it every example is a row",
    )
    batch_size: int = _setting(1, "rows in a batch", at_least=1)
    grad_accumulation_steps: int = _setting(
        1, "batches summed into one optimizer step, weighted by their target tokens", at_least=1
    )
    learning_rate: float = _setting(1e-4, "Adam's learning rate", at_least=0.0)
    lr_schedule: Literal["constant", "linear", "cosine"] = _setting(
        "constant", "how the learning rate falls to zero over the run"
    )
    warmup_steps: int = _setting(0, "steps over which the learning rate rises first", at_least=0)
    rematerialize: Literal["none", "layer", "auto"] = _setting(
        "auto",
        "keep what the backward pass needs, or only each layer's input and compute the layer "
        "again; auto does so for as many layers as the memory asks for",
    )
    memory: str | None = _setting(
        None, "what the run may take, such as 16GB; default: what this machine has"
    )
    attention: Literal["auto", "plain", "blockwise"] = _setting(
        "auto", "form all attention scores at once, or block by block; the values are the same"
    )
    seed: int = _setting(0, "the order of examples, LoRA's start and dropout", at_least=0)
    report_every: int = _setting(10, "steps between lines in metrics.jsonl", at_least=1)
    eval_every: int = _setting(200, "steps between evaluations on valid.jsonl", at_least=1)
    val_batches: int | None = _setting(
        None, "batches of an evaluation; default: all of valid.jsonl", at_least=1
    )
    save_every: int = _setting(100, "steps between checkpoints", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iters is not None and self.epochs is not None:
            raise ConfigError(
                f"iters is {self.iters} and epochs is {self.epochs}",
                wanted="one of them",
                do="leave out iters or epochs",
            )


@dataclass(frozen=True)
class LoraConfig(_Settings):
    """LoRA: y = W x + (alpha / rank) B A x (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    The words are PEFT's: rsLoRA divides by the root of the rank (Kalajdzievski 2023,
    arXiv:2312.03732), DoRA learns each row's length apart from its direction (Liu et al. 2024,
    arXiv:2402.09353), and patterns give single modules a rank or alpha of their own.
    """

    rank: int = _setting(8, "rank of the adapters", prefix="lora_", at_least=1)
    alpha: float = _setting(
        16.0, "the update is scaled by alpha / rank", prefix="lora_", at_least=0.0
    )
    dropout: float = _setting(
        0.0, "share of an adapter's inputs dropped", prefix="lora_", at_least=0.0
    )
    targets: tuple[str, ...] = _setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "modules to adapt: short names, paths within a layer, or `experts`",
        prefix="lora_",
    )
    num_layers: int = _setting(-1, "adapt only the last N layers; -1 is all", at_least=-1)
    use_rslora: bool = _setting(False, "scale by alpha / sqrt(rank), for high ranks")
    use_dora: bool = _setting(False, "learn the length of each weight row too (DoRA)")
    rank_pattern: Mapping[str, int] | None = _setting(
        None, "ranks of single modules, in the words of lora_targets: down_proj=4"
    )
    alpha_pattern: Mapping[str, float] | None = _setting(
        None, "alphas of single modules: q_proj=32 layers.0.mlp.up_proj=8"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for name, value in (getattr(self, key) or {}).items():
                if not least <= value < math.inf:
                    raise ConfigError(
                        f"{key} gives {name} {value}",
                        wanted=f"{least} or more",
                        do=f"change {key}",
                    )
        if not self.dropout < 1:
            raise ConfigError(
                f"lora_dropout is {self.dropout}", wanted="below 1", do="change lora_dropout"
            )
        if self.num_layers == 0:
            raise ConfigError(
                "num_layers is 0", wanted="1 or more, or -1 for all", do="change num_layers"
            )
        if not self.targets:
            raise ConfigError(
                "lora_targets is empty", wanted="at least one module", do="name a target"
            )

    def __hash__(self) -> int:
        return hash(repr(sorted(flatten(self).items(), key=lambda pair: pair[0])))

    @property
    def scale(self) -> float:
        """The factor on the low-rank update: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        """The factor for a module's own rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# ---------------------------------------------------------------- keys, types, YAML, flags


def _key(item: dataclasses.Field) -> str:
    return item.metadata["prefix"] + item.name


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as the type that a field declares; YAML's `1e-4` is text and becomes a number."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _coerce(value, next(o for o in options if o is not type(None)), key)
    if origin is Literal:
        if value in options:
            return value
        wanted = "one of " + ", ".join(map(str, options))
    elif origin is tuple:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        wanted = "a list of names"
    elif origin is Mapping:
        if isinstance(value, (list, tuple)) and all("=" in str(pair) for pair in value):
            value = {name: _number(text) for name, _, text in (p.rpartition("=") for p in value)}
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return {name: _coerce(v, options[1], f"{key}.{name}") for name, v in value.items()}
        wanted = "names with numbers, such as q_proj=16 down_proj=4"
    elif kind is bool:
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        wanted = "a whole number"
    elif kind is float:
        wanted = "a number"
        if not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                pass
    elif isinstance(value, (str, Path)):
        return str(value)
    else:
        wanted = "text"
    raise ConfigError(f"{key} is {value!r}", wanted=wanted, do=f"change {key}")


def _number(text: str) -> int | float | str:
    """A flag's number; what is none stays text, for the message."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, as a flat mapping of keys to values."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}", wanted="a YAML file", do="check the path"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not YAML: {error}", wanted="lines of `key: value`", do="mend the file"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}",
            wanted="lines of `key: value`",
            do="mend the file",
        )
    return content


def build(
    groups: Sequence[type[_Settings]], values: Mapping[str, Any], source: str
) -> tuple[Any, ...]:
    """An instance of every group from one flat mapping; an unknown key is an error.

    Args:
        groups: the dataclasses that the mapping may fill.
        values: keys as in YAML.
        source: where the values come from, for the message.
    """
    known = {_key(item) for group in groups for item in dataclasses.fields(group)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"unknown key {key!r} in {source}",
                wanted="one of " + ", ".join(sorted(known)),
                do=f"did you mean {near[0]!r}?" if near else "remove it",
            )
    return tuple(
        group(
            **{
                item.name: values[_key(item)]
                for item in dataclasses.fields(group)
                if _key(item) in values
            }
        )
        for group in groups
    )


def flatten(*settings: _Settings) -> dict[str, Any]:
    """The settings as one flat mapping, the way a YAML file holds them."""
    pairs = {
        _key(item): getattr(group, item.name)
        for group in settings
        for item in dataclasses.fields(group)
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in pairs.items()}


def add_flags(parser: argparse.ArgumentParser, group: type[_Settings], title: str) -> None:
    """One flag per field; a flag that is not given leaves no value."""
    section = parser.add_argument_group(title)
    hints = typing.get_type_hints(group)
    for item in dataclasses.fields(group):
        kind, key = hints[item.name], _key(item)
        options: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS}
        default = "" if item.default is None else f" (default: {_shown(item.default)})"
        options["help"] = item.metadata["help"] + default
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            options.update(nargs="+", metavar="NAME")
        elif any(typing.get_origin(k) is Mapping for k in typing.get_args(kind)):
            options.update(nargs="+", metavar="NAME=N")
        else:
            inner = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
            options.update(type=inner, metavar={int: "N", float: "X"}.get(inner, "TEXT"))
        section.add_argument("--" + key.replace("_", "-"), **options)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(default) if isinstance(default, tuple) else str(default)
