"""Choose by measurement how a CPU takes a run's steps: attention, passes, devices.

What is quickest differs from processor to processor, so a few trials decide, each in a process of
its own, before JAX starts here. A choice is kept in `data.cache` for the next run of this shape. It
becomes part of the run's config, so a run that goes on keeps it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax

from jaxdecoder.analysis import flops_per_token
from jaxdecoder.config import Config, to_dict
from jaxdecoder.config.model import Implementation
from jaxdecoder.config.sections import MeshConfig
from jaxdecoder.data.tokens import prepare
from jaxdecoder.errors import UserError, first_line
from jaxdecoder.files import write_atomically
from jaxdecoder.helpers import SPAWN, no_main_module, start_helper
from jaxdecoder.kernels.flash import SHORT
from jaxdecoder.training import runs
from jaxdecoder.training.devices import cores, hosts, processor, set_up
from jaxdecoder.training.single import Alone, ToObjective
from jaxdecoder.training.step import next_token

RATE = 8e10
"""FLOPs a second of a core, to estimate with: rather many, so that a run is not overestimated."""
REPAYS = 10
"""How often a run must be longer than the trials would be."""
START_SECONDS = 12.0
"""What a trial takes before its first turn, most of it compiling."""
TURN_SECONDS = 0.5
"""At least so long is a turn of a trial, in whole steps."""
ROUNDS = 5
CLEAR = 1.15
"""Two rounds are enough where one form is so much quicker in both."""
MARGIN = 1.05
"""How much quicker another form must be: less is noise."""


class Form(NamedTuple):
    """How steps are taken. Another form gives the same losses, up to rounding and dropout."""

    attention: str
    """model.attention_implementation"""
    passes: int
    """train.gradient_accumulation"""
    devices: int
    """train.cpu_devices"""

    def __str__(self) -> str:
        devices = f"{self.devices or 1} device{'s' if self.devices > 1 else ''}"
        passes = f"{self.passes} pass{'es' if self.passes > 1 else ''}"
        return f"attention {self.attention}, {passes}, {devices}"


UNSAID = Form(attention="auto", passes=1, devices=0)
"""The defaults: what a config leaves so is chosen, and what it says otherwise is kept."""

Say = Callable[[str], None]


def form_of(config: Config) -> Form:
    """Return the form that a config says."""
    t = config.train
    return Form(config.model.attention_implementation, t.gradient_accumulation, t.cpu_devices)


def with_form(config: Config, form: Form) -> Config:
    """Return the config with another form."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, attention_implementation=cast(Implementation, form.attention)
        ),
        train=dataclasses.replace(
            config.train, gradient_accumulation=form.passes, cpu_devices=form.devices
        ),
    )


def tuned(config: Config, *, objective: ToObjective = next_token, say: Say = print) -> Config:
    """Return the config in the form to train it in here: its run's, one kept, or the quickest.

    Call it before JAX has devices. Only what the config leaves at its default is chosen, only on a
    CPU, and only for a run that is long enough to repay the trials. With `train.tune` off, or a
    mesh of its own, a run that has not begun is left as it is.
    """
    run = Path(config.train.out)
    if runs.has_results(run):
        return with_form(config, _filled(form_of(config), form_of(runs.read_config(run))))
    if not config.train.tune or config.mesh != MeshConfig() or config.distillation.cached_top_k:
        return config
    if not _only_a_cpu() or hosts(os.environ) is not None:
        return config
    config_here = runs.with_source_tokenizer(config)
    complete = runs.complete(config_here, prepare(config_here.data))
    candidates = others(complete, len(cores()))
    if not _repays(complete, len(candidates)):
        return config
    path = Path(config.data.cache) / "forms" / f"{_key(complete)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        form = Form(**json.loads(path.read_text())["form"])
        # Whatever the file holds, it must be a form that could have been chosen.
        if any(change not in candidates for change in _differ(form, form_of(complete))):
            raise ValueError(form)
        say(f"tune: {form}, the quickest on this processor when it was measured ({path})")
        return with_form(config, form)
    say(f"tune: trials on {processor()}, {len(cores())} cores (--train.tune false leaves them out)")
    form, milliseconds = quickest(complete, candidates, partial(_Process, objective), say)
    told = {"processor": processor(), "jax": jax.__version__, "milliseconds": milliseconds}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"form": form._asdict(), **told}, indent=2) + "\n")
        say(f"tune: {form}; kept in {path}")
    except OSError as error:
        say(f"tune: {form}; not kept: {path}: {error.strerror}")
    return with_form(config, form)


def others(config: Config, n_cores: int) -> list[Mapping[str, Any]]:
    """Return what is worth trying beside a config's own form: changes, one after another."""
    model, t, said = config.model, config.train, form_of(config)
    changes: list[Mapping[str, Any]] = []
    if said.attention == UNSAID.attention and model.context_length >= SHORT:
        changes += [{"attention": name} for name in ("rows", "chunked", "reference")]
    if said.passes == UNSAID.passes:
        changes += [{"passes": n} for n in (2, 4, 8) if t.batch_size % n == 0 and n < t.batch_size]
    if said.devices == UNSAID.devices and n_cores > 1 and t.batch_size % n_cores == 0:
        changes.append({"devices": n_cores})
    return changes


@runtime_checkable
class Trial(Protocol):
    """A form that takes steps on request."""

    def seconds(self) -> float:
        """Return the seconds of a step, of the steps of one turn.

        Raises:
            UserError: if the form cannot take it.
        """

    def close(self) -> None:
        """Free what it holds."""


def quickest(
    config: Config,
    changes: Sequence[Mapping[str, Any]],
    start: Callable[[Config], Trial],
    say: Say,
) -> tuple[Form, dict[str, float]]:
    """Return the quickest form, and the milliseconds a step of each that was tried.

    One change is tried after another, each against the best so far, in turns.
    """
    best, champion = form_of(config), start(config)
    milliseconds: dict[str, float] = {}
    try:
        for change in changes:
            form = best._replace(**change)
            try:
                challenger = start(with_form(config, form))
                turns = _alternate(champion, challenger)
            except UserError as error:
                say(f"tune:   {form}: {first_line(error)}")
                continue
            theirs, its = (1e3 * statistics.median(side) for side in zip(*turns, strict=True))
            milliseconds |= {str(best): theirs, str(form): its}
            wins = statistics.median(a / b for a, b in turns) > MARGIN
            told = f"{form}: {its:.1f} ms a step, {best}: {theirs:.1f}"
            say(f"tune:   {told}{'; taken' if wins else ''}")
            if wins:
                best, champion, challenger = form, challenger, champion
            challenger.close()
    finally:
        champion.close()
    return best, milliseconds


def _alternate(a: Trial, b: Trial) -> list[tuple[float, float]]:
    """Return the seconds of both in rounds, fewer where the first ones are clear."""
    turns: list[tuple[float, float]] = []
    while len(turns) < ROUNDS:
        turns.append((a.seconds(), b.seconds()))
        ratios = [mine / theirs for mine, theirs in turns]
        if len(turns) > 1 and (min(ratios) > CLEAR or max(ratios) < 1 / CLEAR):
            break
    return turns


class _Process:
    """A form in a process of its own, with all that JAX takes only once."""

    def __init__(self, objective: ToObjective, config: Config):
        self._here, there = SPAWN.Pipe()
        with no_main_module():
            self._process = SPAWN.Process(target=_take_turns, args=(there, config, objective))
            self._process.start()
        there.close()
        self._answer()

    def seconds(self) -> float:
        """See `Trial`."""
        with contextlib.suppress(OSError):  # the answer will say that it has ended
            self._here.send(True)
        return self._answer()

    def close(self) -> None:
        """See `Trial`."""
        with contextlib.suppress(OSError):
            self._here.send(False)
        self._process.join()
        self._here.close()

    def _answer(self) -> float:
        try:
            found = self._here.recv()
        except (EOFError, OSError):
            raise UserError("the trial ended before it was measured") from None
        if isinstance(found, str):
            raise UserError(found)
        return float(found)


def _take_turns(pipe: Connection, config: Config, objective: ToObjective) -> None:
    """Compile the config's step, then answer every request with the seconds of a step."""
    start_helper()
    try:
        set_up(config)
        turns = _turns(config, objective)
        pipe.send(next(turns))
        while pipe.recv():
            pipe.send(next(turns))
    except (EOFError, BrokenPipeError):
        return  # nobody asks any more
    except Exception as error:
        # Whatever this form lacks, memory too, the others are still there to try.
        pipe.send(first_line(error))


def _turns(config: Config, objective: ToObjective) -> Iterator[float]:
    corpus = prepare(config.data)
    alone = Alone(config, corpus, objective(config))
    state, steps = alone.start(None), 1
    # The first step compiles.
    state, _ = alone.advance(state, alone.batches(0, 1))
    while True:
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = alone.advance(state, alone.batches(0, 1))
        jax.block_until_ready((state, metrics))
        taken = time.perf_counter() - start
        yield taken / steps
        steps = max(1, round(steps * TURN_SECONDS / taken))


def _differ(a: Form, b: Form) -> list[Mapping[str, Any]]:
    """Return what makes `a` of `b`, one change each."""
    both = zip(Form._fields, a, b, strict=True)
    return [{name: mine} for name, mine, theirs in both if mine != theirs]


def _filled(said: Form, theirs: Form) -> Form:
    """Return what is said, and theirs where nothing is."""
    for change in _differ(said, UNSAID):
        theirs = theirs._replace(**change)
    return theirs


def _repays(config: Config, trials: int) -> bool:
    """Return whether a run is long enough for so many trials."""
    t = config.train
    tokens = t.batch_size * config.architecture.context_length
    step = tokens * flops_per_token(config.model).train["total"] / (RATE * len(cores()))
    one = START_SECONDS + 2 * ROUNDS * max(TURN_SECONDS, step)
    return trials > 0 and t.steps * step > REPAYS * trials * one


def _only_a_cpu() -> bool:
    """Return whether JAX will run on the CPU, without starting it: nothing else is installed."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return chosen == "cpu" or not (chosen or plugins or importlib.util.find_spec("libtpu"))


def _key(config: Config) -> str:
    """Return the name of what a choice holds for: processor, versions, model, batch, optimiser."""
    tables = to_dict(config)
    known = {
        "processor": processor(),
        "cores": len(cores()),
        "jax": jax.__version__,
        "flags": os.environ.get("XLA_FLAGS", ""),
        "model": tables["model"],
        "optimizer": config.optimizer.name,
        "distillation": tables["distillation"],
        "mode": config.data.mode,
        **{
            name: tables["train"][name]
            for name in ("batch_size", "gradient_accumulation", "cpu_devices", "compute_dtype")
        },
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
