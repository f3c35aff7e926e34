"""Loss and accuracy per target token, by example, so that two models can be compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..data.batch.order import BatchOrder
from ..data.example import Example
from ..errors import DataError
from ..gemma import Gemma4
from ..nn.head import batch_scores
from ..train.prefetch import prepared
from .answers import Answer, Judge, answer, exact_match

_RESAMPLES = 2000


@dataclass(frozen=True)
class Measure:
    """A mean over examples: what each adds to the sum, and to the count (N,)."""

    sums_N: np.ndarray
    counts_N: np.ndarray

    @property
    def mean(self) -> float:
        """The sum over the count."""
        return float(self.sums_N.sum() / self.counts_N.sum())

    def minus(self, other: Measure, seed: int = 0) -> tuple[float, float, float]:
        """(difference of the means, low, high): with its 95% interval.

        Examples are drawn again and again with replacement, the same for both: the paired
        percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

        >>> ones = np.ones(50)
        >>> Measure(ones * 3, ones).minus(Measure(ones, ones))
        (2.0, 2.0, 2.0)
        """
        random, N = np.random.default_rng(seed), len(self.sums_N)
        drawn = []
        for _ in range(_RESAMPLES):
            times_N = np.bincount(random.integers(0, N, N), minlength=N)
            ours, theirs = (
                times_N @ measure.sums_N / (times_N @ measure.counts_N) for measure in (self, other)
            )
            drawn.append(ours - theirs)
        low, high = np.percentile(drawn, [2.5, 97.5])
        return self.mean - other.mean, float(low), float(high)


@dataclass(frozen=True)
class Evaluation:
    """What came of a model on examples.

    Attributes:
        measures: `loss` (nats per target token) and `accuracy` (share of target tokens that are
            the likeliest), and the judge's name if answers were judged.
        answers: those that were judged.
    """

    measures: Mapping[str, Measure]
    answers: Sequence[Answer] = field(default=(), repr=False)

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.measures["loss"].mean

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        """The share of target tokens that are the likeliest token in their place."""
        return self.measures["accuracy"].mean

    def figures(self) -> dict[str, float]:
        """All of them by name."""
        means = {name: measure.mean for name, measure in self.measures.items()}
        return {"loss": means.pop("loss"), "perplexity": self.perplexity, **means}

    def against(self, other: Evaluation) -> dict[str, tuple[float, float, float]]:
        """(difference, low, high) to another model on the same examples, by measure.

        The interval is a paired bootstrap's, over examples, at 95%.

        Raises:
            DataError: the other was evaluated on other examples, or by another judge.
        """
        if any(
            name not in other.measures
            or not np.array_equal(measure.counts_N, other.measures[name].counts_N)
            for name, measure in self.measures.items()
        ):
            found = "the other evaluation has other examples, or no such answers"
            do = "evaluate both on the same examples, with the same judge"
            raise DataError(found, wanted="the same", do=do)
        return {name: m.minus(other.measures[name]) for name, m in self.measures.items()}

    @property
    def counted(self) -> str:
        """How much it was evaluated on, for people."""
        counts_N = self.measures["loss"].counts_N
        return f"{int(counts_N.sum()):,} target tokens of {len(counts_N):,} examples"

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.figures().items())
        return f"{told}: {self.counted}"


def evaluate(
    gemma: Gemma4,
    examples: Sequence[Example],
    *,
    batch_size: int = 1,
    max_seq_length: int = 2048,
    answers: int = 0,
    judge: Judge = exact_match,
    max_tokens: int = 256,
) -> Evaluation:
    """Loss, perplexity and accuracy per target token on examples; judged answers to some of them.

    Args:
        gemma: with its adapter, if it has one.
        examples: `data.test`, `data.valid` or any other of a `Dataset`.
        batch_size: packed rows in a batch; `max_seq_length` is the length of a row.
        answers: how many of the examples, from the first, are answered, up to `max_tokens` tokens.
        judge: judge(prompt, answer, reference) gives a number: by default 1.0 where an answer is
            the reference to the letter.

    Raises:
        DataError: no examples, or none with a prompt to answer.

    >>> import mlx_gemma4 as g4
    >>> gemma = g4.load(tiny)
    >>> result = g4.evaluate(gemma, g4.read(rows, gemma).valid)
    >>> round(float(np.log(result.perplexity)), 5) == round(result.loss, 5)
    True
    """
    if not examples:
        raise DataError("there are no examples to evaluate on", wanted="some", do="name another")
    losses_N, right_N, counts_N = example_sums(gemma, examples, batch_size, max_seq_length)
    measures = {"loss": Measure(losses_N, counts_N), "accuracy": Measure(right_N, counts_N)}
    said = answer(gemma, examples[:answers], judge, max_tokens) if answers else []
    if said:
        scores_N = np.array([one.score for one in said])
        measures[judge.__name__] = Measure(scores_N, np.ones(len(said)))
    return Evaluation(measures, said)


def example_sums(
    gemma: Gemma4, examples: Sequence[Example], batch_size: int = 1, max_seq_length: int = 2048
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss, likeliest tokens, target tokens) of each example: sums (N,) over its targets."""
    gemma.backbone.eval()
    order = BatchOrder.of(examples, max_seq_length, batch_size)
    sums_3N = np.zeros((3, len(examples)))
    steps = (([i for row in rows for i in row], [rows]) for rows in order.in_file_order())
    for indices, (batch,) in prepared(gemma, examples, steps):
        log_probs_R, is_top_R = batch_scores(gemma, batch)
        weights_R = batch.weights_R
        values = (-weights_R * log_probs_R, weights_R * is_top_R, weights_R)
        sums = mx.stack([batch.per_sequence(values_R) for values_R in values])
        sums_3N[:, indices] = np.array(sums)[:, : len(indices)]
    losses_N, right_N, counts_N = sums_3N
    return losses_N, right_N, counts_N
