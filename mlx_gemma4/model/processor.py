"""processor_config.json -> how images and audio become what encoders take. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..errors import ConfigError
from ..storage import read_json
from .plan import Plan

BUDGETS = (70, 140, 280, 560, 1120)
_NAME = "processor_config.json"
_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": False, "resample": 3}
"""What every Gemma 4 has: bicubic resizing, values from 0 to 1, no mean taken off."""


_SOUND = {
    "sampling_rate": 16_000, "frame_length": 320, "hop_length": 160, "fft_length": 512,
    "feature_size": 128, "min_frequency": 0.0, "max_frequency": 8000.0, "mel_floor": 1e-3,
    "preemphasis": 0.0, "dither": 0.0, "input_scale_factor": 1.0,
    "per_bin_mean": None, "per_bin_stddev": None,
}  # fmt: skip
"""How every Gemma 4 but the unified one makes mel features."""


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes patches and soft tokens.

    Attributes:
        token: the id of the token that stands for a soft token in the text.
        patch: side of a patch in pixels.
        pooling: patches become one soft token in squares of this side.
        budget: the most soft tokens of an image.
    """

    token: int
    patch: int
    pooling: int
    budget: int

    @property
    def side(self) -> int:
        """Pixels that become one soft token, along a side."""
        return self.patch * self.pooling

    @property
    def inputs(self) -> tuple[int, int]:
        """Patches that become one soft token, and values of a patch."""
        return self.pooling**2, 3 * self.patch**2

    def with_budget(self, budget: str | None) -> ImageSettings:
        """The same with another budget, if one is given."""
        return self if budget is None else replace(self, budget=int(budget))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of soft tokens of an image of so many pixels.

        The largest of about the image's shape within the budget, and at least one of each.

        >>> ImageSettings(111, 16, 3, 280).grid(1024, 768)
        (19, 14)
        """
        factor = math.sqrt(self.budget * self.side**2 / (height * width))
        columns, rows = (math.floor(factor * n / self.side) for n in (width, height))
        if not rows:
            return min(math.floor(width / height), self.budget), 1
        if not columns:
            return 1, min(math.floor(height / width), self.budget)
        return columns, rows


@dataclass(frozen=True)
class AudioSettings:
    """How audio becomes frames and soft tokens.

    Attributes:
        token: the id of the token that stands for a soft token in the text.
        samples: samples of one frame where the model takes them as they are, each frame a soft
            token; None is frames of 128 mel bins, four a soft token.
    """

    token: int
    samples: int | None = None

    @property
    def inputs(self) -> tuple[int, int]:
        """Frames that become one soft token, and values of a frame."""
        return (4, 128) if self.samples is None else (1, self.samples)


@dataclass(frozen=True)
class MediaSettings:
    """How a model takes each kind of media; None for what it does not take."""

    image: ImageSettings | None = None
    audio: AudioSettings | None = None

    def with_budget(self, budget: str | None) -> MediaSettings:
        """The same with another budget of images, if one is given."""
        return replace(self, image=self.image and self.image.with_budget(budget))

    def of(self, kind: str) -> Any:
        """The settings of a kind.

        Raises:
            ConfigError: the model has none.
        """
        settings = getattr(self, kind)
        if settings is None:
            verb = {"image": "sees images", "audio": "hears"}[kind]
            raise ConfigError(
                f"{kind} to read, and a model without settings for it",
                wanted=f"a model that {verb}, with Gemma 4's {_NAME}",
                do="copy the file from the original checkpoint, or take a member that does",
            )
        return settings


NO_MEDIA = MediaSettings()


def read_media_settings(folder: Path, plan: Plan) -> MediaSettings:
    """The settings of a checkpoint folder; of a kind None if it has others than Gemma 4 has."""
    try:
        found = dict(read_json(folder / _NAME))
    except (OSError, ValueError, TypeError):
        return NO_MEDIA
    images, sounds = (found.get(name) for name in ("image_processor", "feature_extractor"))
    return MediaSettings(
        _image_settings(images, plan) if isinstance(images, dict) else None,
        _audio_settings(sounds, plan) if isinstance(sounds, dict) else None,
    )


def _image_settings(found: dict[str, Any], plan: Plan) -> ImageSettings | None:
    sizes = [found.get(key) for key in ("patch_size", "pooling_kernel_size", "max_soft_tokens")]
    whole = all(isinstance(n, int) and 0 < n <= max(BUDGETS) for n in sizes)
    fixed = all(found.get(key, value) == value for key, value in _FIXED.items())
    if not (whole and fixed and sizes[2] in BUDGETS and "image" in plan.media_tokens):
        return None
    patch, pooling, budget = cast(list[int], sizes)
    if plan.is_unified:  # its model takes the pixels of a soft token at once
        patch, pooling = patch * pooling, 1
    return ImageSettings(plan.media_tokens["image"], patch, pooling, budget)


def _audio_settings(found: dict[str, Any], plan: Plan) -> AudioSettings | None:
    token, samples = plan.media_tokens.get("audio"), None
    fixed = _SOUND
    if plan.is_unified:
        samples, fixed = found.get("audio_samples_per_token"), {"sampling_rate": 16_000}
        if not isinstance(samples, int) or not 0 < samples <= 16_000:
            return None
    if token is None or any(found.get(key, value) != value for key, value in fixed.items()):
        return None
    return AudioSettings(token, samples)
