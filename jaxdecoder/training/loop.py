"""The training loop: the one place where steps are taken.

A loop trains members side by side in one program. A run is its own only member (`single.py`); an
ablation has many (`ablation/population.py`). How members lie on devices is a `Placement`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager

from jaxdecoder.config import Config
from jaxdecoder.data.batches import SplitName
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import packing
from jaxdecoder.training import checkpoints, runs
from jaxdecoder.training.devices import is_first_host
from jaxdecoder.training.evaluation import bigram_loss
from jaxdecoder.training.record import Record, Summary, saves
from jaxdecoder.training.step import Metrics, State
from jaxdecoder.typing import Params


@runtime_checkable
class Placement(Protocol):
    """Members on devices: where their arrays live, and what is compiled for them."""

    @property
    def like(self) -> State:
        """Shapes and shardings of the state of all members."""

    @property
    def steps_per_call(self) -> int:
        """The most steps that one call takes."""

    def start(self, params: Params | None) -> State:
        """Return the state at step 0: of these weights, or fresh ones."""

    def advance(self, state: State, step: int, count: int) -> tuple[State, Metrics]:
        """Take `count` steps from `step` on; metrics are (members, steps), or (steps,) of one."""

    def losses(self, state: State, split: SplitName, count: int | None) -> Sequence[float]:
        """Return each member's mean loss over `count` fixed batches of a split, or over all."""

    def members(self, state: State) -> Iterable[State]:
        """Return the state of each member by itself."""


@dataclass(frozen=True)
class Watch:
    """What a caller is told while members train."""

    began: Callable[[int, int], None] = lambda step, parameters: None
    """(step that it goes on from, parameters of a member)"""
    wrote: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    """(step, metrics), as in metrics.jsonl"""
    passed: Callable[[int, State], None] = lambda step, state: None
    """(step, state) after each call"""
    diverged: Callable[[UserError], None] = lambda error: None
    """A member whose loss is no longer finite. It stands; the others go on, unless this raises."""


def train_together(
    members: Sequence[Config],
    corpus: Corpus,
    placement: Placement,
    folder: Path,
    *,
    watch: Watch = Watch(),
    beside: int = 1,
) -> tuple[State, list[Summary]]:
    """Train members to their ends, from where they stopped if they have begun.

    Each leaves the run folder that its complete config names. `folder` is where the checkpoints on
    the way are: a run's own folder, or one for all members. A member's seconds are its share of
    theirs, and of the machine's where `beside` processes train at a time.

    Returns:
        The state of all members after the last step, and their summaries.

    Raises:
        UserError: if the disk is full, or what `watch.diverged` raises.
    """
    longest = max(members, key=lambda config: config.train.steps)
    own = folder == Path(members[0].train.out)
    with checkpoints.full_disk_explained(folder):
        for config in members:
            runs.begin(config, corpus)
        keep = longest.train.keep if own else 1
        with checkpoints.open_checkpoints(folder, keep=keep) as manager:
            step, state = _first_state(longest, placement, manager)
            records = [
                Record(config, step, wrote=watch.wrote, diverged=watch.diverged)
                for config in members
            ]
            if own:
                # A checkpoint may be gone that the metrics tell of.
                settles_at = longest.compression.settles_at
                records[0].best = checkpoints.best_loss(folder / "checkpoints", settles_at)
            like = placement.like
            every = packing.size(like.params, nonzero=False).parameters
            # Of one member: each has a step of its own.
            parameters = every // math.prod(like.step.shape)
            watch.began(step, parameters)
            clock = Clock(records)

            def save(step: int, state: State, losses: Sequence[float]) -> None:
                if saves(step, longest, better=own and records[0].improved):
                    # Which member is best is not asked in the middle of a population.
                    checkpoints.save(manager, step, state, losses[0] if own else 0.0)

            state = take_steps(step, state, longest, placement, clock, save, watch)
            if own and not longest.train.steps and manager.latest_step() is None:
                # A run of no steps is a model too.
                losses = placement.losses(state, "validation", longest.train.evaluation_batches)
                checkpoints.save(manager, 0, state, losses[0])
        train = placement.losses(state, "train", longest.train.evaluation_batches)
        validation = placement.losses(state, "validation", None)
        splits = corpus.train.tokens, corpus.validation.tokens
        floor = bigram_loss(*splits, corpus.tokenizer.vocab_size)
        seconds = clock.seconds() / len(members) / beside
        summaries = [
            record.summary(corpus, parameters, *losses, bigram_loss=floor, seconds=seconds)
            for record, *losses in zip(records, train, validation, strict=True)
        ]
        if not own:
            summaries = _leave(records, placement.members(state), summaries)
        if is_first_host():
            # All at the end: a member with a summary is finished, and members finish together.
            for record, summary in zip(records, summaries, strict=True):
                runs.write_summary(record.run, summary)
    return state, summaries


def take_steps(
    step: int,
    state: State,
    config: Config,
    placement: Placement,
    clock: Clock,
    save: Callable[[int, State, Sequence[float]], None],
    watch: Watch,
) -> State:
    """Take all steps from `step` on; record, evaluate and save on the way; return the last state.

    All training of the project goes through this loop. `config` is that of the member with the most
    steps; `save` is told every validation loss.
    """
    t = config.train
    while step < t.steps:
        end = boundary(step, config, placement.steps_per_call)
        state, metrics = placement.advance(state, step, end - step)
        clock.add(step, metrics)
        step = end
        due = step % t.evaluate_every == 0 or step % t.checkpoint_every == 0
        if due or step == t.steps:
            clock.catch_up()
            losses = placement.losses(state, "validation", t.evaluation_batches)
            for record, loss in zip(clock.records, losses, strict=True):
                record.add_validation(step, loss, clock.seconds())
            save(step, state, losses)
        watch.passed(step, state)
        if due:
            clock.restart()
    clock.catch_up()
    return state


def steps_a_call(config: Config, most: int) -> int:
    """Return how many steps a compiled call takes: `most`, or somewhat fewer.

    Fewer where all calls are then equally long, for each length is a program to compile.
    """
    t = config.train
    every = (t.steps, t.evaluate_every, t.checkpoint_every, t.sample_every)
    between = math.gcd(*(n for n in every if 0 < n <= t.steps))
    return max((n for n in range(-(-most // 4), most + 1) if between % n == 0), default=most)


def boundary(step: int, config: Config, per_call: int) -> int:
    """Return where the call that starts at `step` ends; a resumed run makes the same calls."""
    t = config.train
    intervals = [per_call, t.evaluate_every, t.checkpoint_every, t.sample_every]
    return min(t.steps, *((step // every + 1) * every for every in intervals if every))


def _first_state(
    config: Config, placement: Placement, manager: CheckpointManager
) -> tuple[int, State]:
    """Return the newest checkpoint; without one, the weights of `train.init_from`, or fresh."""
    if found := checkpoints.restore_latest(manager, placement.like):
        return found
    return 0, placement.start(runs.source_params(config) if config.train.init_from else None)


def _leave(
    records: Sequence[Record], states: Iterable[State], summaries: Sequence[Summary]
) -> list[Summary]:
    """Leave each member's state in its own run folder, and say which diverged."""
    told = []
    for record, own, summary in zip(records, states, summaries, strict=True):
        if not math.isfinite(summary["train_loss"] + summary["validation_loss"]):
            record.diverged_at = record.diverged_at or record.config.train.steps
        # There is one already if this was interrupted.
        shutil.rmtree(record.run / "checkpoints", ignore_errors=True)
        if record.diverged_at is None:
            with checkpoints.open_checkpoints(record.run, keep=1) as manager:
                steps = record.config.train.steps
                checkpoints.save(manager, steps, own, summary["validation_loss"])
        known = {key: x if math.isfinite(x) else None for key, x in summary.items()}
        told.append(known | {"diverged_at": record.diverged_at})
    return told


class Clock:
    """Time the calls, and read their metrics one call late, so that no device is waited for."""

    def __init__(self, records: Sequence[Record]):
        self.records = records
        earlier = max(record.seconds for record in records)
        self.started = time.perf_counter() - earlier
        self.pending: tuple[int, Metrics] | None = None
        # Unknown at first: the first call compiles.
        self.last: float | None = None

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
        self.last = now
        for i, record in enumerate(self.records):
            record.add(step, jax.tree.map(lambda x, i=i: x[i], metrics), **known)

    def restart(self) -> None:
        """Leave the time since the last call out of the speed."""
        self.last = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds spent on these members, earlier processes included."""
        return time.perf_counter() - self.started
