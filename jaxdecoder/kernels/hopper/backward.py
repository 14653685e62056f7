"""The backward kernels, FlashAttention-2's two passes (arXiv 2307.08691) with `wgmma` throughout.

One pass owns queries and streams keys and values past them, for the gradient of the queries and of
the score's learned numbers. The other owns keys and streams the queries of all heads that share
them. Both compute the attention weights again from the logarithms of their sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels.hopper import tiles
from jaxdecoder.kernels.hopper.launch import (
    TOTALS,
    At,
    Kernel,
    Launch,
    Step,
    column_of,
    stream_keys,
    walk,
    walk_ahead,
)
from jaxdecoder.kernels.hopper.tiles import ROWS, Arrays, Product, Ring, Work


class _QueriesMemory(NamedTuple):
    """Shared memory; what is not a ring, and the ring `queries`, is one a compute warpgroup."""

    queries: Ring
    keys: Ring
    values: Ring
    stage: Any
    learned: Any


def _queries_memory(launch: Launch) -> _QueriesMemory:
    n = launch.learned_numbers()
    return _QueriesMemory(
        queries=launch.own(
            q=launch.owned(),
            dout=launch.owned(),
            numbers=tiles.vector(launch.consumers, 2 + launch.segmented, ROWS, dtype=jnp.int32),
        ),
        keys=launch.ring(k=launch.streamed(), segments=launch.streamed_segments()),
        values=launch.ring(v=launch.streamed()),
        stage=launch.stage(),
        learned=tiles.vector(launch.consumers, n, ROWS) if n else None,
    )


def _queries_load(
    launch: Launch, arrays: Arrays, work: Work, at: At, memory: _QueriesMemory
) -> None:
    for warpgroup in range(launch.consumers):
        queries = launch.rows(at, warpgroup)
        memory.queries.fill(
            warpgroup,
            q=arrays.q.at[at.batch, queries, at.head],
            dout=arrays.dout.at[at.batch, queries, at.head],
            numbers=arrays.of_queries.at[at.batch, at.head, :, queries],
        )
    stream_keys(launch, arrays, work, at, memory.keys, memory.values)


def _queries_compute(
    launch: Launch,
    arrays: Arrays,
    work: Work,
    here: Callable[[], At],
    memory: _QueriesMemory,
    warpgroup: Any,
    results: Any,
) -> None:
    at = here()
    shape = ROWS, launch.k_block
    queries = launch.rows(at, warpgroup)
    head = launch.head(arrays, at.batch, at.head)
    owned = memory.queries.take(warpgroup)
    numbers = owned["numbers"]
    logsumexp, delta = (tiles.floats_along(0, numbers.at[i]) for i in range(2))

    stage = tiles.part(memory.stage, warpgroup)

    drops = launch.problem.dropout

    def factors(n: Any) -> tuple[Product, Product]:
        """Of the products, and of the gradients of the weights less `delta`."""
        k, v = memory.keys.take(n)["k"], memory.values.take(n)["v"]
        start = None if drops else tiles.spread(-delta, 0, shape)
        return (
            Product(owned["q"], tiles.transposed(k)),
            Product(owned["dout"], tiles.transposed(v), start),
        )

    def multiply(n: Any) -> Any:
        found = tiles.multiply(*factors(n), stage=stage)
        memory.values.release(n)
        return found

    def gradient(check: bool, step: Step, products: Any, sums: Any) -> Any:
        """That of the scores, and the sums with this step in them."""
        products, dweights = products
        k_start = jnp.int32(0)
        if check or head.needs_index:
            k_start = column_of(work, at, step) * launch.k_block
        segments = launch.segments_of(numbers), memory.keys.held(step.number).get("segments")
        tile = tiles.Tile(head, queries.start, k_start, shape, 0, *segments)
        s, factor, pull = tile.scores(check, products, learned=True)
        weights = jnp.exp2(s * factor - tiles.spread(logsumexp, 0, shape))
        if drops:
            dweights = tile.dropout()(dweights) - tiles.spread(delta, 0, shape)
        ds = weights * dweights
        ds, terms = pull(ds)
        return ds, [total + jnp.sum(term, axis=1) for total, term in zip(sums, terms, strict=True)]

    def factor(ds: jax.Array, n: Any, dq: jax.Array) -> Product:
        return Product(ds.astype(launch.dtype), memory.keys.held(n)["k"], dq)

    def visit(check: bool, step: Step, carry: Any) -> Any:
        n = step.number
        dq, sums = carry
        ds, sums = gradient(check, step, multiply(n), sums)
        [dq] = tiles.multiply(factor(ds, n, dq), stage=stage)
        memory.keys.release(n)
        return dq, sums

    def visit_ahead(check: bool, step: Step, carry: Any, products: Any, more: bool) -> Any:
        n = step.number
        dq, sums = carry
        ds, sums = gradient(check, step, products, sums)
        following = factors(n + 1) if more else ()
        dq, *found = tiles.multiply(factor(ds, n, dq), *following, stage=stage)
        memory.keys.release(n)
        if more:
            memory.values.release(n + 1)
        return (dq, sums), found

    carry = (
        tiles.zeros(ROWS, launch.width),
        [tiles.zeros(ROWS) for _ in range(launch.learned_numbers())],
    )
    if launch.sizes.rotated:
        carry = walk_ahead(work, at, 1, lambda _: multiply(jnp.int32(0)), visit_ahead, carry)
    else:
        carry = walk(work, at, 1, visit, carry)
    dq, sums = carry

    # Where the queries were there is room for their gradient.
    at = here()
    queries = launch.rows(at, warpgroup)
    out = owned["q"]
    out[...] = (dq * launch.problem.scale).astype(launch.dtype)
    for i, total in enumerate(sums):
        memory.learned.at[warpgroup, i][...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, results[0].at[at.batch, queries, at.head])
    if sums:
        place = results[1].at[at.batch, at.head, :, queries]
        plgpu.copy_smem_to_gmem(memory.learned.at[warpgroup], place)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _KeysMemory(NamedTuple):
    """Shared memory; what is not a ring, and the ring `keys`, is one a compute warpgroup."""

    keys: Ring
    queries: Ring
    douts: Ring
    stage: Any
    shared: Any
    """A `_Shared`, where one kernel does it all."""


class _Shared(NamedTuple):
    """How compute warpgroups make the gradient of the queries out of all their keys: each for its
    share of the width, once everyone's gradients of scores are there."""

    ds: Any
    """(consumers, ROWS, columns)"""
    dq: Any
    """float32 (consumers, columns, width / consumers)"""
    written: Any
    read: Any


def _keys_memory(wanted: str, launch: Launch) -> _KeysMemory:
    columns, depth = launch.sizes[:2]
    return _KeysMemory(
        keys=launch.own(k=launch.owned(), v=launch.owned(), segments=launch.owned_segments()),
        queries=launch.ring(
            q=launch.streamed(),
            numbers=tiles.vector(depth, 2 + launch.segmented, columns, dtype=jnp.int32),
        ),
        douts=launch.ring(dout=launch.streamed()),
        stage=launch.stage(),
        shared=_shared(launch) if "q" in wanted else None,
    )


def _shared(launch: Launch) -> _Shared:
    n, columns = launch.consumers, launch.sizes.columns
    return _Shared(
        ds=tiles.matrix(n, ROWS, columns, dtype=launch.dtype),
        dq=tiles.matrix(n, columns, launch.width // n, dtype=jnp.float32),
        written=plgpu.Barrier(num_arrivals=n),
        read=plgpu.Barrier(num_arrivals=n),
    )


def _keys_load(launch: Launch, arrays: Arrays, work: Work, at: At, memory: _KeysMemory) -> None:
    for warpgroup in range(launch.consumers):
        keys = launch.rows(at, warpgroup)
        memory.keys.fill(
            warpgroup,
            k=arrays.k.at[at.batch, keys, at.head],
            v=arrays.v.at[at.batch, keys, at.head],
            segments=launch.segments(arrays.k_segments, at.batch, keys),
        )

    def fill(check: bool, step: Step, _: None) -> None:
        head = at.head * launch.group + step.member
        queries = pl.ds(column_of(work, at, step) * launch.q_block, launch.q_block)
        memory.queries.fill(
            step.number,
            q=arrays.q.at[at.batch, queries, head],
            numbers=arrays.of_queries.at[at.batch, head, :, queries],
        )
        memory.douts.fill(step.number, dout=arrays.dout.at[at.batch, queries, head])

    walk(work, at, launch.group, fill)
    steps = work.counts[at.lists, at.row] * launch.group
    memory.queries.drain(steps)
    memory.douts.drain(steps)


def _keys_compute(
    wanted: str,
    launch: Launch,
    arrays: Arrays,
    work: Work,
    here: Callable[[], At],
    memory: _KeysMemory,
    warpgroup: Any,
    results: Any,
) -> None:
    at = here()
    shape = ROWS, launch.q_block
    keys = launch.rows(at, warpgroup)
    for i in range(launch.consumers) if "q" in wanted else (warpgroup,):
        memory.keys.take(i)
    owned = memory.keys.held(warpgroup)
    stage = tiles.part(memory.stage, warpgroup)

    def head_of(member: Any) -> Any:
        return launch.head(arrays, at.batch, at.head * launch.group + member)

    only_head = head_of(0) if launch.group == 1 else None

    drops = launch.problem.dropout

    def factors(n: Any) -> Product:
        return Product(owned["k"], tiles.transposed(memory.queries.take(n)["q"]))

    def show(n: Any, ds: jax.Array) -> Any:
        """Shared memory that holds this, once all warpgroups' is there; it leaves the registers."""
        shared = memory.shared

        @pl.when(n > 0)
        def _until_all_have_read() -> None:
            plgpu.barrier_wait(shared.read)

        mine = shared.ds.at[warpgroup]
        mine[...] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.written)
        plgpu.barrier_wait(shared.written)
        return mine

    def of_queries() -> Product:
        """This warpgroup's share of the gradient of the queries of a step."""
        pairs = [
            (
                tiles.transposed(memory.shared.ds.at[i]),
                memory.keys.held(i)["k"].at[:, share(warpgroup)],
            )
            for i in range(launch.consumers)
        ]
        return Product(*pairs[0], more=tuple(pairs[1:]))

    def share(warpgroup: Any) -> Any:
        """Of the width."""
        width = launch.width // launch.consumers
        return pl.ds(warpgroup * width, width)

    def add_to_queries(step: Step, dq: jax.Array) -> None:
        shared, part = memory.shared, memory.shared.dq.at[warpgroup]
        plgpu.barrier_arrive(shared.read)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        part[...] = dq * launch.problem.scale
        plgpu.commit_smem()
        queries = pl.ds(column_of(work, at, step) * launch.q_block, launch.q_block)
        head = at.head * launch.group + step.member
        launch.add(part, results[-1].at[at.batch, queries, head, share(warpgroup)])

    def visit(check: bool, step: Step, sums: Any, products: Any = None, more: bool = False) -> Any:
        """The sums with this step in them; and, if there are `more` steps, the next products."""
        n, sums = step.number, dict(sums)
        if products is None:
            products = tiles.multiply(factors(n), stage=stage)
        [products] = products
        head = head_of(step.member) if only_head is None else only_head
        q_start = jnp.int32(0)
        if check or head.needs_index:
            q_start = column_of(work, at, step) * launch.q_block
        queries = memory.queries.held(n)
        numbers = queries["numbers"]
        segments = launch.segments_of(numbers), owned.get("segments")
        tile = tiles.Tile(head, q_start, keys.start, shape, 1, *segments)
        s, factor, pull = tile.scores(check, products, learned=False)
        weights = jnp.exp2(
            s * factor - tiles.spread(tiles.floats_along(1, numbers.at[0]), 1, shape)
        )
        dropped = tile.dropout()
        rounded = weights.astype(launch.dtype)
        dout = memory.douts.take(n)["dout"]
        delta = numbers.at[1]
        of_weights, last = [], []
        if "k" in wanted:
            start = None if drops else tiles.spread(-tiles.floats_along(1, delta), 1, shape)
            of_weights = [Product(owned["v"], tiles.transposed(dout), start)]
        elif more:
            last = [factors(n + 1)]
        if "v" in wanted:
            of_values = Product(dropped(weights).astype(launch.dtype), dout, sums["v"])
            sums["v"], *found = tiles.multiply(of_values, *of_weights, *last, stage=stage)
        else:
            found = tiles.multiply(*of_weights, stage=stage)
        memory.douts.release(n)
        if "k" in wanted:
            # Half as many registers hold them while the products are under way.
            weights = lax.optimization_barrier(rounded).astype(jnp.float32)
            [dweights] = found
            if drops:
                dweights = dropped(dweights) - tiles.spread(tiles.floats_along(1, delta), 1, shape)
            ds, _ = pull(weights * dweights)
            ds, last = ds.astype(launch.dtype), [factors(n + 1)] if more else []
            if "q" in wanted:
                ds = show(n, ds)
                last.insert(0, of_queries())
            sums["k"], *found = tiles.multiply(
                Product(ds, queries["q"], sums["k"]), *last, stage=stage
            )
            if "q" in wanted:
                dq, *found = found
                add_to_queries(step, dq)
        memory.queries.release(n)
        return (sums, found) if launch.sizes.rotated else sums

    owns = wanted.replace("q", "")
    sums = {name: tiles.zeros(ROWS, launch.width) for name in owns}
    if launch.sizes.rotated:

        def begin(_: Any) -> Any:
            return tiles.multiply(factors(jnp.int32(0)), stage=stage)

        sums = walk_ahead(work, at, launch.group, begin, visit, sums)
    else:
        sums = walk(work, at, launch.group, visit, sums)

    if "q" in wanted:
        # Nobody's keys are overwritten while the other one still multiplies with them.
        steps = work.counts[at.lists, at.row] * launch.group
        pl.when(steps > 0)(lambda: plgpu.barrier_wait(memory.shared.read))

    # Where the keys and values were there is room for their gradients.
    at = here()
    keys = launch.rows(at, warpgroup)
    scales = {"k": launch.problem.scale, "v": 1.0}
    for name in owns:
        owned[name][...] = (sums[name] * scales[name]).astype(launch.dtype)
    plgpu.commit_smem()
    for name, out in zip(owns, results, strict=False):
        plgpu.copy_smem_to_gmem(owned[name], out.at[at.batch, keys, at.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


QUERIES = Kernel("attention_queries_gradient", _queries_memory, _queries_load, _queries_compute)
# By what they compute: both gradients of wide heads do not fit into the registers.
KEYS = {
    wanted: Kernel(
        f"attention_{name}_gradient",
        functools.partial(_keys_memory, wanted),
        _keys_load,
        functools.partial(_keys_compute, wanted),
        rows_are_keys=True,
    )
    for wanted, name in {
        "kv": "keys_and_values",
        "k": "keys",
        "v": "values",
        **({"qkv": "whole"} if TOTALS else {}),
    }.items()
}
