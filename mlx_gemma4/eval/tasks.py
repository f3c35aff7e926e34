"""Tasks of lm-evaluation-harness, answered by a `Gemma4` as it is: quantized, with its adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..data.example import Example
from ..errors import ConfigError
from ..extras import import_extra
from ..gemma import Gemma4
from ..model.conversation import split_thought
from .scores import example_sums

Results = dict[str, dict[str, tuple[float, float | None]]]
"""{task: {metric: (value, standard error)}}."""

_MAX_TOKENS = 256


def require_tasks(names: Sequence[str]) -> None:
    """Say early what stands in the way of tasks.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
    """
    manager = _manager(names)
    wrong = [name for name in names if not (_is_file(name) or manager.match_tasks([name]))]
    if wrong:
        wanted = "a name that `lm-eval ls tasks` lists, or a task's .yaml file"
        raise ConfigError(f"there is no task {wrong[0]}", wanted=wanted, do="change --tasks")


def _is_file(name: str) -> bool:
    return name.endswith(".yaml")


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's list of tasks; reading all of its own takes seconds, files of yours need none."""
    return _managers(not all(map(_is_file, names)))


@cache
def _managers(include_defaults: bool) -> Any:
    manager = import_extra("lm_eval.tasks", "eval").TaskManager
    return manager(include_defaults=include_defaults)


def run_tasks(
    gemma: Gemma4, names: Sequence[str], *, limit: int | None = None, batch_size: int = 1
) -> Results:
    """What the model gets in tasks; prompts go through its chat template, if it has one.

    Args:
        names: of lm-eval's tasks and groups, or .yaml files of your own.
        limit: only so many questions of each.

    Raises:
        ConfigError: lm-eval is not installed, or a task that cannot be read.
    """
    harness = import_extra("lm_eval", "eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        found = harness.simple_evaluate(
            model=_language_model(gemma, batch_size),
            tasks=list(names),
            task_manager=_manager(names),
            limit=limit,
            apply_chat_template=bool(gemma.tokenizer.chat_template),
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (KeyError, ValueError, OSError) as error:
        told = f"the tasks {', '.join(names)} cannot run: {error}"
        raise ConfigError(told, wanted="tasks of lm-eval", do="change --tasks") from None
    return {task: dict(_metrics(values)) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float | None]]]:
    """lm-eval's keys are "metric,filter" and "metric_stderr,filter"."""
    for key, value in values.items():
        metric, _, of_filter = key.partition(",")
        if of_filter and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{of_filter}")
            name = metric if of_filter == "none" else key
            yield name, (float(value), error if isinstance(error, float) else None)


def _language_model(gemma: Gemma4, batch_size: int) -> Any:
    base: Any = import_extra("lm_eval.api.model", "eval").TemplateLM

    class Gemma4LM(base):
        """lm-eval's three questions: what a continuation, a text and an answer are."""

        tokenizer = gemma.tokenizer
        tokenizer_name = gemma.name
        eot_token_id = gemma.tokenizer.eos_token_id
        prefix_token_id = gemma.tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            if add_special_tokens is None:  # a chat template writes <bos> itself
                add_special_tokens = not string.startswith(gemma.tokenizer.bos_token)
            ids: list[int] = gemma.tokenizer.encode(string, add_special_tokens=add_special_tokens)
            return ids

        def apply_chat_template(
            self, chat_history: list[Any], add_generation_prompt: bool = True
        ) -> str:
            text: str = gemma.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                enable_thinking=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return _score(gemma, pairs, batch_size)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            texts = [self.tok_encode(r.args[0], add_special_tokens=False) for r in requests]
            pairs = [([self.prefix_token_id], text) for text in texts]
            return [log_prob for log_prob, _ in _score(gemma, pairs, batch_size)]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            asked = [request.args for request in requests]
            return [_answer(gemma, self.tok_encode(prompt), how) for prompt, how in asked]

    return Gemma4LM()


def _score(
    gemma: Gemma4, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """(log p, whether each token is the likeliest) of continuations of contexts, as token ids."""
    examples = [
        Example(np.array(context + then), np.arange(len(context + then)) >= len(context), "a task")
        for context, then in pairs
    ]
    losses, right, counts = example_sums(gemma, examples, batch_size)
    return [(-loss, bool(top == n)) for loss, top, n in zip(losses.tolist(), right, counts)]


def _answer(gemma: Gemma4, tokens: list[int], how: dict[str, Any]) -> str:
    """The answer without its thought, up to the first of the texts that end it."""
    until = how.get("until") or []
    ends = [until] if isinstance(until, str) else until
    options = {"max_tokens": how.get("max_gen_toks", _MAX_TOKENS)}
    if how.get("do_sample"):
        options["temperature"] = float(how.get("temperature", 1.0))
    text = ""
    for piece in gemma.stream_tokens(tokens, **options):
        text += piece
        if any(end in _said(text) for end in ends):
            break
    said = _said(text)
    return said[: min([said.find(end) for end in ends if end in said], default=len(said))]


def _said(text: str) -> str:
    return split_thought(text)[1] if "<|channel>" in text else text
