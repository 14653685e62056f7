"""Finds the best block sizes of our attention kernels on this card, for `kernels/tuned.json`.

    python -m benchmarks.tune_attention [--widths 64 128] [--dtypes bfloat16] [--time 8192]
    python -m benchmarks.tune_attention --minutes 2 --out tuned.json

Every kernel is timed alone with every candidate; all of them take turns, and the medians decide.
Sizes that do not compile, do not fit the card or give other values than plain XLA are passed over.
Rows of other cards are kept. A row is written when all of its kernels have their sizes; when the
minutes are over, no other kernel is begun.
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

from benchmarks import hopper_variants
from benchmarks.attention import timed
from jaxdecoder.kernels import chunked, flash, hopper, masks, portable, tuning
from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.problem import Operands, Problem

# Of arrays in half precision, relative to their norm.
LARGEST_DISTANCE = 0.02

# One mask for each kind that `tuning.mask_kind` tells apart.
KINDS = {
    "full": masks.causal(),
    "partial": masks.causal() & (masks.sliding_window(128) | masks.strided(128)),
}
# What is tuned for the Hopper kernels must be quick to compute (`hopper.is_plain`).
PLAIN_KINDS = {**KINDS, "partial": masks.causal() & masks.sliding_window(128)}

Arrays = dict[str, jax.Array]
Kernel = tuple[Callable[..., Arrays], tuple[Any, ...]]
"""(*arguments, sizes) -> what a kernel computes, by name; and its arguments, which are arrays."""


class Call(NamedTuple):
    """A compiled kernel."""

    run: Callable[[int], None]
    """Computes that many times, and waits."""
    found: Arrays


def compiled(kernel: Kernel, sizes: Any) -> Call:
    """With sizes that may be too large for the card: whatever is raised then."""
    function, arguments = kernel
    call = jax.jit(functools.partial(function, sizes=sizes)).lower(*arguments).compile()

    def run(count: int) -> None:
        for _ in range(count):
            result = call(*arguments)
        jax.block_until_ready(result)

    return Call(run, call(*arguments))


# --- The implementations -----------------------------------------------------------------------


def portable_candidates(kernel: str, problem: Problem, operands: Operands) -> list[portable.Sizes]:
    """Sizes worth a try; float32 has no matrix unit here, and its blocks must be small."""
    single = operands.q.dtype == jnp.float32
    queries, keys = ((16, 32, 64), (16, 32)) if single else ((64, 128), (32, 64, 128))
    stages = (1, 2) if single else (2, 3)
    return [portable.Sizes(*sizes) for sizes in itertools.product(queries, keys, (4, 8), stages)]


def portable_kernels(problem: Problem, known: Known) -> dict[str, Kernel]:
    gradients = known.operands, portable.Known.of(known.out, known.logsumexp, known.dout)

    def forward(operands: Operands, sizes: Any) -> Arrays:
        return {"out": portable.forward(problem, operands, sizes)[0]}

    def queries(*arguments: Any, sizes: Any) -> Arrays:
        return {"q": portable.gradient_of_queries(problem, *arguments, sizes)[0]}

    def keys(*arguments: Any, sizes: Any) -> Arrays:
        return dict(zip("kv", portable.gradient_of_keys(problem, *arguments, sizes), strict=True))

    return {
        "forward": (forward, (known.operands,)),
        "queries": (queries, gradients),
        "keys": (keys, gradients),
    }


def hopper_kernels(problem: Problem, known: Known) -> dict[str, Kernel]:
    rows = hopper.rows_of_queries(known.operands, known.out, known.logsumexp, known.dout)
    gradients = (known.operands, known.dout, rows)

    def forward(operands: Operands, sizes: Any) -> Arrays:
        return {"out": hopper.forward(problem, operands, chosen=sizes)[0]}

    def queries(*arguments: Any, sizes: Any) -> Arrays:
        return {"q": hopper.gradient_of_queries(problem, *arguments, chosen=sizes)[0]}

    def keys(wanted: str, *arguments: Any, sizes: Any) -> Arrays:
        return hopper.gradient_of_keys(problem, *arguments, wanted, chosen=sizes)

    return {
        "forward": (forward, (known.operands,)),
        "queries": (queries, gradients),
        **{name: (functools.partial(keys, name), gradients) for name in hopper.KEYS},
    }


class Tuned(NamedTuple):
    """How an implementation's kernels are tuned."""

    candidates: Callable[[str, Problem, Operands], list[Any]]
    """(kernel, problem, operands) -> sizes worth a try"""
    kernels: Callable[[Problem, Known], dict[str, Kernel]]
    """Each kernel by name."""
    kinds: dict[str, masks.Mask]
    whole: tuple[tuple[str, ...], ...]
    """Kernels that do all together; if there are several ways, the quickest is taken."""
    unordered: tuple[tuple[str, ...], ...] = ()
    """Further ways, whose last digits differ from run to run."""


IMPLEMENTATIONS = {
    "hopper": Tuned(
        hopper_variants.candidates,
        hopper_kernels,
        PLAIN_KINDS,
        (("forward", "queries", "kv"), ("forward", "queries", "k", "v")),
        (("forward", "qkv"),),
    ),
    "portable": Tuned(portable_candidates, portable_kernels, KINDS, (portable.KERNELS,)),
}


# --- The measurement ---------------------------------------------------------------------------


class Known(NamedTuple):
    """A problem's random operands, and what another implementation makes of them."""

    operands: Operands
    dout: jax.Array
    out: jax.Array
    logsumexp: jax.Array
    right: Arrays
    """The output and the gradients of q, k and v, by `out` and those names."""


def problem_of(mask: masks.Mask, shape: tuple[int, ...], dtype: Any) -> tuple[Problem, Known]:
    """Attention in random data of that shape, (batch, time, heads, width)."""
    random = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(4))
    problem, operands = flash.state(q, k, v, mask=mask)
    out, logsumexp = jax.jit(functools.partial(chunked.forward, problem))(operands)
    gradients = jax.jit(functools.partial(chunked.backward, problem))(
        operands, out, logsumexp, dout
    )
    right = {"out": out, "q": gradients.q, "k": gradients.k, "v": gradients.v}
    return problem, Known(operands, dout, out, logsumexp, right)


def is_right(found: Arrays, right: Arrays) -> bool:
    """Whether half precision may make of the one the other."""

    def distance(name: str) -> float:
        a, b = (np.asarray(x[name], np.float32) for x in (found, right))
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return all(distance(name) <= LARGEST_DISTANCE for name in found)


def fastest(
    kernel: Kernel, candidates: list[Any], right: Arrays, rounds: int, count: int
) -> tuple[Any, float] | None:
    """The right candidate with the least median, and that median in milliseconds."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {sizes: pool.submit(compiled, kernel, sizes) for sizes in candidates}
    runs = {}
    for sizes, future in waiting.items():
        if future.exception() is not None:  # too large for the card, in one of several ways
            print(f"    {tuple(sizes)}: {type(future.exception()).__name__}", flush=True)
        elif not is_right(future.result().found, right):
            print(f"    {tuple(sizes)}: wrong values", flush=True)
        else:
            runs[sizes] = future.result().run
    taken = {sizes: [timed(run, count) for _ in range(3)] for sizes, run in runs.items()}
    best = sorted(runs, key=lambda sizes: statistics.median(taken[sizes]))[:5]
    for _ in range(rounds):
        for sizes in best:
            taken[sizes].append(timed(runs[sizes], count))
    if not best:
        return None
    winner = min(best, key=lambda sizes: statistics.median(taken[sizes]))
    return winner, 1e3 * statistics.median(taken[winner])


def chosen_of(how: Tuned, found: dict[str, Found], unordered: bool) -> dict[str, list[Any]] | None:
    """The sizes of the quickest way to do it all, if any is whole."""
    ways = [*how.whole, *(how.unordered if unordered else ())]
    whole = [way for way in ways if all(name in found for name in way)]
    if not whole:
        return None
    best = min(whole, key=lambda way: sum(found[name].milliseconds for name in way))
    return {name: found[name].sizes for name in best}


class Found(NamedTuple):
    """The best sizes of one kernel."""

    key: tuning.Key
    kernel: str
    sizes: list[Any]
    milliseconds: float


def search(options: argparse.Namespace) -> Iterator[Found]:
    """Tunes one kernel after another, and writes each row when it is whole."""
    until = time.monotonic() + 60 * options.minutes
    tuned = dict(tuning.table(options.out)) if options.out.exists() else {}
    for dtype, width, implementation in itertools.product(
        options.dtypes, options.widths, options.implementations
    ):
        how = IMPLEMENTATIONS[implementation]
        for kind, mask in how.kinds.items():
            shape = (options.batch, options.time, max(1, options.model_width // width), width)
            problem, known = problem_of(mask, shape, dtype)
            key = tuning.key(implementation, problem, known.operands)
            assert key.mask == kind
            refuses = flash.IMPLEMENTATIONS[implementation].refuses
            why_not = refuses(problem, known.operands, current_device())
            if why_not is not None:
                print(f"{implementation} is not tuned, because {why_not}", flush=True)
                break
            found: dict[str, Found] = {}
            for name, kernel in how.kernels(problem, known).items():
                if time.monotonic() > until:
                    print("the minutes are over", flush=True)
                    return
                candidates = how.candidates(name, problem, known.operands)[: options.candidates]
                best = fastest(kernel, candidates, known.right, options.rounds, options.count)
                if best is not None:
                    found[name] = Found(key, name, list(best[0]), best[1])
                    yield found[name]
            sizes = chosen_of(how, found, options.unordered)
            if sizes is not None:
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
    parser.add_argument(
        "--unordered",
        action="store_true",
        help="also choose what adds up in any order, and differs in its last digits each time",
    )
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
