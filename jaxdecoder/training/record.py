"""The record of one member: metrics.jsonl on the way, a summary at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxdecoder.config import Config
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.training.devices import is_first_host
from jaxdecoder.training.evaluation import bits_per_byte, predicted
from jaxdecoder.training.logging import keep_metrics
from jaxdecoder.training.step import Metrics
from jaxdecoder.typing import Table

Summary = Table
"""The content of summary.json."""


def saves(step: int, config: Config, *, better: bool) -> bool:
    """Return whether a run saves a checkpoint of this step, which was evaluated.

    `better`: than all saved before it. Where better models are saved is a function of the step
    alone, so a resumed run saves at the same steps.
    """
    t = config.train
    if step % t.checkpoint_every == 0 or step == t.steps:
        return True
    every = -(-t.best_every // t.evaluate_every) * t.evaluate_every
    return better and (not every or step % every == 0)


class Record:
    """The metrics.jsonl of one member, and what is known of the member so far.

    `start`: the step that it goes on from; lines past it are dropped. `wrote` is told each line;
    `diverged` is told the first number that is not finite, and may raise it.
    """

    def __init__(
        self,
        config: Config,
        start: int,
        *,
        wrote: Callable[[int, dict[str, float]], None],
        diverged: Callable[[UserError], None],
    ):
        self.config, self.wrote, self.on_divergence = config, wrote, diverged
        self.run = Path(config.train.out)
        self.seconds = 0.0
        """Seconds that earlier processes spent."""
        self.best = math.inf
        """The lowest validation loss that was saved."""
        self.improved = False
        """Whether the last validation loss was the lowest that is saved."""
        self.diverged_at: int | None = None
        self._validated = 0
        self._path = self.run / "metrics.jsonl" if is_first_host() else Path(os.devnull)
        for line in keep_metrics(self.run, start) if is_first_host() else []:
            self.seconds = max(self.seconds, line.get("seconds", 0.0))
            if "validation_loss" in line:
                self._note(line["step"], line["validation_loss"])
            if "diverged" in line:
                self.diverged_at = line["step"]

    def add(self, first: int, metrics: Metrics, **known: float) -> None:
        """Write down the metrics of the steps from `first` on, one number a step each."""
        finite = np.isfinite(metrics.train_loss) & np.isfinite(metrics.gradient_norm)
        t = self.config.train
        rows: list[tuple[int, dict[str, float]]] = []
        for i, step in enumerate(range(first + 1, first + 1 + len(finite))):
            if self.diverged_at is not None or step > t.steps:
                break
            loss, norm = float(metrics.train_loss[i]), float(metrics.gradient_norm[i])
            if not finite[i]:
                self._write(rows)
                self._diverge(step, f"the loss is {loss} and the gradient norm {norm}")
                return
            if step % t.log_every == 0:
                measured = {
                    "train_loss": loss,
                    "learning_rate": float(metrics.learning_rate[i]),
                    "gradient_norm": norm,
                }
                rows.append((step, measured | known))
        self._write(rows)

    def add_validation(self, step: int, loss: float, seconds: float) -> None:
        """Write down a validation loss; after a member's last step there is one more."""
        steps = self.config.train.steps
        if self.diverged_at is not None or self._validated == steps:
            return
        step = min(step, steps)
        if not math.isfinite(loss):
            self._diverge(step, f"the validation loss is {loss}")
            return
        self._note(step, loss)
        self._write([(step, {"validation_loss": loss, "seconds": seconds})])

    def summary(
        self,
        corpus: Corpus,
        parameters: int,
        train_loss: float,
        validation_loss: float,
        *,
        bigram_loss: float,
        seconds: float,
    ) -> Summary:
        """Return what summary.json ends with; losses in nats a token."""
        t, targets = self.config.train, predicted(self.config, corpus.validation)
        return {
            "parameters": parameters,
            "steps": t.steps,
            "tokens": t.steps * t.batch_size * self.config.model.context_length,
            "train_loss": train_loss,
            "validation_loss": validation_loss,
            "bits_per_byte": bits_per_byte(validation_loss, targets, corpus.validation.n_bytes),
            "best_validation_loss": self.best,
            "bigram_loss": bigram_loss,
            "seconds": seconds,
        }

    def _note(self, step: int, loss: float) -> None:
        self._validated = step
        # A loss on the way to a sparser model is not comparable with those after it.
        better = step >= self.config.compression.settles_at and loss < self.best
        self.improved = better and saves(step, self.config, better=True)
        if self.improved:
            self.best = loss

    def _diverge(self, step: int, what: str) -> None:
        self.diverged_at = step
        self.on_divergence(diverged(step, what))
        self._write([(step, {"diverged": True})])

    def _write(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        if not rows:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for step, measured in rows:
                file.write(json.dumps({"step": step, **measured}) + "\n")
        for step, measured in rows:
            self.wrote(step, measured)


def diverged(step: int, what: str) -> UserError:
    """Return what to say, and to try, when a number is no longer finite."""
    return UserError(
        f"step {step}: {what}; training stopped, the last good checkpoint is kept. A lower "
        "optimizer.learning_rate, more warmup_steps or a gradient_clip may help, with another "
        "--train.out"
    )
