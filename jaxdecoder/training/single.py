"""A run by itself: a loop with one member, its batch divided over the devices of all hosts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
from jaxtyping import PyTree

from jaxdecoder.config import Config
from jaxdecoder.data import tokenizers
from jaxdecoder.data.batches import Feed, SplitName, Told, untold
from jaxdecoder.data.tokens import Corpus, prepare
from jaxdecoder.errors import shell_word
from jaxdecoder.training import checkpoints, runs
from jaxdecoder.training.continuing import go_on
from jaxdecoder.training.devices import compiled_soon, is_first_host
from jaxdecoder.training.evaluation import make_evaluator
from jaxdecoder.training.faults import Fault
from jaxdecoder.training.logging import Screen, draw_losses
from jaxdecoder.training.loop import Watch, steps_a_call, train_together
from jaxdecoder.training.profiling import Profiler
from jaxdecoder.training.record import Summary
from jaxdecoder.training.sharding import (
    batch_sharding,
    everywhere,
    known_to_layers,
    left_whole,
    located,
    make_mesh,
    place_rows,
    rows_needed,
    state_sharding,
    training_call,
)
from jaxdecoder.training.step import (
    Metrics,
    Objective,
    State,
    evaluated_params,
    fuse,
    init_state,
    make_decoder,
    make_step,
    next_token,
    state_of,
)
from jaxdecoder.typing import Params

Sampler = Callable[[Config, Params, tokenizers.Tokenizer], str]
ToObjective = Callable[[Config], Objective]


def train(
    config: Config, *, sampler: Sampler | None = None, objective: ToObjective = next_token
) -> Summary:
    """Train a run to its end, from where it stopped if it has begun; return its summary.

    `sampler` makes the text shown every `train.sample_every` steps and at the end; `objective` says
    of the complete config what is minimised.

    Raises:
        UserError: if the run's folder is in use or has another config, or if its loss is no longer
            finite.
    """
    run, t = Path(config.train.out), config.train
    with runs.lock(run) if is_first_host() else contextlib.nullcontext():
        config, news = go_on(config)
        config = runs.with_source_tokenizer(config)
        corpus = prepare(config.data)
        runs.check_same_corpus(run, corpus.key)
        config = runs.complete(config, corpus)
        with checkpoints.full_disk_explained(run):
            alone = Alone(config, corpus, objective(config))

        def began(step: int, parameters: int) -> None:
            devices, platform = alone.mesh.size, jax.devices()[0].platform
            sizes = ", ".join(f"{axis} {n}" for axis, n in alone.mesh.shape.items() if n > 1)
            split = f" ({sizes})" if sizes else ""
            begun = f"going on at step {step}" if step else "from the start"
            screen.begin(step)
            for line in news:
                screen.say(line)
            screen.say(
                f"{run}: {parameters:,} parameters, {len(corpus.train.tokens):,} training tokens "
                f"of {corpus.tokenizer.vocab_size:,} kinds, on {devices} {platform} "
                f"device{'s' if devices > 1 else ''}{split}, {begun}"
            )
            for line in left_whole(config, alone.mesh):
                screen.say(f"{run}: {line}, and stays whole")

        def sample(state: State) -> str:
            assert sampler is not None
            return sampler(config, evaluated_params(state), corpus.tokenizer)

        def sampled(step: int) -> bool:
            return t.sample_every > 0 and step % t.sample_every == 0

        # To compile it by itself, one of several hosts would have to wait for the others.
        profiled = t.profile and jax.process_count() == 1
        profiler = Profiler(run, alone.program) if profiled else None

        def passed(step: int, state: State) -> None:
            if profiler and (said := profiler.passed(step, state)):
                screen.say(said)
            if sampler is not None and sampled(step):
                screen.sample(step, sample(state))

        def stop(fault: Fault) -> None:
            raise fault

        with Screen(run, steps=t.steps, tensorboard=t.tensorboard) as screen:
            watch = Watch(began, screen.show, passed, screen.evaluating, screen.say, stop)
            if news and is_first_host():
                (run / "summary.json").unlink(missing_ok=True)  # that of a run which had ended
            with contextlib.closing(profiler) if profiler else contextlib.nullcontext():
                state, (summary,) = train_together([config], corpus, alone, run, watch=watch)
            if is_first_host():
                draw_losses(run)
            if sampler is not None and not sampled(t.steps):
                screen.sample(t.steps, sample(state))
            screen.say(
                f"done: train {summary['train_loss']:.4f}, validation "
                f"{summary['validation_loss']:.4f} nats a token, "
                f"{summary['bits_per_byte']:.4f} bits a byte (a bigram model: "
                f"{summary['bigram_loss']:.4f} nats); talk to it with: "
                f"python sample.py {shell_word(run)}"
            )
    return summary


class Alone:
    """The `Placement` of a single member: its mesh is of these devices, or of all."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        objective: Objective,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.config, self.corpus, self.objective = config, corpus, objective
        self.steps_per_call = steps_a_call(config, config.train.steps_per_call)
        self.mesh = make_mesh(config, devices)
        shapes = jax.eval_shape(partial(init_state, config))
        self.shardings = state_sharding(shapes, self.mesh, config.architecture)
        self.like = located(shapes, self.shardings)
        self.constants = jax.device_put(objective.constants, everywhere(self.mesh))
        self._evaluate = make_evaluator(make_decoder(config))
        several = fuse(make_step(config, objective=objective))
        self._call = training_call(several, self.mesh, self.shardings)

    def start(self, params: Params | None) -> State:
        """Return the state at step 0: of these weights, or fresh ones."""
        if params is not None:
            return jax.jit(partial(state_of, self.config), out_shardings=self.shardings)(params)
        # Random numbers take an optimising compiler seconds, and are drawn once.
        return jax.jit(
            partial(init_state, self.config),
            out_shardings=self.shardings,
            compiler_options=compiled_soon(jax.default_backend()),
        )()

    def batches(self, step: int, count: int) -> PyTree:
        """See `Placement`; each host gives its rows of the batches."""
        rows = self._rows
        stacked = Feed.of(self.config, self.corpus, "train").at(step, count, rows)
        return self._placed(self.objective.feed(stacked, step, rows), leading=1)

    def advance(self, state: State, batches: PyTree) -> tuple[State, Metrics]:
        """Take the steps of these batches."""
        with known_to_layers(self.mesh):
            return self._call(state, batches, self.constants)

    def program(self, step: int, count: int) -> str:
        """Return the compiled text of what `advance` calls for these steps."""
        batches = self.batches(step, count)
        with known_to_layers(self.mesh):
            lowered = self._call.lower(self.like, batches, self.constants)
        return str(lowered.compile().as_text())

    def losses(
        self, state: State, split: SplitName, count: int | None, told: Told = untold
    ) -> Sequence[float]:
        """Return the mean loss over `count` fixed batches of a split, or over all of it."""
        each = Feed.of(self.config, self.corpus, split).fixed(count, self._rows, told)
        placed = (self._placed(batch) for batch in each)
        with known_to_layers(self.mesh):
            return [self._evaluate(evaluated_params(state), placed)]

    def members(self, state: State) -> Sequence[State]:
        """Return the state."""
        return [state]

    @functools.cached_property
    def _rows(self) -> slice:
        """Which rows of a batch this host gives."""
        return rows_needed(batch_sharding(self.mesh), self.config.train.batch_size)

    def _placed(self, batch: PyTree, leading: int = 0) -> PyTree:
        """Return this host's rows of batches as arrays on the devices."""
        where, total = batch_sharding(self.mesh, leading), self.config.train.batch_size
        return place_rows(batch, where, self._rows, total, leading)
