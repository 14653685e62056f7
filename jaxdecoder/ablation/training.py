"""Train the members of an ablation, program by program, each into a run folder of its own.

The folder of an ablation holds `members/`, their run folders, and `programs/`, the checkpoints of
programs on their way, from which an interrupted ablation goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxdecoder.ablation import population
from jaxdecoder.config import Config
from jaxdecoder.data.tokens import cache_key, prepare
from jaxdecoder.training import runs
from jaxdecoder.training.loop import Watch, steps_a_call, train_together
from jaxdecoder.training.record import Summary
from jaxdecoder.training.step import State

MOST_BATCH_BYTES = 1 << 27
"""Bytes of batches that one call takes along: fewer steps a call where they are large."""

Report = Callable[[int, int], None]
"""(steps of members done, of how many), for a progress bar."""


class Result(NamedTuple):
    """The result of one member."""

    config: Config
    summary: Summary
    """As in its summary.json, with `diverged_at`: the step after which a number was not finite."""


def train_members(
    configs: Sequence[Config],
    out: Path,
    *,
    available: int | None = None,
    beside: int = 1,
    report: Report = lambda done, of: None,
) -> list[Result]:
    """Train all members, each in the run folder that its config names; return results in order.

    What is finished is not trained again, and what was cut short goes on from its last checkpoint.
    `available` bounds the memory of each device, in bytes. A member's seconds are its share of the
    group's, and of the machine's where `beside` processes train at a time.

    Raises:
        UserError: if a single member of some program does not fit into memory.
    """
    devices = jax.devices()
    available = population.memory_available(devices) if available is None else available
    groups = by_program([runs.with_source_tokenizer(config) for config in configs])
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
    """Group the members that share a program, by its key."""
    groups: dict[str, list[Config]] = {}
    for config in configs:
        groups.setdefault(population.program_key(config), []).append(config)
    return groups


def _train_group(
    group: list[Config],
    folder: Path,
    devices: Sequence[jax.Device],
    available: int,
    beside: int,
    tell: Callable[[int], None],
) -> Iterator[Result]:
    """Train the members of one program, as many at once as fit; tell their steps so far."""
    known = finished(group)
    yield from known.values()
    if len(known) == len(group):
        return
    for config in group:
        if config.train.out not in known and not config.train.init_from:
            runs.check_beginning(config)
    corpus = prepare(group[0].data)
    group = [runs.complete(config, corpus) for config in group]
    longest = max(group, key=lambda config: config.train.steps)
    program = population.Program(
        longest,
        devices,
        ends_differ=len({config.train.steps for config in group}) > 1,
        dropout_differs=len({config.model.dropout for config in group}) > 1,
    )
    row = longest.train.batch_size * longest.model.context_length * 12 * len(group)
    fitting = max(1, MOST_BATCH_BYTES // row)
    per_call = steps_a_call(longest, min(longest.train.steps_per_call, fitting))
    most = population.most_at_once(
        lambda members: program.memory_needed(members, per_call),
        len(group),
        available,
        len(devices),
        longest.train.out,
    )
    before = sum(config.train.steps for config in group if config.train.out in known)
    for first in range(0, len(group), most):
        # There may be finished ones among them, if the ablation has grown.
        chunk = group[first : first + most]
        members = [config for config in chunk if config.train.out not in known]
        if not members:
            continue

        def passed(
            step: int, _: State, before: int = before, members: list[Config] = members
        ) -> None:
            tell(before + sum(min(step, config.train.steps) for config in members))

        _, summaries = train_together(
            members,
            corpus,
            population.Population(members, program, corpus, per_call),
            folder / _known_by(members),
            watch=Watch(passed=passed),
            beside=beside,
        )
        yield from map(Result, members, summaries)
        before += sum(config.train.steps for config in members)


def _known_by(members: list[Config]) -> str:
    """Return a name for these very members: others do not go on from their checkpoint."""
    configs = json.dumps([population.named_by(config) for config in members], sort_keys=True)
    return hashlib.sha256(configs.encode()).hexdigest()[:8]


def finished(configs: Sequence[Config]) -> dict[str, Result]:
    """Return the results of the members that are finished, by their run folders.

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
