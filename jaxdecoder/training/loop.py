"""The training loop: the one place where steps are taken.

A loop trains members side by side in one program. A run is its own only member (`single.py`); an
ablation has many (`ablation/population.py`). How members lie on devices is a `Placement`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from orbax.checkpoint import CheckpointManager

from jaxdecoder.config import Config
from jaxdecoder.data.batches import SplitName, Told, untold
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import Stopped
from jaxdecoder.kernels import packing
from jaxdecoder.training import checkpoints, runs
from jaxdecoder.training.clock import EVALUATION, INPUT, SAVING, Clock
from jaxdecoder.training.devices import is_first_host
from jaxdecoder.training.evaluation import bigram_loss
from jaxdecoder.training.faults import Fault, Skipped
from jaxdecoder.training.record import Record, Summary, saves
from jaxdecoder.training.step import Metrics, State
from jaxdecoder.training.stopping import Stop, anywhere, listening
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

    def batches(self, step: int, count: int) -> PyTree:
        """Return what `advance` takes for `count` steps from `step` on, placed."""

    def advance(self, state: State, batches: PyTree) -> tuple[State, Metrics]:
        """Take the steps of these batches; metrics are (members, steps), or (steps,) of one."""

    def losses(
        self, state: State, split: SplitName, count: int | None, told: Told = untold
    ) -> Sequence[float]:
        """Return each member's mean loss over `count` fixed batches of a split, or over all.

        `told` learns (batches done, of how many) before each, and may raise.
        """

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
    evaluating: Callable[[str, int, int, float], None] = lambda split, done, of, seconds: None
    """(split, batches done, of how many, seconds that all take by what the last ones took) in the
    evaluation at the end"""
    said: Callable[[str], None] = print
    """What is out of the ordinary, in words."""
    diverged: Callable[[Fault], None] = lambda fault: None
    """A member whose loss is no longer finite. It stands; the others go on, unless this raises."""


class _RollBack(Exception):
    """A fault after which the run goes back to its last checkpoint."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault


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
        Stopped: if a signal asked for it; all that was trained is saved.
    """
    longest = max(members, key=lambda config: config.train.steps)
    own = folder == Path(members[0].train.out)
    with checkpoints.full_disk_explained(folder), listening() as stop:
        for config in members:
            runs.begin(config, corpus)
        stop.idle = True
        with checkpoints.open_checkpoints(folder, keep=longest.train.keep if own else 1) as manager:
            course = _Course(members, longest, own, placement, folder, manager, stop, watch)
            state, clock = course.run()
            if own and not longest.train.steps and manager.latest_step() is None:
                # A run of no steps is a model too.
                losses_now = placement.losses(state, "validation", longest.train.evaluation_batches)
                checkpoints.save(manager, 0, state, losses_now[0])
        parameters, records = course.parameters, clock.records

        def losses(split: SplitName, count: int | None) -> Sequence[float]:
            def told(done: int, of: int) -> None:
                if jax.process_count() == 1:  # or the others would wait for this one
                    stop.check()
                each = clock.took[EVALUATION] / longest.train.evaluation_batches
                watch.evaluating(split, done, of, of * each)

            return placement.losses(state, split, count, told)

        stop.idle = True
        train = losses("train", longest.train.evaluation_batches)
        validation = losses("validation", longest.train.final_batches or None)
        splits = corpus.train.tokens, corpus.validation.tokens
        floor = bigram_loss(*splits, corpus.tokenizer.vocab_size)
        stop.idle = False
        seconds = clock.seconds() / len(members) / beside
        summaries = [
            record.summary(corpus, parameters, *found, bigram_loss=floor, seconds=seconds)
            for record, *found in zip(records, train, validation, strict=True)
        ]
        if not own:
            summaries = _leave(records, placement.members(state), summaries)
        if is_first_host():
            # All at the end: a member with a summary is finished, and members finish together.
            for record, summary in zip(records, summaries, strict=True):
                runs.write_summary(record.run, summary)
    return state, summaries


class _Course:
    """Training of members from their last checkpoint to their last step, faults included.

    `longest` is the member with the most steps. `own`: there is one member, and the checkpoints are
    its own. Only such a run is rolled back; what a member of a population does is its result.
    """

    def __init__(
        self,
        members: Sequence[Config],
        longest: Config,
        own: bool,
        placement: Placement,
        folder: Path,
        manager: CheckpointManager,
        stop: Stop,
        watch: Watch,
    ):
        self.members, self.longest, self.own = members, longest, own
        self.placement, self.folder = placement, folder
        self.manager, self.stop, self.watch = manager, stop, watch
        self.skipped = Skipped(folder)
        like = placement.like
        every = packing.size(like.params, nonzero=False).parameters
        # Of one member: each has a step of its own.
        self.parameters = every // math.prod(like.step.shape)

    def run(self) -> tuple[State, Clock]:
        """Take all steps; return the last state, and the clock with the records."""
        step, state = _first_state(self.longest, self.placement, self.manager)
        if step == 0:
            self.skipped.clear()
        t = self.longest.train
        self.watch.began(step, self.parameters)
        patience = 60 * t.watchdog_minutes
        with Clock(self._records(step), watchdog=self.watch.said, patience=patience) as clock:
            while True:
                try:
                    return take_steps(
                        step,
                        state,
                        self.longest,
                        self.placement,
                        clock,
                        batch_of=self.skipped.batch_of,
                        save=lambda *evaluated: self._save(clock, *evaluated),
                        passed=lambda step, state: self._passed(clock, step, state),
                    ), clock
                except _RollBack as error:
                    fault = error.fault
                # Out of the block, whose traceback holds the last state: two need not fit.
                del state
                step, state = self._roll_back(fault, clock)

    def _records(self, step: int) -> list[Record]:
        t, left = self.longest.train, self._rollbacks_left()
        records = [
            Record(
                config,
                step,
                wrote=self.watch.wrote,
                fault=self._fault,
                spike=t.spike if left and t.spike else math.inf,
            )
            for config in self.members
        ]
        if self.own:
            # A checkpoint may be gone that the metrics tell of.
            settles_at = self.longest.compression.settles_at
            records[0].best = checkpoints.best_loss(self.folder / "checkpoints", settles_at)
        return records

    def _rollbacks_left(self) -> int:
        # The teacher's answers are stored for each step's own batch.
        if not self.own or self.longest.distillation.cached_top_k:
            return 0
        return max(0, self.longest.train.rollbacks - len(self.skipped.parts))

    def _fault(self, fault: Fault) -> None:
        if self._rollbacks_left():
            raise _RollBack(fault)
        self.watch.diverged(fault)

    def _roll_back(self, fault: Fault, clock: Clock) -> tuple[int, State]:
        """Return the last good state, with the batches up to the fault skipped."""
        self.manager.wait_until_finished()
        step, state = _first_state(self.longest, self.placement, self.manager)
        self.skipped.add(step, fault.step - step)
        clock.forget()
        clock.records = self._records(step)
        left = self._rollbacks_left()
        clock.records[0].add_note(step, fault_step=fault.step)
        self.watch.said(
            f"step {fault.step}: {fault.what}; back to step {step}, past {fault.step - step} "
            f"batches ({left} more rollback{'' if left == 1 else 's'}: train.rollbacks)"
        )
        return step, state

    def _save(self, clock: Clock, step: int, state: State, losses: Sequence[float]) -> None:
        self.stop.idle = False
        if saves(step, self.longest, better=self.own and clock.records[0].improved):
            # Which member is best is not asked in the middle of a population, nor which model is
            # before it is as sparse as it is to be.
            settled = step >= self.longest.compression.settles_at
            loss = (losses[0] if settled else checkpoints.UNKNOWN) if self.own else 0.0
            with clock.on(SAVING):
                checkpoints.save(self.manager, step, state, loss)

    def _passed(self, clock: Clock, step: int, state: State) -> None:
        """After each call: save what is due by the clock, and stop if asked to."""
        self.watch.passed(step, state)
        self.stop.idle = False
        t = self.longest.train
        asked, late = anywhere(self.stop.requested, clock.since_saved() > 60 * t.checkpoint_minutes)
        if asked or late:
            clock.catch_up()  # a state after a fault is not saved
            if not self.own or bool(_finite(state.params)):
                with clock.on(SAVING):
                    checkpoints.save(self.manager, step, state)
        if asked:
            raise Stopped(f"{self.folder}: stopped at step {step:,} of {t.steps:,}, which is saved")


@jax.jit
def _finite(params: Params) -> jax.Array:
    """Return whether all weights are finite numbers."""
    return jnp.isfinite(optax.tree.norm(params))


def take_steps(
    step: int,
    state: State,
    config: Config,
    placement: Placement,
    clock: Clock,
    *,
    batch_of: Callable[[int], int],
    save: Callable[[int, State, Sequence[float]], None],
    passed: Callable[[int, State], None],
) -> State:
    """Take all steps from `step` on; record, evaluate and save on the way; return the last state.

    All training of the project goes through this loop. `config` is that of the member with the most
    steps; `batch_of` says which batch a step takes; `save` is told every validation loss; `passed`
    is told the state after every call.
    """
    t = config.train
    while step < t.steps:
        end = boundary(step, config, placement.steps_per_call)
        with clock.on(INPUT):
            batches = placement.batches(batch_of(step), end - step)
        state, metrics = placement.advance(state, batches)
        clock.add(step, metrics)
        step = end
        due = step % t.evaluate_every == 0 or step % t.checkpoint_every == 0
        if due or step == t.steps:
            clock.catch_up()
            with clock.on(EVALUATION):
                losses = placement.losses(state, "validation", t.evaluation_batches)
            for record, loss in zip(clock.records, losses, strict=True):
                record.add_validation(step, loss, clock.told())
            save(step, state, losses)
        passed(step, state)
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
        known = {
            key: x if x is not None and math.isfinite(x) else None for key, x in summary.items()
        }
        told.append(known | {"diverged_at": record.diverged_at})
    return told
