"""The record of one member: metrics.jsonl on the way, a summary at the end."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxdecoder.config import Config
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.training.devices import is_first_host
from jaxdecoder.training.evaluation import bits_per_byte, predicted
from jaxdecoder.training.faults import Fault
from jaxdecoder.training.logging import keep_metrics
from jaxdecoder.training.step import Metrics
from jaxdecoder.typing import Table

Summary = Table
"""The content of summary.json."""

USUAL = 32
"""Logged losses whose median is what a spike is held against."""


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
    `fault` is told the first number that is not finite, and a loss that is so many nats, `spike`,
    above what is usual; it may raise it. What is usual are logged losses, so that a resumed run
    knows them too.
    """

    def __init__(
        self,
        config: Config,
        start: int,
        *,
        wrote: Callable[[int, dict[str, float]], None],
        fault: Callable[[Fault], None],
        spike: float = math.inf,
    ):
        self.config, self.wrote, self.fault, self.spike = config, wrote, fault, spike
        self.run = Path(config.train.out)
        self.seconds = 0.0
        """Seconds that earlier processes spent."""
        self.spent: dict[str, float] = {}
        """Those of each phase."""
        self.best = math.inf
        """The lowest validation loss that was saved."""
        self.improved = False
        """Whether the last validation loss was the lowest that is saved."""
        self.diverged_at: int | None = None
        self._validated = 0
        self._usual: deque[float] = deque(maxlen=USUAL)
        self._path = self.run / "metrics.jsonl" if is_first_host() else Path(os.devnull)
        for line in keep_metrics(self.run, start):
            self.seconds = max(self.seconds, line.get("seconds", 0.0))
            if "train_loss" in line:
                self._usual.append(line["train_loss"])
            ending = "_seconds"
            self.spent |= {k.removesuffix(ending): x for k, x in line.items() if k.endswith(ending)}
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
            if loss > self._bound():
                self._write(rows)
                rows = []
                self.fault(Fault(step, f"the loss is {loss:.4f}, above {self._bound():.4f}"))
            if step % t.log_every == 0:
                measured = {
                    "train_loss": loss,
                    "learning_rate": float(metrics.learning_rate[i]),
                    "gradient_norm": norm,
                }
                rows.append((step, measured | known))
                self._usual.append(loss)
        self._write(rows)

    def add_validation(self, step: int, loss: float, known: dict[str, float]) -> None:
        """Write down a validation loss and what else is known of the run at this step.

        After a member's last step there is one more.
        """
        steps = self.config.train.steps
        if self.diverged_at is not None or self._validated == steps:
            return
        step = min(step, steps)
        if not math.isfinite(loss):
            self._diverge(step, f"the validation loss is {loss}")
            return
        self._note(step, loss)
        self._write([(step, {"validation_loss": loss, **known})])

    def add_note(self, step: int, **note: float) -> None:
        """Write down something else that happened at a step."""
        self._write([(step, note)])

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
            "best_validation_loss": self.best if math.isfinite(self.best) else None,
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

    def _bound(self) -> float:
        """Return the loss above which one is a spike; infinite while nothing is usual yet."""
        if math.isinf(self.spike) or len(self._usual) < USUAL:
            return math.inf
        return statistics.median(self._usual) + self.spike

    def _diverge(self, step: int, what: str) -> None:
        self.diverged_at = step
        self.fault(Fault(step, what))
        self._write([(step, {"diverged": True})])

    def _write(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        if not rows:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for step, measured in rows:
                file.write(json.dumps({"step": step, **measured}) + "\n")
        for step, measured in rows:
            self.wrote(step, measured)
