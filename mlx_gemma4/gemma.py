"""`Gemma4`: a loaded model with its tokenizer and plan, and the few things one does with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import GenerateConfig, LoraConfig
from .errors import AdapterError, CapabilityError, ConfigError, ModelError
from .lora.attach import adapted_modules, attach_lora
from .lora.state import load_adapter, unfreeze
from .lora.targets import parts, resolve_targets
from .media.prompt import expanded_prompt
from .model.conversation import Prompt, conversation, media_of, with_media
from .model.download import resolve
from .model.generation import TextOf, stream_tokens
from .model.loader import LoadedBackbone, load_backbone
from .model.names import Module, flat, is_frozen_buffer, lm_head, text_model
from .model.plan import Plan, read_config
from .model.processor import NO_MEDIA, MediaSettings, read_media_settings
from .model.quantize import Policy, described
from .model.targets import chosen_weights
from .model.tokenizer import end_tokens, load_processor, load_tokenizer, prompt_tokens
from .nn.batch import Batch
from .nn.forward import forward
from .nn.head import logits
from .nn.prefill import prefill
from .storage import size


def load(
    path_or_hub_id: str | Path,
    adapter: str | Path | None = None,
    *,
    encoders: bool = False,
    quantize: str | int | None = None,
    towers: bool | None = None,
) -> Gemma4:
    """Load a Gemma 4 for training or generation.

    Args:
        adapter: an adapter folder of any format, or the folder of a run that has one.
        encoders: build vision and audio encoders too, through mlx-vlm.
        quantize: bits (4, 5, 6, 8), mxfp4, nvfp4, mxfp8 or q4_0: the language model is quantized
            as it is read, and is never in memory in full precision.
        towers: the old name of `encoders`, refused with a ConfigError.

    Returns:
        The model, frozen but for the adapter; `add_lora` or `train_all` says what trains.

    Raises:
        ModelError: the checkpoint cannot be used as it is.
        ConfigError: a quantization that there is not, or of a model that is quantized.
        AdapterError: the adapter does not fit it.

    >>> import mlx_gemma4 as g4
    >>> gemma = g4.load(tiny)
    >>> gemma.plan.num_shared
    3
    """
    if towers is not None:
        raise ConfigError("towers is given", wanted="encoders, its name now", do="rename it")
    policy = None if quantize is None else Policy.asked_for(quantize)
    folder = resolve(path_or_hub_id)
    Plan.from_config(read_config(folder))  # what is wrong shows before gigabytes are read
    tokenizer = load_tokenizer(folder)
    loaded = load_backbone(folder, encoders=encoders, quantize=policy)
    gemma = Gemma4(
        name=str(path_or_hub_id),
        loaded=loaded,
        tokenizer=tokenizer,
        processor=load_processor(folder) if encoders else None,
        end_tokens=frozenset(end_tokens(folder, loaded.config, tokenizer)),
        quantize=None if quantize is None else str(quantize),
        media=read_media_settings(folder, loaded.plan),
    )
    if adapter is not None:
        gemma.load_adapter(adapter)
    return gemma


@dataclass(repr=False)
class Gemma4:
    """A Gemma 4 in memory.

    Attributes:
        name: the path or Hub id that it was loaded from.
        loaded: backbone, plan, PLE rows, and the loader's report.
        tokenizer: transformers' tokenizer, with the chat template.
        processor: mlx-vlm's processor where encoders were loaded.
        end_tokens: token ids on which an answer ends.
        quantize: how it was quantized while loading, as asked for.
        adapter: the adapter that it was loaded with.
        lora: the settings of the LoRA layers on it, if any.
        media: how images and audio become what encoders take, where the checkpoint says so.
    """

    name: str
    loaded: LoadedBackbone
    tokenizer: Any
    processor: Any
    end_tokens: frozenset[int]
    quantize: str | None = None
    adapter: str | None = None
    lora: LoraConfig | None = None
    media: MediaSettings = NO_MEDIA

    @property
    def backbone(self) -> nn.Module:
        """mlx-lm's model, or mlx-vlm's with encoders."""
        return self.loaded.backbone

    @property
    def plan(self) -> Plan:
        """The architecture."""
        return self.loaded.plan

    def logits(self, tokens_BT: mx.array, **media: Any) -> mx.array:
        """Logits (B, T, V), float32, of token ids (B, T), through the training forward.

        Args:
            media: as in `Batch.from_tokens`.
        """
        batch = Batch.of_prompt(tokens_BT, **media).with_ple_rows(self)
        return logits(self, forward(self, batch))

    def ple_rows(self, tokens_BT: mx.array) -> mx.array | None:
        """Rows (B, T, L, P) of the PLE table, read from disk; None for members without one."""
        return self.loaded.ple_rows(tokens_BT) if self.loaded.ple_rows else None

    def load_adapter(self, adapter: str | Path) -> None:
        """Put an adapter of any format on the model, or that of a run's folder; let it train.

        Raises:
            AdapterError: it does not fit, or the model carries one already.
        """
        self._require_plain()
        self.lora = load_adapter(self.backbone, self.plan, adapter)
        self.adapter = str(adapter)

    def add_lora(self, lora: LoraConfig = LoraConfig()) -> Mapping[str, int]:
        """Put LoRA layers on the model and let only them train.

        Returns:
            How many modules of each path within a layer were adapted.

        Raises:
            AdapterError: a target matches nothing, or the model carries LoRA already.
            ConfigError: qat, and no stored grid to train on.
        """
        self._require_plain()
        self.backbone.freeze()
        modules = resolve_targets(self.backbone, lora)
        if lora.qat:
            self._require_stored_grid(modules)
        attach_lora(self.backbone, modules, lora)
        self.lora = lora
        return adapted_modules(self.backbone)

    def _require_plain(self) -> None:
        if self.lora is not None:
            raise AdapterError(
                "the model carries LoRA layers already", wanted="one without", do="load it again"
            )

    def _require_stored_grid(self, modules: Collection[Module]) -> None:
        if self.quantize is not None:
            raise ConfigError(
                f"qat, and {self.name} is quantized only in memory",
                wanted="a quantized model in a folder, whose grid a fused export keeps",
                do="give --save-quantized DIR beside --quantize",
            )
        found = ((i, path, m) for i, _, named in parts(self.backbone) for path, m in named.items())
        if not any("scales" in module for i, path, module in found if (i, path) in modules):
            raise ConfigError(
                f"qat, and no weight of {self.name} that LoRA adapts is quantized",
                wanted="a quantized model, to whose grid a fused export rounds",
                do="leave out qat, or quantize the model with --quantize 4 --save-quantized DIR",
            )

    def train_all(self, *, encoders: bool = False) -> None:
        """Let every weight of the language model train, but no buffer or PLE table.

        Args:
            encoders: those of the encoders and projectors too.

        Raises:
            ModelError: quantized weights, which have no gradient.
        """
        text = self.backbone if encoders else text_model(self.backbone)
        _require_gradients(text)
        _unfreeze_all(text)
        if not self.plan.tied:
            lm_head(self.backbone).unfreeze()

    def train_parts(self, parts: Collection[str]) -> None:
        """Let some weights train, beside what trains already.

        Args:
            parts: `norms`, `last-N-layers`, or words of LoRA's targets: `ple-projections`, `mlp`,
                `experts`, `q_proj`, ...; and encoders and projectors: `vision_tower`,
                `embed_vision`, ...

        Raises:
            ConfigError: a part that the model does not have.
            ModelError: quantized weights, which have no gradient.
        """
        text = text_model(self.backbone)
        _require_gradients(text)
        names = [name for name in flat(text.parameters()) if not is_frozen_buffer(name)]
        encoders = [part for part in parts if self.backbone.get(part) is not None]
        others = [part for part in parts if part not in encoders]
        unfreeze(text, chosen_weights(others, names, len(self.plan.layers)))
        for part in encoders:
            _unfreeze_all(self.backbone[part])

    def generate(self, prompt: Prompt, **options: Any) -> str:
        """Answer a prompt through the chat template; options as in `stream`.

        With `thinking=True` the thought comes first, as the model writes it;
        `model.conversation.split_thought` parts it from the answer.
        """
        return "".join(self.stream(prompt, **options))

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        system: str | None = None,
        tools: Any = None,
        thinking: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer in pieces.

        Args:
            prompt: what the user says, or a list of messages (role, content, tool_calls, ...).
            images, audio: files, or PIL images and numpy arrays, that the first user turn shows.
            system, tools, thinking: as in `model.tokenizer.prompt_tokens`.
            sampling: max_tokens, temperature, top_p and seed, as in
                `model.generation.stream_tokens`.

        Raises:
            CapabilityError: media, and a model without encoders; or an mlx-vlm that is too old.
            ConfigError: a prompt that asks nothing, a file that cannot be used, or a number out of
                bounds.
            ModelError: the tokenizer has no chat template, or it refuses the prompt.
        """
        GenerateConfig(**{name: sampling[name] for name in sampling if name != "seed"})
        messages = conversation(with_media(prompt, images, audio), system)
        tokens = prompt_tokens(self.tokenizer, messages, tools=tools, thinking=thinking)
        shown, how = media_of(messages), (self.tokenizer, self.end_tokens)
        if self.processor is None:
            if shown:
                raise CapabilityError(
                    f"a prompt with {shown[0][0]}, and a model without encoders",
                    wanted="a checkpoint with encoders, loaded with them",
                    do="load it with g4.load(path, encoders=True)",
                )
            return self.stream_tokens(tokens, **sampling)
        if not self.loaded.verdict.native and self.plan.num_shared:
            raise CapabilityError(
                "the installed mlx-vlm answers wrongly where layers share keys and values",
                wanted="mlx-vlm 0.5 or later",
                do="pip install -U mlx-vlm, or load the model without encoders",
            )
        ids, media = expanded_prompt(tokens, shown, self.tokenizer, self.media)

        def pieces() -> Iterator[str]:
            model = TextOf(self.backbone)
            types = media.pop("mm_token_type_ids", None)
            types = None if types is None else types[:, :-1]
            batch = Batch.of_prompt(ids[None, :-1], mm_token_type_ids=types, **media)
            prefill(self, batch, caches := model.make_cache())
            yield from stream_tokens(model, *how, ids[-1:].tolist(), caches=caches, **sampling)

        return pieces()

    def stream_tokens(self, tokens: Sequence[int], **sampling: Any) -> Iterator[str]:
        """What follows token ids, in pieces, until an end token.

        Args:
            sampling: as in `stream`.

        Raises:
            CapabilityError: the model was loaded with encoders.
        """
        if self.processor is not None:
            raise CapabilityError(
                "the model was loaded with encoders",
                wanted="a text model: answers to tokens come from mlx-lm",
                do="load it without encoders",
            )
        return stream_tokens(self.backbone, self.tokenizer, self.end_tokens, tokens, **sampling)

    def __repr__(self) -> str:
        plan, loaded = self.plan, self.loaded
        nbytes = sum(value.nbytes for value in flat(self.backbone.parameters()).values())
        on_disk = f" + {size(loaded.ple_rows.nbytes)} PLE on disk" if loaded.ple_rows else ""
        layers = str(len(plan.layers))
        if plan.num_shared:
            sources = ", ".join(map(str, sorted(plan.kv_sources)))
            layers += f", the last {plan.num_shared} with K/V of layers {sources}"
        if loaded.dropped:
            layers += f" ({loaded.dropped} dead K/V tensors dropped)"
        lines = [f"Gemma 4 {plan.member} ({plan.model_type}) from {self.name}"]
        lines += [f"  layers:  {layers}", f"  memory:  {size(nbytes)}{on_disk}"]
        if loaded.packings:
            lines.append(f"  quantized: {described(loaded.packings.values())}")
        if loaded.left_out:
            lines.append(f"  encoders: {loaded.left_out} tensors left out (text only)")
        if self.lora:
            lines.append(f"  LoRA:    rank {self.lora.rank} on {', '.join(self.lora.targets)}")
        return "\n".join(lines)


def _unfreeze_all(module: nn.Module) -> None:
    """Let all parameters of a module train that are no buffer in transformers."""
    for part in module.modules():
        part.unfreeze(recurse=False)
        if buffers := [name for name in part if is_frozen_buffer(name)]:
            part.freeze(recurse=False, keys=buffers)


def _require_gradients(module: nn.Module) -> None:
    if any("scales" in part for part in module.modules()):
        wanted = "full precision: quantized weights have no gradient"
        do = "train LoRA, or load the original checkpoint"
        raise ModelError("the model is quantized", wanted=wanted, do=do)
