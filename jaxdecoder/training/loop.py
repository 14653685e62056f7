"""The training loop: everything around the pure step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree
from orbax.checkpoint import CheckpointManager

from jaxdecoder.config import Config, ConfigError
from jaxdecoder.data import tokenizers
from jaxdecoder.data.batches import Batch, Feed, SplitName
from jaxdecoder.data.tokens import Corpus, prepare
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import packing
from jaxdecoder.training import checkpoints, runs
from jaxdecoder.training.devices import compiled_soon, is_first_host
from jaxdecoder.training.evaluation import (
    bigram_loss,
    bits_per_byte,
    make_evaluator,
    predicted,
)
from jaxdecoder.training.logging import Log, draw_losses
from jaxdecoder.training.sharding import (
    batch_sharding,
    everywhere,
    make_mesh,
    state_sharding,
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
) -> dict[str, Any]:
    """Trains a run to its end, from where it stopped if it has begun; returns its summary.

    `sampler` makes the text shown every `train.sample_every` steps and at the end; `objective` says
    of the complete config what is minimised.
    """
    run = Path(config.train.out)
    first = is_first_host()
    with runs.lock(run) if first else contextlib.nullcontext():
        runs.check_same_config(run, config)
        config = with_source_tokenizer(config)
        corpus = prepare(config.data)
        runs.check_same_corpus(run, corpus.key)
        config = complete(config, corpus)
        with checkpoints.full_disk_explained(run):
            if first:
                runs.write_config(run, config, corpus.key)
                tokenizers.save(corpus.tokenizer, run / "tokenizer.json")
            return _train(run, config, corpus, sampler, objective(config))


def with_source_tokenizer(config: Config) -> Config:
    """The config with the tokenizer of the run that it starts from, if it does from one."""
    if not config.train.init_from or config.data.tokenizer_path:
        return config
    # The weights know its tokens and no others.
    path = str(Path(config.train.init_from) / "tokenizer.json")
    return replace(config, data=replace(config.data, tokenizer_path=path))


def source_params(config: Config) -> Params:
    """The weights of the run that this one starts from.

    Raises:
        UserError: if they are those of another model.
    """
    source = runs.load_model(config.train.init_from)
    runs.check_same_model(config, source.config)
    return source.params


def complete(config: Config, corpus: Corpus) -> Config:
    """The config with what the tokenizer and the shapes decide filled in."""
    entries = corpus.tokenizer.vocab_size
    model = replace(config.model, vocab_size=config.model.vocab_size or entries).resolve()
    if model.vocab_size < entries:
        raise ConfigError(
            "model.vocab_size",
            model.vocab_size,
            f"the tokenizer has {entries} entries; leave it out",
        )
    return replace(config, model=model)


def steps_a_call(config: Config, most: int) -> int:
    """How many steps a compiled call takes: `most`, or somewhat fewer.

    Fewer where all calls are then equally long, for each length is a program to compile.
    """
    t = config.train
    every = (t.steps, t.evaluate_every, t.checkpoint_every, t.sample_every)
    between = math.gcd(*(n for n in every if 0 < n <= t.steps))
    return max((n for n in range(-(-most // 4), most + 1) if between % n == 0), default=most)


def boundary(step: int, config: Config, per_call: int) -> int:
    """Where the compiled call that starts at `step` ends.

    A function of the step alone, so that a resumed run makes the same calls.
    """
    t = config.train
    periods = [per_call, t.evaluate_every, t.checkpoint_every, t.sample_every]
    return min(t.steps, *((step // every + 1) * every for every in periods if every))


def saves(step: int, config: Config, *, better: bool) -> bool:
    """Whether there is a checkpoint of this step, which was evaluated.

    `better`: than all saved before it. Where better models are saved is a function of the step
    alone: a resumed run saves at the same steps.
    """
    t = config.train
    if step % t.checkpoint_every == 0 or step == t.steps:
        return True
    every = -(-t.best_every // t.evaluate_every) * t.evaluate_every
    return better and (not every or step % every == 0)


def _train(
    run: Path, config: Config, corpus: Corpus, sampler: Sampler | None, objective: Objective
) -> dict[str, Any]:
    t = config.train
    mesh = make_mesh(config)
    feed = partial(_feed, config, corpus, mesh, objective)
    fixed = _evaluation_batches(config, corpus, mesh)
    evaluate = make_evaluator(make_decoder(config))
    manager = checkpoints.open_checkpoints(run, keep=t.keep)
    state, shardings = _first_state(config, mesh, manager)
    call = jax.jit(
        fuse(make_step(config, objective=objective)),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, 1), everywhere(mesh)),
        out_shardings=(shardings, None),
    )

    held = jax.device_put(objective.held, everywhere(mesh))

    step, per_call = int(state.step), steps_a_call(config, t.steps_per_call)
    parameters = packing.size(state.params, nonzero=False).parameters
    settles_at = config.compression.settles_at
    best = checkpoints.best_loss(run / "checkpoints", settles_at)
    tokens_per_step = t.batch_size * config.model.context_length
    with Log(run, steps=t.steps, start=step, tensorboard=t.tensorboard) as log:
        log.say(_greeting(run, config, corpus, parameters, mesh.size, step))
        record = _Recorder(log, config, tokens_per_step)
        try:
            while step < t.steps:
                end = boundary(step, config, per_call)
                state, metrics = call(state, feed(step, end - step), held)
                record.add(step, metrics)
                step = end
                due = step % t.evaluate_every == 0 or step % t.checkpoint_every == 0
                if due or step == t.steps:
                    record.catch_up()
                    params = evaluated_params(state)
                    loss = evaluate(params, fixed("validation", t.evaluation_batches))
                    if not math.isfinite(loss):
                        raise diverged(step, f"the validation loss is {loss}")
                    log.write(step, validation_loss=loss, seconds=record.seconds())
                    # What is still to become sparse is not held against what is.
                    better = step >= settles_at and loss < best
                    if saves(step, config, better=better):
                        checkpoints.save(manager, state, loss)
                        best = loss if better else best
                if sampler is not None and t.sample_every and step % t.sample_every == 0:
                    text = sampler(config, evaluated_params(state), corpus.tokenizer)
                    _show_sample(log, run, step, text)
                if due:
                    record.start_the_clock()
            record.catch_up()
        except (UserError, KeyboardInterrupt):
            manager.wait_until_finished()
            raise
        manager.wait_until_finished()

        params = evaluated_params(state)
        validation = evaluate(params, fixed("validation", None))
        summary = summary_of(
            config,
            corpus,
            parameters=parameters,
            steps=step,
            train_loss=evaluate(params, fixed("train", t.evaluation_batches)),
            validation_loss=validation,
            best_validation_loss=best,
            bigram_loss=corpus_bigram_loss(corpus),
            seconds=record.seconds(),
        )
        if is_first_host():
            runs.write_summary(run, summary)
            draw_losses(run)
        if sampler is not None and not (t.sample_every and step % t.sample_every == 0):
            _show_sample(log, run, step, sampler(config, params, corpus.tokenizer))
        log.say(
            f"done: train {summary['train_loss']:.4f}, validation {validation:.4f} nats a token, "
            f"{summary['bits_per_byte']:.4f} bits a byte (a bigram model: "
            f"{summary['bigram_loss']:.4f} nats); talk to it with: python sample.py {run}"
        )
    manager.close()
    return summary


def summary_of(
    config: Config,
    corpus: Corpus,
    *,
    parameters: int,
    steps: int,
    train_loss: float,
    validation_loss: float,
    best_validation_loss: float,
    bigram_loss: float,
    seconds: float,
) -> dict[str, Any]:
    """What summary.json ends with; losses in nats a token, the best that of the best checkpoint."""
    targets = predicted(config, corpus.validation)
    return {
        "parameters": parameters,
        "steps": steps,
        "tokens": steps * config.train.batch_size * config.model.context_length,
        "train_loss": train_loss,
        "validation_loss": validation_loss,
        "bits_per_byte": bits_per_byte(validation_loss, targets, corpus.validation.n_bytes),
        "best_validation_loss": best_validation_loss,
        "bigram_loss": bigram_loss,
        "seconds": seconds,
    }


def corpus_bigram_loss(corpus: Corpus) -> float:
    """Validation loss of the model that knows one token of the past."""
    return bigram_loss(corpus.train.tokens, corpus.validation.tokens, corpus.tokenizer.vocab_size)


def _first_state(config: Config, mesh: Mesh, manager: CheckpointManager) -> tuple[State, PyTree]:
    """The state to go on from, and where its arrays live.

    The run's newest checkpoint; failing that the weights of `train.init_from`; failing that fresh
    ones.
    """
    shapes = jax.eval_shape(partial(init_state, config))
    shardings = state_sharding(shapes, mesh, fsdp=config.train.fsdp)
    like = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )
    state = checkpoints.restore_latest(manager, like)
    if state is None and config.train.init_from:
        start = jax.jit(partial(state_of, config), out_shardings=shardings)
        state = start(source_params(config))
    elif state is None:
        # Random numbers take an optimising compiler seconds, and are drawn once.
        fresh = jax.jit(
            partial(init_state, config),
            out_shardings=shardings,
            compiler_options=compiled_soon(jax.default_backend()),
        )
        state = fresh()
    return state, shardings


class _Recorder:
    """Reads metrics one call late, so that the device is never waited for, and checks them."""

    def __init__(self, log: Log, config: Config, tokens_per_step: int):
        self.log, self.config, self.tokens_per_step = log, config, tokens_per_step
        self.pending: tuple[int, Metrics] | None = None
        self.started = time.perf_counter()
        # Unknown at first: the first call compiles.
        self.last_time: float | None = None

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a call that started at `step`, and reads those before it."""
        self.catch_up()
        self.pending = (step, metrics)

    def catch_up(self) -> None:
        """Logs what is pending; raises at the first step whose loss or gradient is not finite."""
        if self.pending is None:
            return
        first, metrics = self.pending
        self.pending = None
        metrics = jax.tree.map(np.asarray, metrics)
        bad = ~(np.isfinite(metrics.train_loss) & np.isfinite(metrics.gradient_norm))
        if bad.any():
            at = int(np.argmax(bad))
            raise diverged(
                first + at + 1,
                f"the loss is {metrics.train_loss[at]} and the gradient norm "
                f"{metrics.gradient_norm[at]}",
            )
        now = time.perf_counter()
        count = len(metrics.train_loss)
        known = {}
        if self.last_time is not None:
            known["tokens_per_second"] = count * self.tokens_per_step / (now - self.last_time)
        self.last_time = now
        for i in range(count):
            step = first + i + 1
            if step % self.config.train.log_every == 0:
                self.log.write(
                    step,
                    train_loss=float(metrics.train_loss[i]),
                    learning_rate=float(metrics.learning_rate[i]),
                    gradient_norm=float(metrics.gradient_norm[i]),
                    **known,
                )

    def start_the_clock(self) -> None:
        """Leaves what was done since the last call out of the speed."""
        self.last_time = time.perf_counter()

    def seconds(self) -> float:
        """Seconds spent on this run, earlier processes included."""
        return self.log.earlier_seconds + time.perf_counter() - self.started


def _feed(
    config: Config, corpus: Corpus, mesh: Mesh, objective: Objective, step: int, count: int
) -> PyTree:
    """The batches of `count` steps on the devices, each host giving its rows."""
    rows = _rows_of_this_host(config.train.batch_size)
    stacked = Feed.of(config, corpus, "train").at(step, count, rows)
    return _place(objective.feed(stacked, step, rows), batch_sharding(mesh, 1))


def _evaluation_batches(
    config: Config, corpus: Corpus, mesh: Mesh
) -> Callable[[SplitName, int | None], Iterator[Batch]]:
    """A function from a split's name and a count to fixed batches on the devices."""

    def fixed(name: SplitName, count: int | None) -> Iterator[Batch]:
        rows = _rows_of_this_host(config.train.batch_size)
        each = Feed.of(config, corpus, name).fixed(count, rows)
        return (_place(batch, batch_sharding(mesh)) for batch in each)

    return fixed


def _rows_of_this_host(batch_size: int) -> slice:
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def _place(batch: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )


def diverged(step: int, what: str) -> UserError:
    """What to say, and to try, when a number is no longer finite."""
    return UserError(
        f"step {step}: {what}; training stopped, the last good checkpoint is kept. A lower "
        "optimizer.learning_rate, more warmup_steps or a gradient_clip may help, with another "
        "--train.out"
    )


def _show_sample(log: Log, run: Path, step: int, text: str) -> None:
    log.say(f"\n--- a sample at step {step} ---\n{text}\n---\n")
    if is_first_host():
        with (run / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text}\n")


def _greeting(
    run: Path, config: Config, corpus: Corpus, parameters: int, devices: int, step: int
) -> str:
    platform = jax.devices()[0].platform
    begun = f"going on at step {step}" if step else "from the start"
    return (
        f"{run}: {parameters:,} parameters, {len(corpus.train.tokens):,} training tokens of "
        f"{corpus.tokenizer.vocab_size:,} kinds, on {devices} {platform} "
        f"device{'s' if devices > 1 else ''}, {begun}"
    )
