"""Finds the best block sizes of our attention kernels on this card, for `kernels/tuned.json`.

    python -m benchmarks.tune_attention [--widths 64 128] [--dtypes bfloat16] [--time 8192]
    python -m benchmarks.tune_attention --minutes 2 --out tuned.json

Every kernel is timed alone with every candidate; all of them take turns, and the medians decide.
Sizes that do not compile, or do not fit the card, are passed over. Rows of other cards are kept.
A row is written when all of its kernels have their sizes; when the minutes are over, no other
kernel is begun.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import timed
from jaxdecoder.kernels import flash, masks, portable, tuning
from jaxdecoder.kernels.problem import Operands, Problem

# One mask for each kind that `tuning.mask_kind` tells apart.
KINDS = {
    "full": masks.causal(),
    "partial": masks.causal() & (masks.sliding_window(128) | masks.strided(128)),
}

Launch = Callable[..., Any]


def portable_candidates(dtype: Any) -> list[portable.Sizes]:
    """Sizes worth a try; float32 has no matrix unit here, and its blocks must be small."""
    single = dtype == jnp.float32
    queries, keys = ((16, 32, 64), (16, 32)) if single else ((64, 128), (32, 64, 128))
    stages = (1, 2) if single else (2, 3)
    return [portable.Sizes(*sizes) for sizes in itertools.product(queries, keys, (4, 8), stages)]


def portable_kernels(problem: Problem, operands: Operands, dout: jax.Array) -> dict[str, Launch]:
    """Each kernel by name, as a function of its sizes that gives a compiled call."""
    out, logsumexp = jax.jit(functools.partial(portable.forward, problem))(operands)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    gradients = (operands, dout, logsumexp, delta)
    launches = {
        "forward": (portable.forward, (operands,)),
        "queries": (portable.gradient_of_queries, gradients),
        "keys": (portable.gradient_of_keys, gradients),
    }

    def compiled(function: Launch, arguments: Any, chosen: portable.Sizes) -> Callable[[int], Any]:
        call = jax.jit(functools.partial(function, problem, chosen=chosen))
        call = call.lower(*arguments).compile()

        def run(count: int) -> None:
            for _ in range(count):
                result = call(*arguments)
            jax.block_until_ready(result)

        run(1)
        return run

    return {name: functools.partial(compiled, *launch) for name, launch in launches.items()}


class Tuned(NamedTuple):
    """How an implementation's kernels are tuned."""

    candidates: Callable[[Any], list[Any]]
    """dtype -> sizes worth a try, tuples of integers"""
    kernels: Callable[[Problem, Operands, jax.Array], dict[str, Launch]]
    """(problem, operands, dout) -> each kernel by name: sizes -> a compiled call"""


IMPLEMENTATIONS = {"portable": Tuned(portable_candidates, portable_kernels)}


def fastest(launch: Launch, candidates: list[Any], rounds: int, count: int) -> tuple[Any, float]:
    """The candidate with the least median, and that median in milliseconds."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {chosen: pool.submit(launch, chosen) for chosen in candidates}
    runs = {}
    for chosen, future in waiting.items():
        if future.exception() is None:
            runs[chosen] = future.result()
        else:  # too large for the card, in one of several ways
            print(f"    {tuple(chosen)}: {type(future.exception()).__name__}", flush=True)
    taken = {chosen: [timed(run, count) for _ in range(3)] for chosen, run in runs.items()}
    best = sorted(runs, key=lambda chosen: statistics.median(taken[chosen]))[:5]
    for _ in range(rounds):
        for chosen in best:
            taken[chosen].append(timed(runs[chosen], count))
    winner = min(best, key=lambda chosen: statistics.median(taken[chosen]))
    return winner, 1e3 * statistics.median(taken[winner])


def problem_of(kind: str, shape: tuple[int, ...], dtype: Any) -> tuple[Problem, Operands, Any]:
    """A problem of that kind, its random operands and the gradient of its output."""
    random = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(4))
    return *flash.state(q, k, v, mask=KINDS[kind]), dout


class Found(NamedTuple):
    """The best sizes of one kernel."""

    key: tuning.Key
    kernel: str
    sizes: list[int]
    milliseconds: float


def search(options: argparse.Namespace) -> Iterator[Found]:
    """Tunes one kernel after another, and writes each row when it is whole."""
    until = time.monotonic() + 60 * options.minutes
    tuned = dict(tuning.table(options.out)) if options.out.exists() else {}
    for implementation, dtype, width, kind in itertools.product(
        options.implementations, options.dtypes, options.widths, KINDS
    ):
        shape = (options.batch, options.time, max(1, options.model_width // width), width)
        problem, operands, dout = problem_of(kind, shape, dtype)
        key = tuning.key(implementation, problem, operands)
        assert key.mask == kind
        how = IMPLEMENTATIONS[implementation]
        sizes, candidates = {}, how.candidates(jnp.dtype(dtype))[: options.candidates]
        for name, launch in how.kernels(problem, operands, dout).items():
            if time.monotonic() > until:
                print("the minutes are over", flush=True)
                return
            winner, milliseconds = fastest(launch, candidates, options.rounds, options.count)
            sizes[name] = list(winner)
            yield Found(key, name, sizes[name], milliseconds)
        tuned[key] = sizes
        tuning.write(tuned, options.out)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--time", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--model-width", type=int, default=2048, help="heads x width")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=10, help="calls in a turn")
    parser.add_argument("--candidates", type=int, help="try the first so many only")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=tuning.PATH)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(
            f"tune_attention: block sizes are measured on a GPU, and this is a {device.device_kind}"
        )
    for found in search(options):
        print(f"{found.key}: {found.kernel} {found.sizes} {found.milliseconds:.3f} ms", flush=True)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
