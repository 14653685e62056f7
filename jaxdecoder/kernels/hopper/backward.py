"""The backward kernels, FlashAttention-2's two passes (arXiv 2307.08691) with `wgmma` throughout.

One pass owns queries and streams keys and values past them, for the gradient of the queries and of
the score's learned numbers. The other owns keys and streams the queries of all heads that share
them. Both compute the attention weights again from the logarithms of their sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels.hopper import tiles
from jaxdecoder.kernels.hopper.launch import Kernel, Launch, walk
from jaxdecoder.kernels.hopper.tiles import ALONG_COLUMNS, ALONG_ROWS, CONSUMERS, ROWS, Arrays, Ring


class _Queries(NamedTuple):
    """Shared memory of the pass that owns queries; the first four are one a compute warpgroup."""

    q: Any
    dout: Any
    of_queries: Any
    q_segments: Any
    loaded: Any
    k: Ring
    v: Ring
    k_segments: Ring | None
    stage: Any
    learned: Any


def learned_numbers(launch: Launch, arrays: Arrays) -> int:
    """How many numbers of a head's score have a gradient."""
    pairs = zip(arrays.score, launch.problem.learned, strict=True)
    return sum(x.size // launch.heads for x, learned in pairs if learned)


def _queries_memory(launch: Launch, arrays: Arrays) -> _Queries:
    depth, columns = launch.sizes.depth, launch.sizes.columns
    owned = tiles.matrix(CONSUMERS, ROWS, launch.width, dtype=launch.dtype)
    streamed = tiles.matrix(depth, columns, launch.width, dtype=launch.dtype)
    segments = plgpu.SMEM((depth, columns), jnp.int32)
    n = learned_numbers(launch, arrays)
    return _Queries(
        q=owned,
        dout=owned,
        of_queries=plgpu.SMEM((CONSUMERS, 2, ROWS), jnp.float32),
        q_segments=plgpu.SMEM((CONSUMERS, ROWS), jnp.int32) if launch.segmented else None,
        loaded=plgpu.Barrier(num_arrivals=3 + launch.segmented, num_barriers=CONSUMERS),
        k=Ring.of(depth, streamed),
        v=Ring.of(depth, streamed),
        k_segments=Ring.of(depth, segments) if launch.segmented else None,
        stage=launch.stage(),
        learned=plgpu.SMEM((CONSUMERS, n, ROWS), jnp.float32) if n else None,
    )


def _queries_load(launch: Launch, arrays: Arrays, work: Any, at: Any, memory: _Queries) -> None:
    kv_head = lax.div(at.head, jnp.int32(launch.group))
    segment_row = launch.segment_row(at.batch)
    for w in range(CONSUMERS):
        queries = pl.ds((at.row * CONSUMERS + w) * ROWS, ROWS)
        loaded = memory.loaded.at[w]
        place = at.batch, queries, at.head
        plgpu.copy_gmem_to_smem(arrays.q.at[place], memory.q.at[w], loaded)
        plgpu.copy_gmem_to_smem(arrays.dout.at[place], memory.dout.at[w], loaded)
        numbers = arrays.of_queries.at[at.batch, at.head, :, queries]
        plgpu.copy_gmem_to_smem(numbers, memory.of_queries.at[w], loaded)
        if launch.segmented:
            source = arrays.q_segments.at[segment_row, queries]
            plgpu.copy_gmem_to_smem(source, memory.q_segments.at[w], loaded)

    def step(n: Any, _: None) -> None:
        keys = pl.ds(work.indices[at.row, n] * launch.k_block, launch.k_block)
        memory.k.fill(n, arrays.k.at[at.batch, keys, kv_head])
        memory.v.fill(n, arrays.v.at[at.batch, keys, kv_head])
        if memory.k_segments is not None:
            memory.k_segments.fill(n, arrays.k_segments.at[segment_row, keys])

    steps = work.counts[at.row]
    lax.fori_loop(0, steps, step, None)
    for ring in (memory.k, memory.v, memory.k_segments):
        if ring is not None:
            ring.drain(steps)


def attention_queries_gradient(
    launch: Launch,
    arrays: Arrays,
    work: Any,
    at: Any,
    memory: _Queries,
    warpgroup: Any,
    results: Any,
) -> None:
    shape = ROWS, launch.k_block
    start = (at.row * CONSUMERS + warpgroup) * ROWS
    head = launch.head(arrays, at.batch, at.head)
    q, dout = memory.q.at[warpgroup], memory.dout.at[warpgroup]
    stage = None if memory.stage is None else memory.stage.at[warpgroup]
    plgpu.barrier_wait(memory.loaded.at[warpgroup])
    logsumexp, delta = (
        plgpu.layout_cast(memory.of_queries[warpgroup, i], ALONG_ROWS) for i in range(2)
    )
    q_segments = None
    if memory.q_segments is not None:
        q_segments = plgpu.layout_cast(memory.q_segments[warpgroup], ALONG_ROWS)

    def step(check: bool, n: Any, carry: Any) -> Any:
        dq, sums = carry
        k_start = jnp.int32(0)
        if check or head.needs_index:
            k_start = work.indices[at.row, n] * launch.k_block
        k, v = memory.k.take(n), memory.v.take(n)
        products, dweights = tiles.multiply((q, tiles.transposed(k)), (dout, tiles.transposed(v)))
        memory.v.release(n)
        k_segments = None
        if memory.k_segments is not None:
            k_segments = plgpu.layout_cast(memory.k_segments.take(n)[...], ALONG_COLUMNS)
            memory.k_segments.release(n)
        tile = tiles.Tile(head, start, k_start, shape, 0, q_segments, k_segments)
        _, ds, parts = tile.gradients(
            check,
            products,
            dweights,
            tiles.spread(logsumexp, 0, shape),
            tiles.spread(delta, 0, shape),
            learned=True,
        )
        sums = [total + jnp.sum(part, axis=1) for total, part in zip(sums, parts, strict=True)]
        dq = tiles.add_product(dq, ds, k, stage)
        memory.k.release(n)
        return dq, sums

    n = learned_numbers(launch, arrays)
    sums = [tiles.zeros(ROWS) for _ in range(n)]
    dq, sums = walk(work, at.row, step, (tiles.zeros(ROWS, launch.width), sums))

    queries = pl.ds(start, ROWS)
    q[...] = (dq * launch.problem.scale).astype(launch.dtype)
    for i, total in enumerate(sums):
        memory.learned.at[warpgroup, i][...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, results[0].at[at.batch, queries, at.head])
    if n:
        place = results[1].at[at.batch, at.head, :, queries]
        plgpu.copy_smem_to_gmem(memory.learned.at[warpgroup], place)
    plgpu.wait_smem_to_gmem(0)


class _Keys(NamedTuple):
    """Shared memory of the pass that owns keys; the first three are one a compute warpgroup."""

    k: Any
    v: Any
    k_segments: Any
    loaded: Any
    q: Ring
    dout: Ring
    of_queries: Ring
    q_segments: Ring | None
    stage: Any


def _keys_memory(launch: Launch, arrays: Arrays) -> _Keys:
    depth, columns = launch.sizes.depth, launch.sizes.columns
    owned = tiles.matrix(CONSUMERS, ROWS, launch.width, dtype=launch.dtype)
    streamed = tiles.matrix(depth, columns, launch.width, dtype=launch.dtype)
    segments = plgpu.SMEM((depth, columns), jnp.int32)
    return _Keys(
        k=owned,
        v=owned,
        k_segments=plgpu.SMEM((CONSUMERS, ROWS), jnp.int32) if launch.segmented else None,
        loaded=plgpu.Barrier(num_arrivals=2 + launch.segmented, num_barriers=CONSUMERS),
        q=Ring.of(depth, streamed),
        dout=Ring.of(depth, streamed),
        of_queries=Ring.of(depth, plgpu.SMEM((depth, 2, columns), jnp.float32)),
        q_segments=Ring.of(depth, segments) if launch.segmented else None,
        stage=launch.stage(),
    )


def _keys_load(launch: Launch, arrays: Arrays, work: Any, at: Any, memory: _Keys) -> None:
    segment_row = launch.segment_row(at.batch)
    for w in range(CONSUMERS):
        keys = pl.ds((at.row * CONSUMERS + w) * ROWS, ROWS)
        loaded = memory.loaded.at[w]
        place = at.batch, keys, at.head
        plgpu.copy_gmem_to_smem(arrays.k.at[place], memory.k.at[w], loaded)
        plgpu.copy_gmem_to_smem(arrays.v.at[place], memory.v.at[w], loaded)
        if launch.segmented:
            source = arrays.k_segments.at[segment_row, keys]
            plgpu.copy_gmem_to_smem(source, memory.k_segments.at[w], loaded)

    count = work.counts[at.row]

    def of_head(member: Any, _: None) -> None:
        head = at.head * launch.group + member

        def step(n: Any, _: None) -> None:
            queries = pl.ds(work.indices[at.row, n] * launch.q_block, launch.q_block)
            i = member * count + n
            memory.q.fill(i, arrays.q.at[at.batch, queries, head])
            memory.of_queries.fill(i, arrays.of_queries.at[at.batch, head, :, queries])
            if memory.q_segments is not None:
                memory.q_segments.fill(i, arrays.q_segments.at[segment_row, queries])
            memory.dout.fill(i, arrays.dout.at[at.batch, queries, head])

        lax.fori_loop(0, count, step, None)

    lax.fori_loop(0, launch.group, of_head, None)
    for ring in (memory.q, memory.dout, memory.of_queries, memory.q_segments):
        if ring is not None:
            ring.drain(count * launch.group)


def attention_keys_gradient(
    launch: Launch,
    arrays: Arrays,
    work: Any,
    at: Any,
    memory: _Keys,
    warpgroup: Any,
    results: Any,
) -> None:
    shape = ROWS, launch.q_block
    start = (at.row * CONSUMERS + warpgroup) * ROWS
    k, v = memory.k.at[warpgroup], memory.v.at[warpgroup]
    stage = None if memory.stage is None else memory.stage.at[warpgroup]
    plgpu.barrier_wait(memory.loaded.at[warpgroup])
    k_segments = None
    if memory.k_segments is not None:
        k_segments = plgpu.layout_cast(memory.k_segments[warpgroup], ALONG_ROWS)
    count = work.counts[at.row]

    def of_head(member: Any, carry: Any) -> Any:
        head = launch.head(arrays, at.batch, at.head * launch.group + member)

        def step(check: bool, n: Any, carry: Any) -> Any:
            dk, dv = carry
            i = member * count + n
            q_start = jnp.int32(0)
            if check or head.needs_index:
                q_start = work.indices[at.row, n] * launch.q_block
            q, dout = memory.q.take(i), memory.dout.take(i)
            products, dweights = tiles.multiply(
                (k, tiles.transposed(q)), (v, tiles.transposed(dout))
            )
            of_queries = memory.of_queries.take(i)
            logsumexp, delta = (
                plgpu.layout_cast(of_queries[j], ALONG_COLUMNS) for j in range(2)
            )
            memory.of_queries.release(i)
            q_segments = None
            if memory.q_segments is not None:
                q_segments = plgpu.layout_cast(memory.q_segments.take(i)[...], ALONG_COLUMNS)
                memory.q_segments.release(i)
            tile = tiles.Tile(head, q_start, start, shape, 1, q_segments, k_segments)
            weights, ds, _ = tile.gradients(
                check,
                products,
                dweights,
                tiles.spread(logsumexp, 1, shape),
                tiles.spread(delta, 1, shape),
                learned=False,
            )
            dv = tiles.add_product(dv, weights, dout, stage)
            memory.dout.release(i)
            dk = tiles.add_product(dk, ds, q, stage)
            memory.q.release(i)
            return dk, dv

        return walk(work, at.row, step, carry)

    zeros = tiles.zeros(ROWS, launch.width)
    dk, dv = lax.fori_loop(0, launch.group, of_head, (zeros, zeros))

    k[...] = (dk * launch.problem.scale).astype(launch.dtype)
    v[...] = dv.astype(launch.dtype)
    plgpu.commit_smem()
    keys = pl.ds(start, ROWS)
    for ref, out in zip((k, v), results, strict=True):
        plgpu.copy_smem_to_gmem(ref, out.at[at.batch, keys, at.head])
    plgpu.wait_smem_to_gmem(0)


QUERIES = Kernel(_queries_memory, _queries_load, attention_queries_gradient)
KEYS = Kernel(_keys_memory, _keys_load, attention_keys_gradient, rows_are_keys=True)
