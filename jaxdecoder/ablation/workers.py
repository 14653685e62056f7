"""Train members on a CPU: a process for each core trains whole programs, one after another.

Small models gain little from a second core, and two of them in one process share its threads, which
wander between the cores; processes that are bound to a core each keep their caches, and compile
their programs side by side. See `python -m benchmarks.population --mappings`.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdecoder.ablation.population import memory_available
from jaxdecoder.ablation.training import Report, Result, by_program, finished, train_members
from jaxdecoder.config import Config
from jaxdecoder.data.tokens import prepare
from jaxdecoder.errors import Stopped, UserError
from jaxdecoder.helpers import SPAWN, no_main_module, start_helper
from jaxdecoder.training.devices import stay_on
from jaxdecoder.training.runs import with_source_tokenizer
from jaxdecoder.training.stopping import Stop, listening


def train_on_cores(
    configs: Sequence[Config],
    out: Path,
    cores: Sequence[int],
    *,
    report: Report = lambda done, of: None,
) -> list[Result]:
    """Do what `train_members` does in a process for each of these cores.

    Raises:
        UserError: as `train_members`, and if a process was killed, as for want of memory.
    """
    configs = [with_source_tokenizer(config) for config in configs]
    known = finished(configs)
    if len(known) < len(configs):
        for data in {config.data for config in configs}:
            prepare(data)
        _share_out(configs, out, cores, report)
        known = finished(configs)
    return [known[config.train.out] for config in configs]


def _share_out(configs: Sequence[Config], out: Path, cores: Sequence[int], report: Report) -> None:
    """Train the members in processes; return when the last of them has ended."""
    parts = shares(configs, len(cores))
    cores = cores[: len(parts)]
    work, messages = SPAWN.Queue(), SPAWN.Queue()
    for part in [*enumerate(parts), *[None for _ in cores]]:
        work.put(part)
    available = memory_available([jax.devices()[0]]) // len(cores)
    shared = (work, messages, out, available, len(cores))
    workers = [SPAWN.Process(target=_train, args=(core, *shared)) for core in cores]
    total = sum(config.train.steps for config in configs)
    with listening() as stop:
        try:
            with no_main_module():
                for worker in workers:
                    worker.start()
            _follow(workers, messages, len(parts), total, report, stop)
        finally:
            # A worker that trains saves what it has before it ends.
            for worker in workers:
                if worker.pid is not None:
                    worker.terminate()
            for worker in workers:
                if worker.pid is not None:
                    worker.join()


def shares(configs: Sequence[Config], count: int) -> list[list[Config]]:
    """Divide members among `count` workers: whole programs; divide the last if some are idle."""
    groups = list(by_program(configs).values())
    odd = len(groups) % count
    whole, rest = groups[: len(groups) - odd], groups[len(groups) - odd :]
    pieces = -(-count // odd) if odd else 1
    return whole + [group[i::pieces] for group in rest for i in range(min(pieces, len(group)))]


def _train(core: int, work: Any, messages: Any, out: Path, available: int, beside: int) -> None:
    """Be a worker: say (part, steps taken so far, or None at its end, or what is wrong)."""
    start_helper()
    stay_on(core)
    while part := work.get():
        number, configs = part
        try:
            train_members(
                configs,
                out,
                available=available,
                beside=beside,
                report=lambda done, of, number=number: messages.put((number, done)),  # type: ignore[misc]
            )
        except UserError as error:
            messages.put((number, str(error)))
            return
        except Stopped:
            messages.cancel_join_thread()  # nobody may read them any more
            return
        messages.put((number, None))


def _follow(
    workers: Sequence[Any], messages: Any, parts: int, total: int, report: Report, stop: Stop
) -> None:
    """Read the workers' messages until all parts are done, or it is asked to stop."""
    steps, ended = [0] * parts, 0
    while ended < parts:
        stop.check()
        for worker in workers:
            if worker.exitcode:
                raise UserError(
                    f"a process that trained members ended with status {worker.exitcode}; "
                    "if it was killed (-9), memory ran out: --devices 1 needs less at a time; "
                    "the same command goes on from the last checkpoints"
                )
        try:
            part, said = messages.get(timeout=1.0)
        except queue.Empty:
            if all(worker.exitcode == 0 for worker in workers):
                what = "a process that trained members was stopped; the same command goes on"
                raise UserError(what) from None
            continue
        if isinstance(said, str):
            raise UserError(said)
        if said is None:
            ended += 1
        else:
            steps[part] = said
            report(sum(steps), total)
