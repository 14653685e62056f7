"""Trains the members of an ablation, program by program, each into a run folder of its own.

The folder of an ablation holds `members/`, their run folders, and `programs/`, the checkpoints of
programs on their way, from which an interrupted ablation goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecoder.ablation.population import (
    Program,
    arrays_of,
    make_program,
    memory_available,
    memory_needed,
    most_at_once,
    program_key,
)
from jaxdecoder.config import Config, to_dict
from jaxdecoder.data import tokenizers
from jaxdecoder.data.batches import Batch, Feed, SplitName
from jaxdecoder.data.tokens import Corpus, cache_key, prepare
from jaxdecoder.training import checkpoints, runs
from jaxdecoder.training.logging import keep_metrics
from jaxdecoder.training.loop import (
    boundary,
    complete,
    corpus_bigram_loss,
    source_params,
    steps_a_call,
    summary_of,
    with_source_tokenizer,
)
from jaxdecoder.training.step import (
    Metrics,
    State,
    evaluated_params,
    init_params,
    init_state,
    state_of,
)

MOST_BATCH_BYTES = 1 << 27
"""Bytes of batches that one call takes along: fewer steps a call where they are large."""

TOKENS_A_CALL = 1 << 11
"""Smaller batches are evaluated several at once, or the devices would wait for the host."""

Report = Callable[[int, int], None]
"""(steps of members done, of how many), for a progress bar."""


class Result(NamedTuple):
    """What a member came to."""

    config: Config
    summary: dict[str, Any]
    """As in its summary.json, with `diverged_at`: the step after which a number was not finite."""


def train_members(
    configs: Sequence[Config],
    out: Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    available: int | None = None,
    beside: int = 1,
    report: Report = lambda done, of: None,
) -> list[Result]:
    """Trains all members, each in the run folder that its config names; results in their order.

    What is finished is not trained again, and what was cut short goes on from its last checkpoint.
    `available` bounds the memory of each device, in bytes. A member's seconds are its share of the
    group's, and of the machine's where `beside` processes train at a time.

    Raises:
        UserError: if a single member of some program does not fit into memory.
    """
    devices = jax.devices() if devices is None else devices
    available = memory_available(devices) if available is None else available
    groups = by_program([with_source_tokenizer(config) for config in configs])
    total, done = sum(config.train.steps for config in configs), 0
    results: dict[str, Result] = {}
    for key, group in groups.items():

        def tell(steps: int, done: int = done) -> None:
            report(done + steps, total)

        for result in _train_group(group, out / "programs" / key, devices, available, beside, tell):
            results[result.config.train.out] = result
        done += sum(config.train.steps for config in group)
        report(done, total)
    return [results[config.train.out] for config in configs]


def by_program(configs: Sequence[Config]) -> dict[str, list[Config]]:
    """The members that share each program, by its key."""
    groups: dict[str, list[Config]] = {}
    for config in configs:
        groups.setdefault(program_key(config), []).append(config)
    return groups


def _train_group(
    group: list[Config],
    folder: Path,
    devices: Sequence[jax.Device],
    available: int,
    beside: int,
    tell: Callable[[int], None],
) -> Iterator[Result]:
    """Trains the members of one program, as many at once as fit; tells their steps so far."""
    known = finished(group)
    yield from known.values()
    if len(known) == len(group):
        return
    corpus = prepare(group[0].data)
    group = [complete(config, corpus) for config in group]
    longest = max(group, key=lambda config: config.train.steps)
    program = make_program(
        longest,
        devices,
        ends_differ=len({config.train.steps for config in group}) > 1,
        dropout_differs=len({config.model.dropout for config in group}) > 1,
    )
    row = longest.train.batch_size * longest.model.context_length * 12 * len(group)
    fitting = max(1, MOST_BATCH_BYTES // row)
    per_call = steps_a_call(longest, min(longest.train.steps_per_call, fitting))

    @functools.cache
    def compiled(members: int, steps: int) -> Any:
        """Of so many members and steps a call; what its memory is asked of is what runs."""
        return program.advance.lower(*_shapes(longest, program, members, steps)).compile()

    @functools.cache
    def evaluation(members: int) -> Any:
        """The same of `program.evaluate`."""
        return program.evaluate.lower(*_evaluation_shapes(longest, program, members)).compile()

    def need(members: int) -> int:
        return max(map(memory_needed, (compiled(members, per_call), evaluation(members))))

    most = most_at_once(need, len(group), available, len(devices), longest.train.out)
    before = sum(config.train.steps for config in group if config.train.out in known)
    for first in range(0, len(group), most):
        # There may be finished ones among them, if the ablation has grown.
        chunk = group[first : first + most]
        members = [config for config in chunk if config.train.out not in known]
        if members:
            together = _Together(
                members, program, compiled, evaluation, corpus, folder, per_call, beside
            )
            yield from together.train(lambda steps, before=before: tell(before + steps))  # type: ignore[misc]
            before += sum(config.train.steps for config in members)


def finished(configs: Sequence[Config]) -> dict[str, Result]:
    """What members came to, by their run folders; of those that are at their end.

    Raises:
        UserError: if one is the result of another config, or of another text.
    """
    key = functools.cache(cache_key)  # it may read the whole text
    found = {}
    for config in configs:
        run = Path(config.train.out)
        summary = run / "summary.json"
        if summary.exists():
            runs.check_same_config(run, config)
            runs.check_same_corpus(run, key(config.data))
            # The run's own config is complete, with what its corpus decided.
            result = Result(runs.read_config(run), json.loads(summary.read_text()))
            found[config.train.out] = result
    return found


def _shapes(config: Config, program: Program, members: int, per_call: int) -> Any:
    """The arguments of `program.advance`, without their values."""
    shape = (per_call, config.train.batch_size, config.model.context_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    each = (
        jax.eval_shape(partial(init_state, config)),
        jax.eval_shape(partial(arrays_of, config)),
        Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, jnp.float32)),  # type: ignore[arg-type]
    )
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((members, *s.shape), s.dtype, sharding=program.sharding),
        each,
    )


def _evaluation_shapes(config: Config, program: Program, members: int) -> Any:
    """The arguments of `program.evaluate`, without their values."""
    state, _, _ = _shapes(config, program, members, 1)
    shape = (_batches_a_call(config) * config.train.batch_size, config.model.context_length)
    tokens, weights = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=program.everywhere)
        for dtype in (jnp.int32, jnp.float32)
    )
    return evaluated_params(state), Batch(tokens, tokens, weights)  # type: ignore[arg-type]


def _batches_a_call(config: Config) -> int:
    """How many batches are evaluated at once."""
    return max(1, TOKENS_A_CALL // (config.train.batch_size * config.model.context_length))


class _Together:
    """Members of one program on their way together."""

    def __init__(
        self,
        members: list[Config],
        program: Program,
        compiled: Callable[[int, int], Any],
        evaluation: Callable[[int], Any],
        corpus: Corpus,
        folder: Path,
        per_call: int,
        beside: int,
    ):
        self.beside = beside
        self.members, self.program, self.corpus, self.per_call = members, program, corpus, per_call
        self.compiled, self.evaluation = compiled, evaluation
        self.runs = [Path(config.train.out) for config in members]
        # A checkpoint is gone on from by the very same members only.
        configs = json.dumps([to_dict(config) for config in members], sort_keys=True)
        self.folder = folder / hashlib.sha256(configs.encode()).hexdigest()[:8]
        # Members divide over the devices, so the last one is repeated until they do.
        count = program.sharding.mesh.size
        self.padded = members + [members[-1]] * (-len(members) % count)
        self.longest = max(members, key=lambda config: config.train.steps)
        self.diverged: list[int | None] = [None] * len(members)
        self.best = [math.inf] * len(members)
        self.evaluated = 0
        """The step of the last evaluation."""
        self.seconds = 0.0

    def train(self, tell: Callable[[int], None]) -> list[Result]:
        """Trains to the end, leaves a run folder for every member, and says what they came to."""
        t = self.longest.train
        for config, run in zip(self.members, self.runs, strict=True):
            run.mkdir(parents=True, exist_ok=True)
            runs.write_config(run, config, self.corpus.key)
            tokenizers.save(self.corpus.tokenizer, run / "tokenizer.json")
        manager = checkpoints.open_checkpoints(self.folder, keep=1)
        step, state = self._first_state(manager)
        self._recall(step)
        hyperparameters = self._place([arrays_of(config) for config in self.padded])
        started = time.perf_counter() - self.seconds
        with checkpoints.full_disk_explained(self.folder):
            while step < t.steps:
                end = boundary(step, self.longest, self.per_call)
                batch = self._batches(step, end - step)
                advance = self.compiled(len(self.padded), end - step)
                state, metrics = advance(state, hyperparameters, batch)
                self._record(step, jax.tree.map(np.asarray, metrics))
                self.seconds = time.perf_counter() - started
                if end % t.evaluate_every == 0 or end == t.steps:
                    losses = self.evaluate(state, "validation", t.evaluation_batches)
                    self.seconds = time.perf_counter() - started
                    self._record_validation(end, losses)
                step = end
                tell(sum(min(step, config.train.steps) for config in self.members))
                if step % t.checkpoint_every == 0 and step < t.steps:
                    # Which member is best is not asked here: the last checkpoint is the one.
                    checkpoints.save(manager, state._replace(step=np.int32(step)), 0.0)
            results = self._finish(state)
            manager.wait_until_finished()
        manager.close()
        return results

    def evaluate(self, state: State, split: SplitName, count: int | None) -> list[float]:
        """Every member's mean loss over (the first `count`) fixed batches of a split."""
        each = Feed.of(self.longest, self.corpus, split).fixed(count)
        at_once, call = _batches_a_call(self.longest), self.evaluation(len(self.padded))
        params, losses, weights = evaluated_params(state), [], []
        while several := list(islice(each, at_once)):
            # The last call is filled up at weight 0, so that all have one shape.
            nothing = several[0]._replace(weights=np.zeros_like(several[0].weights))
            several += [nothing] * (at_once - len(several))
            batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *several)
            losses.append(call(params, jax.device_put(batch, self.program.everywhere)))
            weights.append(float(batch.weights.sum()))
        sums = np.sum(np.asarray(losses, np.float64), axis=0)
        return [float(s) / max(1.0, sum(weights)) for s in sums[: len(self.members)]]

    def _first_state(self, manager: Any) -> tuple[int, State]:
        """The program's newest checkpoint, failing that fresh members."""
        shapes, _, _ = _shapes(self.longest, self.program, len(self.padded), 1)
        counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.program.everywhere)
        state = checkpoints.restore_latest(manager, shapes._replace(step=counter))
        if state is not None:
            step = int(state.step)
            taken = [jnp.int32(min(step, config.train.steps)) for config in self.padded]
            return step, state._replace(step=self._place(taken))
        if self.longest.train.init_from:
            given = state_of(self.longest, source_params(self.longest))
            return 0, self._place([jax.tree.map(np.asarray, given)] * len(self.padded))
        # Weights and optimiser apart: other programs of this shape have the first in common.
        to_state = jax.jit(partial(state_of, self.longest))
        makers: dict[float, Any] = {}
        fresh = []
        for config in self.padded:
            # Members of one program differ in their first weights by seed and scale alone.
            make = makers.setdefault(
                config.model.init_std,
                jax.jit(partial(init_params, config), compiler_options=self.program.options),
            )
            params = make(jax.random.key(config.train.seed))
            fresh.append(jax.tree.map(np.asarray, to_state(params)))
        return 0, self._place(fresh)

    def _place(self, each: list[Any]) -> Any:
        """One tree a member as one tree of arrays with a member axis, on the devices."""
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        return jax.device_put(stacked, self.program.sharding)

    def _batches(self, step: int, count: int) -> Any:
        """Batches (member, step, batch, time); members with one seed see the same ones."""
        by_seed = {
            seed: Feed.of(with_seed(self.longest, seed), self.corpus, "train").at(step, count)
            for seed in {config.train.seed for config in self.padded}
        }
        return self._place([by_seed[config.train.seed] for config in self.padded])

    def _recall(self, step: int) -> None:
        """Takes up the records of the steps before a resumption."""
        for i, run in enumerate(self.runs):
            for line in keep_metrics(run, step):
                self.seconds = max(self.seconds, line.get("seconds", 0.0))
                self.best[i] = min(self.best[i], line.get("validation_loss", math.inf))
                if "validation_loss" in line:
                    self.evaluated = max(self.evaluated, line["step"])
                if "diverged" in line:
                    self.diverged[i] = line["step"]

    def _record(self, first: int, metrics: Metrics) -> None:
        """Writes the metrics (member, step) of a call that started at step `first`."""
        finite = np.isfinite(metrics.train_loss) & np.isfinite(metrics.gradient_norm)
        for i, config in enumerate(self.members):
            for k in range(metrics.train_loss.shape[1]):
                step = first + k + 1
                if self.diverged[i] is not None or step > config.train.steps:
                    break
                if not finite[i, k]:
                    self.diverged[i] = step
                    self._write(i, step, diverged=True)
                elif step % config.train.log_every == 0:
                    self._write(
                        i,
                        step,
                        train_loss=float(metrics.train_loss[i, k]),
                        learning_rate=float(metrics.learning_rate[i, k]),
                        gradient_norm=float(metrics.gradient_norm[i, k]),
                    )

    def _record_validation(self, step: int, losses: list[float]) -> None:
        for i, (config, loss) in enumerate(zip(self.members, losses, strict=True)):
            if self.diverged[i] is None and self.evaluated < config.train.steps:
                self.best[i] = min(self.best[i], loss)
                at = min(step, config.train.steps)
                self._write(i, at, validation_loss=loss, seconds=self.seconds)
        self.evaluated = step

    def _write(self, i: int, step: int, **metrics: Any) -> None:
        with (self.runs[i] / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _finish(self, state: State) -> list[Result]:
        """Leaves every member's checkpoint and summary."""
        train = self.evaluate(state, "train", self.longest.train.evaluation_batches)
        validation = self.evaluate(state, "validation", None)
        host = jax.tree.map(np.asarray, state)
        floor = corpus_bigram_loss(self.corpus)
        summaries = []
        for i, (config, run) in enumerate(zip(self.members, self.runs, strict=True)):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], host)
            if self.diverged[i] is None and not math.isfinite(train[i] + validation[i]):
                self.diverged[i] = config.train.steps
            # There is one already if this was interrupted.
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            if self.diverged[i] is None:
                manager = checkpoints.open_checkpoints(run, keep=1)
                checkpoints.save(manager, own, validation[i])
                manager.wait_until_finished()
                manager.close()
            summary = summary_of(
                config,
                self.corpus,
                parameters=sum(leaf.size for leaf in jax.tree.leaves(own.params)),
                steps=config.train.steps,
                train_loss=train[i],
                validation_loss=validation[i],
                best_validation_loss=self.best[i],
                bigram_loss=floor,
                # Of the whole group, divided among its members and the groups beside it.
                seconds=self.seconds / len(self.members) / self.beside,
            ) | {"diverged_at": self.diverged[i]}
            summaries.append({key: x if _is_finite(x) else None for key, x in summary.items()})
        # All at the end: a member with a summary is finished, and members finish together.
        for run, summary in zip(self.runs, summaries, strict=True):
            runs.write_summary(run, summary)
        return [Result(*both) for both in zip(self.members, summaries, strict=True)]


def with_seed(config: Config, seed: int) -> Config:
    """The same run from another seed."""
    return replace(config, train=replace(config.train, seed=seed))


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
