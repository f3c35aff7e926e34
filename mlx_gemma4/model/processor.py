"""processor_config.json -> how images become patches. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..storage import read_json
from .plan import Plan

BUDGETS = (70, 140, 280, 560, 1120)
_NAME = "processor_config.json"
_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": False, "resample": 3}
"""What every Gemma 4 has: bicubic resizing, values from 0 to 1, no mean taken off."""


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


def read_image_settings(folder: Path, plan: Plan) -> ImageSettings | None:
    """The settings of a checkpoint folder; None if it has none, or others than Gemma 4 has."""
    try:
        found = dict(read_json(folder / _NAME)["image_processor"])
        sizes = [found[key] for key in ("patch_size", "pooling_kernel_size", "max_soft_tokens")]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = all(isinstance(n, int) and 0 < n <= max(BUDGETS) for n in sizes)
    fixed = all(found.get(key, value) == value for key, value in _FIXED.items())
    if not (whole and fixed and sizes[2] in BUDGETS and "image" in plan.media_tokens):
        return None
    patch, pooling, budget = sizes
    if plan.is_unified:  # its model takes the pixels of a soft token at once
        patch, pooling = patch * pooling, 1
    return ImageSettings(plan.media_tokens["image"], patch, pooling, budget)


def require_images(settings: ImageSettings | None) -> ImageSettings:
    """The settings; a ConfigError if the model has none."""
    if settings is None:
        raise ConfigError(
            "rows with images, and a model without settings for them",
            wanted=f"a model that sees images, with Gemma 4's {_NAME}",
            do="copy the file from the original checkpoint",
        )
    return settings
