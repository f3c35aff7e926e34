"""What one pass of the model reads, and how a step is run: the two values that `forward` takes.

Shapes: B rows, T tokens, L layers, P width of per-layer embeddings, R targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import DataError
from .budgets import Budgets
from .media import Media

if TYPE_CHECKING:
    from ..model.plan import Plan
    from ..model.ple import GatheredRows

_RENAMED = {"targets_BT": "targets_R", "weights_BT": "weights_R", "rows_R": "positions_R"}


@dataclass(frozen=True)
class Batch:
    """What one pass of the model reads.

    Targets are a list: each says which token it is, from which position it is predicted, what it
    weighs, and which sequence it belongs to. A packed row holds several sequences.

    Attributes:
        tokens_BT: token ids.
        targets_R: token ids to predict.
        weights_R: float32 weight of each target; 0 fills up the list.
        sequences_R: the sequence of each target, counted from 0 through the batch.
        positions_R: where each target is predicted, b * T + t of the token before it; None is
            every position in order.
        segments_BT: in packed rows a number for the sequence of each position; None is one
            sequence a row.
        longest: no sequence of a packed row is longer; None is no bound.
        images_BT: image number of each position, -1 for text; None is text only.
        largest_image: no image has more positions; None is no bound.
        ple_BTLP: rows of the table of per-layer embeddings (PLE) for the tokens, or None.
        media: inputs of the encoders, or None.
    """

    tokens_BT: mx.array
    targets_R: mx.array
    weights_R: mx.array
    sequences_R: mx.array
    positions_R: mx.array | None = None
    segments_BT: mx.array | None = None
    longest: int | None = None
    images_BT: mx.array | None = None
    largest_image: int | None = None
    ple_BTLP: mx.array | None = None
    media: Media | None = None

    def __post_init__(self) -> None:
        if isinstance(self.media, dict):
            object.__setattr__(self, "media", Media(**self.media))

    @classmethod
    def from_tokens(
        cls,
        tokens_BT: Any,
        weights_BT: Any = None,
        segments_BT: Any = None,
        *,
        mm_token_type_ids: Any = None,
        **media: Any,
    ) -> Batch:
        """A batch of T - 1 next-token predictions from T tokens a row.

        Args:
            tokens_BT: token ids (B, T).
            weights_BT: (B, T), the weight of every token as a target; default 1. The first
                column has no effect, since nothing stands before it.
            segments_BT: (B, T), a number for the sequence of every token in packed rows. The
                first token of a sequence is never a target.
            mm_token_type_ids: (B, T), 1 for images and 2 for videos: their positions attend to
                each other in members that have it so. Without it they do not, as in transformers.
            media: pixel_values, image_position_ids, input_features and more, as in `Media`.

        Raises:
            DataError: arrays of other shapes.

        >>> from mlx_gemma4 import Batch
        >>> batch = Batch.from_tokens([[2, 7, 8, 9]], [[0, 0, 1, 1]])
        >>> batch.tokens_BT.tolist(), batch.targets_R.tolist(), batch.weights_R.tolist()
        ([[2, 7, 8]], [7, 8, 9], [0.0, 1.0, 1.0])
        """
        tokens = mx.array(tokens_BT)
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise DataError(
                f"tokens of shape {tokens.shape}",
                wanted="(B, T) with T of 2 or more",
                do="stack rows of equal length",
            )
        weights = mx.ones(tokens.shape) if weights_BT is None else mx.array(weights_BT)
        weights = _like_tokens("weights", weights, tokens)[:, 1:].astype(mx.float32)
        B, T = tokens.shape[0], tokens.shape[1] - 1
        starts, segments = mx.broadcast_to(mx.arange(T) == 0, (B, T)), None
        if segments_BT is not None:
            numbers = _like_tokens("segments", mx.array(segments_BT), tokens)
            segments = numbers[:, :-1]
            weights = weights * (segments == numbers[:, 1:])
            starts = mx.concatenate([starts[:, :1], segments[:, 1:] != segments[:, :-1]], axis=1)
        return cls(
            tokens[:, :-1],
            tokens[:, 1:].flatten(),
            weights.flatten(),
            mx.cumsum(starts.flatten().astype(mx.int32)) - 1,
            segments_BT=segments,
            media=Media.of(**media),
            **_images(mm_token_type_ids, tokens, T),
        )

    @classmethod
    def of_prompt(cls, tokens_BT: Any, *, mm_token_type_ids: Any = None, **media: Any) -> Batch:
        """Token ids (B, T) to run through the model, with nothing to predict.

        Media are as in `from_tokens`.
        """
        tokens, none = mx.array(tokens_BT), mx.zeros((0,), mx.int32)
        images = _images(mm_token_type_ids, tokens, tokens.shape[1])
        return cls(tokens, none, mx.zeros((0,)), none, none, media=Media.of(**media), **images)

    def with_ple_rows(self, gemma: Any, gathered: GatheredRows | None = None) -> Batch:
        """The batch with what only the model knows, ready for a compiled step.

        That is the PLE rows of its tokens, where this family member has any, and the places of
        its media.

        Args:
            gemma: a `Gemma4`.
            gathered: the rows, if they have been read already.

        Raises:
            CapabilityError: media, and a model without their encoder.
            DataError: more or fewer media in the rows than there are inputs.
        """
        batch = self
        if self.media is not None:
            media = self.media.placed(gemma.backbone, gemma.plan, self.tokens_BT)
            batch = replace(self, media=media)
        if self.ple_BTLP is not None or gemma.loaded.ple_rows is None:
            return batch
        if gathered is None:
            gathered = gemma.loaded.ple_rows.gather(self.table_tokens(gemma.plan))
        return replace(batch, ple_BTLP=gemma.loaded.ple_rows.unpack(gathered))

    def table_tokens(self, plan: Plan) -> mx.array | np.ndarray:
        """The tokens whose PLE rows are read: media have the row of padding, as in transformers."""
        if self.media is None:
            return self.tokens_BT
        tokens = np.asarray(self.tokens_BT)
        return np.where(np.isin(tokens, list(plan.media_tokens.values())), plan.pad_token, tokens)

    def after(self, done: list[mx.array]) -> Batch:
        """The same batch, whose pass begins when `done` is computed."""
        media = self.media and self.media.after(done)
        return replace(self, tokens_BT=mx.depends(self.tokens_BT, done), media=media)

    def weighing_nothing(self) -> Batch:
        """The same batch without a part in any sum."""
        return replace(self, weights_R=mx.zeros_like(self.weights_R))

    def fields(self) -> dict[str, Any]:
        """What `Batch(**fields)` is made from: arrays, and the numbers that decide shapes."""
        fields = {k: v for k, v in vars(self).items() if v is not None}
        return fields if self.media is None else {**fields, "media": self.media.fields()}

    def per_sequence(self, values_R: mx.array) -> mx.array:
        """Sums of a value of each target over its sequence: (R,), zero past the last sequence.

        Every sequence has a target, so there are at most R of them.
        """
        return mx.zeros(values_R.shape, values_R.dtype).at[self.sequences_R].add(values_R)

    @property
    def num_targets(self) -> mx.array:
        """The sum of all weights: what a loss sum is divided by."""
        return self.weights_R.sum()

    def __getattr__(self, name: str) -> Any:
        hint = f"; it is {_RENAMED[name]} now" if name in _RENAMED else ""
        raise AttributeError(f"Batch has no attribute {name!r}{hint}")


def _like_tokens(what: str, array: mx.array, tokens: mx.array) -> mx.array:
    if array.shape != tokens.shape:
        raise DataError(
            f"{what} of shape {array.shape} for tokens of shape {tokens.shape}",
            wanted="one for every token",
            do=f"pass {what} of the same shape as the tokens",
        )
    return array


def _images(mm_token_type_ids: Any, tokens: mx.array, T: int) -> dict[str, Any]:
    """Image numbers of the first T positions, from transformers' token types.

    Neighbours that are of an image or a video frame belong to the same one.
    """
    if mm_token_type_ids is None:
        return {}
    types = np.array(_like_tokens("mm_token_type_ids", mx.array(mm_token_type_ids), tokens))[:, :T]
    seen = (types == 1) | (types == 2)
    numbers = np.cumsum(np.diff(seen, axis=1, prepend=False) & seen, axis=1) - 1
    if not seen.any():
        return {}
    largest = max(int(np.bincount(row[there]).max(initial=0)) for row, there in zip(numbers, seen))
    return {"images_BT": mx.array(np.where(seen, numbers, -1)), "largest_image": largest}


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed; the values that come out are the same but for `balance`.

    Attributes:
        remat_layers: layers, from the first, of which only the input is kept and which run again
            in the backward pass (gradient checkpointing).
        attention: "auto", "plain" or "blockwise".
        budgets: how much is formed at a time; by default as suits this device.
        fused: head dims at which "auto" leaves causal attention to the library.
        key: where dropout draws from; None is the global random state.
        balance: the coefficient of the routers' load-balancing loss in the step; with a number, 0
            too, its metrics tell what they did.
    """

    remat_layers: int = 0
    attention: str = "auto"
    budgets: Budgets = field(default_factory=Budgets.here)
    fused: frozenset[int] = frozenset()
    key: mx.array | None = None
    balance: float | None = None
