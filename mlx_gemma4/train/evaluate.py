"""The mean of an objective over examples that are not trained on; answers to sample prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from ..config import DataConfig, TrainConfig
from ..data.batch.order import BatchOrder
from ..data.example import Example
from ..errors import ConfigError
from ..gemma import Gemma4
from ..model.conversation import Prompt, conversation
from ..nn.batch import StepOptions
from ..nn.head import batch_log_probs
from ..objectives import Objective
from ..objectives.sft import sft
from ..storage import parse_json
from .parallel import Ranks
from .prefetch import prepared
from .soft_tokens import SoftTokens

_SAMPLE_TOKENS = 128


def evaluate(
    gemma: Gemma4,
    examples: Sequence[Example],
    data: DataConfig = DataConfig(),
    config: TrainConfig = TrainConfig(),
    objective: Objective = sft,
    stopped: Callable[[], bool] = lambda: False,
    ranks: Ranks = Ranks(),
    soft: SoftTokens | None = None,
) -> float | None:
    """The objective's loss over its count: with `sft`, nats per target token.

    Args:
        examples: all are read, or those of the first `val_batches` batches.
        data: gives the length of packed rows.
        config: gives the batch size, and whether rows are packed.
        stopped: asked before every batch; the loss is None once it says so, on any rank.
        ranks: among which the batches are dealt.
        soft: gives soft tokens of media, instead of the encoders.
    """
    gemma.backbone.eval()
    order = BatchOrder.of(examples, data.max_seq_length, config.batch_size, config.packing)
    dealt = order.in_file_order()[: config.val_batches][ranks.rank :: ranks.size]
    batches = ((None, [rows]) for rows in dealt)
    options = StepOptions(attention=config.attention)
    loss, count = mx.zeros(()), mx.zeros(())
    for _, (batch,) in prepared(gemma, examples, batches, soft=soft):
        if stopped():
            break
        sums = objective(batch_log_probs(gemma, batch, options, gradient=False), batch)
        # The graph of a batch is built while the one before it is computed.
        mx.eval(loss, count)
        loss, count = loss + sums.loss, count + sums.count
        mx.async_eval(loss, count)
    if any(ranks.any(stopped())):
        return None
    loss, count = ranks.total([loss, count])
    return float(loss) / float(count)


def read_prompts(path: str) -> list[Prompt]:
    """The sample prompts of a file: a line each, in a .jsonl file rows with prompt or messages.

    Raises:
        ConfigError: it cannot be read, or a line asks nothing.
    """
    do = "change the file, or sample_prompts"
    try:
        lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
        rows = [parse_json(line.encode()) for line in lines] if path.endswith(".jsonl") else lines
        prompts = [r if isinstance(r, str) else r.get("messages") or r["prompt"] for r in rows]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        found = f"{path} cannot be read: {error!r}"
        raise ConfigError(found, wanted="prompts, a line each", do=do) from None
    for prompt in prompts:
        conversation(prompt)
    return prompts


def answers(
    gemma: Gemma4, prompts: Sequence[Prompt], max_tokens: int = _SAMPLE_TOKENS
) -> list[dict[str, str]]:
    """The likeliest answer to each prompt, with the prompt's last words."""
    turns = [conversation(prompt)[-1]["content"] for prompt in prompts]
    last = [t if isinstance(t, str) else "".join(p.get("text", "") for p in t) for t in turns]
    said = [gemma.generate(prompt, max_tokens=max_tokens) for prompt in prompts]
    return [{"prompt": asked, "answer": answer} for asked, answer in zip(last, said)]
