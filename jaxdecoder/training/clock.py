"""Where a run's time goes, how fast it is, and a watchdog that names what takes too long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import psutil

from jaxdecoder.analysis import flops_per_token
from jaxdecoder.devices import of_kind
from jaxdecoder.training.record import Record
from jaxdecoder.training.step import Metrics

STEP, INPUT, EVALUATION, SAVING = PHASES = ("step", "input", "evaluation", "saving")
"""What the time of a run goes to; what is none of the others is `step`, compiling included."""


class Clock:
    """Time the calls and phases, and read metrics one call late, so that no device is waited for.

    Use it as a context: `watchdog` is told, in words, of a phase that takes longer than so many
    seconds; 0 turns it off.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        watchdog: Callable[[str], None] = lambda text: None,
        patience: float = 0.0,
    ):
        self.records = records
        self.earlier = max(record.seconds for record in records)
        self.started = time.perf_counter() - self.earlier
        self.took = dict.fromkeys(PHASES, 0.0)
        """Seconds of each phase when it was last."""
        self.spent = {name: records[0].spent.get(name, 0.0) for name in PHASES if name != STEP}
        self.pending: tuple[int, Metrics] | None = None
        # Unknown at first: the first call compiles.
        self.last: float | None = None
        card = of_kind(jax.devices()[0].device_kind)
        self.peak = ((card and card.bfloat16_flops) or 0.0) * jax.device_count()
        """FLOPs a second of all devices, if they are known."""
        self.flops_a_token = flops_per_token(records[0].config.model).train["total"]
        self.saved = self.alive = time.perf_counter()
        self.phase = STEP
        self.watchdog, self.patience = watchdog, patience
        self._over = threading.Event()

    def __enter__(self) -> Clock:
        if self.patience:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    @contextlib.contextmanager
    def on(self, phase: str) -> Iterator[None]:
        """Count the block's time as that of a phase."""
        self.phase, start = phase, time.perf_counter()
        self.alive = start
        try:
            yield
        finally:
            self.alive = time.perf_counter()
            self.took[phase] = self.alive - start
            self.spent[phase] += self.took[phase]
            self.phase = STEP
            if phase == SAVING:
                self.saved = self.alive

    def since_saved(self) -> float:
        """Return the seconds since the last checkpoint, or since the start."""
        return time.perf_counter() - self.saved

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a call that started at `step`, and read those before it."""
        self.catch_up()
        self.pending = (step, metrics)

    def catch_up(self) -> None:
        """Write down the metrics that are pending."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        metrics = jax.tree.map(lambda x: np.atleast_2d(np.asarray(x)), metrics)
        now, known = time.perf_counter(), {}
        if self.last is not None and len(self.records) == 1:
            t = self.records[0].config
            tokens = t.train.batch_size * t.model.context_length * metrics.train_loss.shape[1]
            known["tokens_per_second"] = tokens / (now - self.last)
            if self.peak:
                # Of the products of the model alone: what is computed anew does not count
                # (PaLM, arXiv 2204.02311, appendix B).
                reached = known["tokens_per_second"] * self.flops_a_token
                known["model_flop_utilisation"] = reached / self.peak
        self.last = self.alive = now
        for i, record in enumerate(self.records):
            record.add(step, jax.tree.map(lambda x, i=i: x[i], metrics), **known)

    def forget(self) -> None:
        """Drop the metrics that are pending: their steps are taken again."""
        self.pending, self.last = None, None

    def restart(self) -> None:
        """Leave the time since the last call out of the speed."""
        self.last = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds spent on these members, earlier processes included."""
        return time.perf_counter() - self.started

    def told(self) -> dict[str, float]:
        """Return what metrics.jsonl says of time, in seconds, and of memory, in bytes."""
        total = self.seconds()
        spent = {STEP: total - sum(self.spent.values()), **self.spent}
        in_use = memory_in_use()
        return {
            "seconds": total,
            **{f"{name}_seconds": seconds for name, seconds in spent.items()},
            "memory_bytes": in_use,
        }

    def _watch(self) -> None:
        said = self.alive
        while not self._over.wait(min(1.0, self.patience / 4)):
            alive, phase = self.alive, self.phase
            if alive != said and time.perf_counter() - alive > self.patience:
                said = alive
                doing = "taking steps, or compiling them" if phase == STEP else phase
                self.watchdog(f"no sign of life for {self.patience:.0f} s: {doing}")


def memory_in_use() -> int:
    """Return the bytes in use: the most of any device so far, or those of a CPU's process now."""
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    return int(max(peaks)) if peaks else int(psutil.Process().memory_info().rss)
