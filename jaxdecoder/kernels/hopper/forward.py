"""The forward kernel: FlashAttention-3's division of labour (arXiv 2407.08608), any mask and score.

Of a block's three warpgroups one copies keys and values ahead, and each of the others attends from
64 queries. Those two take turns: one multiplies matrices while the other takes exponentials.
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


class Memory(NamedTuple):
    q: Any
    """Of each compute warpgroup; then its output."""
    q_segments: Any
    q_loaded: Any
    logsumexp: Any
    k: Ring
    v: Ring
    k_segments: Ring | None
    stage: Any
    turn: Any


def _memory(launch: Launch, arrays: Arrays) -> Memory:
    depth, columns = launch.sizes.depth, launch.sizes.columns
    streamed = tiles.matrix(depth, columns, launch.width, dtype=launch.dtype)
    segments = plgpu.SMEM((depth, columns), jnp.int32)
    return Memory(
        q=tiles.matrix(CONSUMERS, ROWS, launch.width, dtype=launch.dtype),
        q_segments=plgpu.SMEM((CONSUMERS, ROWS), jnp.int32) if launch.segmented else None,
        q_loaded=plgpu.Barrier(num_arrivals=1 + launch.segmented, num_barriers=CONSUMERS),
        logsumexp=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        k=Ring.of(depth, streamed),
        v=Ring.of(depth, streamed),
        k_segments=Ring.of(depth, segments) if launch.segmented else None,
        stage=launch.stage(),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
    )


def _load(launch: Launch, arrays: Arrays, work: Any, at: Any, memory: Memory) -> None:
    """What the memory warpgroup does."""
    kv_head = lax.div(at.head, jnp.int32(launch.group))
    for w in range(CONSUMERS):
        queries = pl.ds((at.row * CONSUMERS + w) * ROWS, ROWS)
        loaded = memory.q_loaded.at[w]
        source = arrays.q.at[at.batch, queries, at.head]
        plgpu.copy_gmem_to_smem(source, memory.q.at[w], loaded)
        if launch.segmented:
            source = arrays.q_segments.at[launch.segment_row(at.batch), queries]
            plgpu.copy_gmem_to_smem(source, memory.q_segments.at[w], loaded)

    def step(n: Any, _: None) -> None:
        start = work.indices[at.row, n] * launch.sizes.columns
        keys = pl.ds(start, launch.sizes.columns)
        memory.k.fill(n, arrays.k.at[at.batch, keys, kv_head])
        if memory.k_segments is not None:
            memory.k_segments.fill(n, arrays.k_segments.at[launch.segment_row(at.batch), keys])
        memory.v.fill(n, arrays.v.at[at.batch, keys, kv_head])

    steps = work.counts[at.row]
    lax.fori_loop(0, steps, step, None)
    for ring in (memory.k, memory.v, memory.k_segments):
        if ring is not None:
            ring.drain(steps)


def attention_forward(
    launch: Launch, arrays: Arrays, work: Any, at: Any, memory: Memory, warpgroup: Any, results: Any
) -> None:
    """What a compute warpgroup does."""
    out, logsumexp = results
    shape = ROWS, launch.sizes.columns
    start = (at.row * CONSUMERS + warpgroup) * ROWS
    queries = pl.ds(start, ROWS)
    head = launch.head(arrays, at.batch, at.head)
    q = memory.q.at[warpgroup]
    stage = None if memory.stage is None else memory.stage.at[warpgroup]
    plgpu.barrier_wait(memory.q_loaded.at[warpgroup])
    q_segments = None
    if launch.segmented:
        q_segments = plgpu.layout_cast(memory.q_segments[warpgroup], ALONG_ROWS)

    def take_turn() -> None:
        plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.turn)

    def step(check: bool, n: Any, carry: Any) -> Any:
        largest, total, mixed = carry
        k_start = jnp.int32(0)
        if check or head.needs_index:
            k_start = work.indices[at.row, n] * launch.sizes.columns
        [products] = tiles.multiply((q, tiles.transposed(memory.k.take(n))))
        memory.k.release(n)
        take_turn()

        k_segments = None
        if memory.k_segments is not None:
            k_segments = plgpu.layout_cast(memory.k_segments.take(n)[...], ALONG_COLUMNS)
            memory.k_segments.release(n)
        tile = tiles.Tile(head, start, k_start, shape, 0, q_segments, k_segments)
        s = tile.base_two_scores(products)
        if check:
            s = jnp.where(tile.allowed(), s, -jnp.inf)
        higher = jnp.maximum(largest, jnp.max(s, axis=1))
        base = jnp.where(higher == -jnp.inf, 0.0, higher)
        weights, shrink = jnp.exp2(s - tiles.spread(base, 0, shape)), jnp.exp2(largest - base)
        total = total * shrink + jnp.sum(weights, axis=1)
        mixed = mixed * tiles.spread(shrink, 0, mixed.shape)
        weights = tile.dropped(weights).astype(launch.dtype)
        higher, total, mixed, weights = lax.optimization_barrier((higher, total, mixed, weights))

        plgpu.barrier_arrive(memory.turn)
        v = memory.v.take(n)
        plgpu.barrier_wait(memory.turn)
        mixed = tiles.add_product(mixed, weights, v, stage)
        memory.v.release(n)
        return higher, total, mixed

    # The second warpgroup stays half a step behind the first.
    pl.when(warpgroup == 1)(take_turn)
    rows = tiles.zeros(ROWS)
    carry = rows - jnp.inf, rows, tiles.zeros(ROWS, launch.width)
    largest, total, mixed = walk(work, at.row, step, carry)
    pl.when(warpgroup == 0)(take_turn)

    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    q[...] = (mixed * tiles.spread(1.0 / divisor, 0, mixed.shape)).astype(launch.dtype)
    sums = memory.logsumexp.at[warpgroup]
    sums[...] = jnp.where(some, largest + jnp.log2(divisor), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, out.at[at.batch, queries, at.head])
    plgpu.copy_smem_to_gmem(sums, logsumexp.at[at.batch, at.head, queries])
    plgpu.wait_smem_to_gmem(0)


KERNEL = Kernel(_memory, _load, attention_forward)
