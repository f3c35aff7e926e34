"""The training loop; `finetune` puts one together from settings."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..config import TrainConfig
from ..errors import TrainingError, listing
from ..gemma import Gemma4
from ..nn.batch import StepOptions
from ..objectives import Objective, Sums
from ..objectives.sft import sft
from ..storage import write_json
from .checkpoint import Checkpoints, writing
from .guards import LossWatch, first_not_finite
from .parallel import Ranks
from .prefetch import Progress, Step
from .run import Callback, Run
from .step import CompiledStep

_MOST_SKIPPED = 10
"""Steps in a row that are not finite before a run that passes over them stops all the same."""


class Trainer:
    """A training loop: fetch, step, evaluate, report, save, stop.

    Everything that it does comes from outside, so that the batches may be those of files or made
    by the model itself, and the objective any function of their log-probabilities.

    Args:
        gemma: trained in place; LoRA layers or unfrozen weights say what trains.
        steps: an iterable of `Step`, each with the batches of one optimizer step.
        optimizer: from `make_optimizer`, or any of mlx.optimizers, initialised.
        objective: of the log-probabilities of a batch's targets.
        callbacks: told of everything, in this order.
        validate: gives the validation loss; None where there is nothing to validate on.
        sample: gives answers to sample prompts, at every evaluation.
        checkpoints: where to save; None keeps the run in memory.
        options: how a step is computed.
        config: gives seed, max_grad_norm, and how often to report, evaluate and save.
        run: what is told to callbacks, and returned.
        ranks: the processes that train together; callbacks and checkpoints are rank 0's.
    """

    def __init__(
        self,
        gemma: Gemma4,
        steps: Iterable[Step],
        optimizer: optim.Optimizer,
        objective: Objective = sft,
        *,
        callbacks: Sequence[Callback] = (),
        validate: Callable[[], float | None] | None = None,
        sample: Callable[[], Any] | None = None,
        checkpoints: Checkpoints | None = None,
        options: StepOptions = StepOptions(),
        config: TrainConfig = TrainConfig(),
        run: Run | None = None,
        ranks: Ranks = Ranks(),
    ):
        self.gemma, self.steps, self.optimizer = gemma, steps, optimizer
        self.callbacks, self.validate, self.checkpoints = callbacks, validate, checkpoints
        self.config, self.run, self.sample = config, run or Run(gemma), sample
        self.objective, self.options, self.ranks = objective, options, ranks
        self.step = CompiledStep(gemma, optimizer, objective, options, config.max_grad_norm, ranks)
        self._meter = _Meter()
        self._watch = LossWatch(gemma, config.warmup_steps)
        self._notes: list[str] = []
        self._skipped = 0
        mx.reset_peak_memory()

    def train(self, total: int) -> Run:
        """Take the steps, up to number `total`.

        Raises:
            TrainingError: a loss that is not finite.
        """
        run, config = self.run, self.config
        for callback in self.callbacks:
            callback.start(run, run.step, total)
        # perf_counter stands still while a machine sleeps, on macOS and Linux.
        until = time.perf_counter() + 60 * (config.max_minutes or math.inf)
        try:
            if not run.step:
                self._report(self.validate() if self.validate else None, evaluated=True)
            self._meter.resume()
            for step in () if self._is_stuck() else self.steps:
                self._take(step)
                if time.perf_counter() > until:
                    run.stop(f"max_minutes, {config.max_minutes:g}, are over")
                stopped, interrupted = self._agree()
                last = run.step == total or stopped
                evaluated = last or run.step % config.eval_every == 0
                validate = self.validate if evaluated and not interrupted else None
                val_loss = validate() if validate else None
                if evaluated or run.step % config.report_every == 0:
                    self._report(val_loss, evaluated)
                if val_loss is not None:
                    last = self._is_stuck() or last
                self._save(step.progress, val_loss, last)
                if last:
                    break
                self._meter.resume()
        finally:
            self.gemma.backbone.eval()
            for callback in self.callbacks:
                callback.end()
        return run

    def _take(self, step: Step) -> None:
        """One optimizer step."""
        if not self.gemma.backbone.training:
            self.gemma.backbone.train()
        number = step.progress.step
        drawn = [self.config.seed, number, *[self.ranks.rank] * (self.ranks.rank > 0)]
        random = np.random.SeedSequence(drawn).generate_state(1)[0]
        key = mx.random.key(int(random))
        sums, norm = self.step(step.batches, key)
        # One step at a time on the device: the next one's memory would add to this one's.
        mx.eval(vars(sums), norm, self.gemma.backbone.trainable_parameters(), self.optimizer.state)
        loss = float(sums.loss) / (float(sums.count) or math.nan)
        if math.isfinite(loss) and math.isfinite(float(norm)):
            self._skipped = 0
            self._meter.add(sums, norm, step.num_tokens)
            self._notes += self._watch.look(number, loss, lambda: origins(step))
        else:
            self._refuse(step, key, loss, float(norm))
        self.run.step = number
        for callback in self.callbacks:
            callback.advance(number, loss)

    def _refuse(self, step: Step, key: mx.array, loss: float, norm: float) -> None:
        """Report a step that is not finite, which changed no weight; raise where that is asked."""
        number, where = step.progress.step, origins(step)
        options = replace(self.options, key=key)
        module = first_not_finite(self.gemma, step.batches, self.objective, options)
        told = f"the loss of step {number} is {loss}, its gradient's norm {norm}, first in {module}"
        report = {
            "step": number, "loss": str(loss), "grad_norm": str(norm), "first_in": module,
            "examples": where,
        }  # fmt: skip
        if output := self.run.output:
            path = output / f"nonfinite-{number:06d}.json"
            with writing(path):
                write_json(path, report)
            told += f"; report: {path}"
        self._skipped += 1
        self._notes.append(f"skipped: {told}")
        if self.config.on_nonfinite == "skip" and self._skipped < _MOST_SKIPPED:
            return
        newest = self.checkpoints.newest() if self.checkpoints else None
        raise TrainingError(
            told + f"; {newest} is kept" * bool(newest) + "; examples:" + listing(where),
            wanted="a finite loss and gradient"
            + f"; {self._skipped} steps in a row had none" * (self._skipped > 1),
            do="look at these examples, lower the learning rate, or pass over such steps with "
            "on_nonfinite skip" + (", and resume" if newest else ""),
        )

    def _agree(self) -> tuple[bool, bool]:
        """(whether the run stops, and is interrupted): all ranks do where one does."""
        stopped, interrupted = self.ranks.any(self.run.stopped is not None, self.run.interrupted)
        self.run.interrupted |= interrupted
        if stopped:
            self.run.stop("another rank stopped")
        return stopped, interrupted

    def _is_stuck(self) -> bool:
        """Stop where the last `patience` regular evaluations brought no lower validation loss."""
        losses = [
            m["val_loss"]
            for m in self.run.history
            if m["val_loss"] is not None and m["step"] % self.config.eval_every == 0
        ]
        patience = self.config.patience or math.inf
        stuck = bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience
        if stuck:
            self.run.stop(f"no lower validation loss in {patience} evaluations")
        return self.ranks.any(stuck)[0]

    def _report(self, val_loss: float | None, evaluated: bool) -> None:
        rate = float(self.optimizer.learning_rate)
        metrics = {"step": self.run.step, **self._meter.line(val_loss, rate)}
        if self._notes:
            metrics["notes"] = self._notes
        if self.sample and evaluated and not self.run.interrupted:
            metrics["samples"] = self.sample()
        self._meter, self._notes = _Meter(), []
        self.run.history.append(metrics)
        for callback in self.callbacks:
            callback.report(metrics)

    def _save(self, progress: Progress, val_loss: float | None, last: bool) -> None:
        """Save where that is due: every so many steps, the best so far, and the last."""
        if self.checkpoints is None:
            return
        best = val_loss is not None and self.checkpoints.is_best(val_loss)
        if last or best or progress.step % self.config.save_every == 0:
            saved = self.checkpoints.save(self.gemma, self.optimizer, progress, val_loss)
            for callback in self.callbacks:
                callback.saved(saved)


def origins(step: Step) -> list[str]:
    """File and line of the examples of a step."""
    return [example.origin for example in step.examples]


class _Meter:
    """Sums since the last report; tokens are those of the examples, without padding.

    Seconds are those of training alone: from `resume`, before a step is fetched, to its `add`.
    """

    def __init__(self) -> None:
        self._loss, self._count, self._tokens = 0.0, 0.0, 0
        self._norm: float | None = None
        self._metrics: defaultdict[str, Any] = defaultdict(float)
        self._since, self._seconds = 0.0, 0.0

    def resume(self) -> None:
        self._since = time.perf_counter()

    def add(self, sums: Sums, norm: mx.array, tokens: int) -> None:
        self._loss += float(sums.loss)
        self._count += float(sums.count)
        self._tokens += tokens
        self._seconds += time.perf_counter() - self._since
        self._norm = float(norm)
        for name, value in sums.metrics.items():
            self._metrics[name] += np.array(value, np.float64)

    def line(self, val_loss: float | None, learning_rate: float) -> dict[str, Any]:
        """Of metrics.jsonl; `grad_norm` is the last step's, before clipping."""
        return {
            "loss": self._loss / self._count if self._count else None,
            "val_loss": val_loss,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / self._seconds if self._tokens else 0.0,
            "learning_rate": learning_rate,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "grad_norm": self._norm,
        } | {name: _plain(value / self._count) for name, value in self._metrics.items()}


def _plain(value: Any) -> Any:
    """For JSON: a number, or lists of them to six places."""
    return float(value) if np.ndim(value) == 0 else value.round(6).tolist()
