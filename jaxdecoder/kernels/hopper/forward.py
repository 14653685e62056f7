"""The forward kernel: FlashAttention-3's division of labour (arXiv 2407.08608), any mask and score.

Of a block's three warpgroups one copies keys and values ahead, and each of the others attends from
64 queries. Those two take turns: one multiplies matrices while the other takes exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels.hopper import tiles
from jaxdecoder.kernels.hopper.launch import At, Kernel, Launch, Step, stream_keys, walk
from jaxdecoder.kernels.hopper.tiles import CONSUMERS, ROWS, Arrays, Ring, Work


class _Memory(NamedTuple):
    """Shared memory; what is not a ring, and the ring `queries`, is one a compute warpgroup."""

    queries: Ring
    keys: Ring
    values: Ring
    logsumexp: Any
    stage: Any
    turn: Any


def _memory(launch: Launch, arrays: Arrays) -> _Memory:
    depth = launch.sizes.depth
    return _Memory(
        queries=Ring.of(CONSUMERS, q=launch.owned(), segments=launch.owned_segments()),
        keys=Ring.of(depth, k=launch.streamed(), segments=launch.streamed_segments()),
        values=Ring.of(depth, v=launch.streamed()),
        logsumexp=tiles.vector(CONSUMERS, ROWS),
        stage=launch.stage(),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
    )


def _load(launch: Launch, arrays: Arrays, work: Work, at: At, memory: _Memory) -> None:
    for warpgroup in range(CONSUMERS):
        queries = launch.rows(at, warpgroup)
        memory.queries.fill(
            warpgroup,
            q=arrays.q.at[at.batch, queries, at.head],
            segments=launch.segments(arrays.q_segments, at.batch, queries),
        )
    stream_keys(launch, arrays, work, at, memory.keys, memory.values)


def _compute(
    launch: Launch,
    arrays: Arrays,
    work: Work,
    here: Callable[[], At],
    memory: _Memory,
    warpgroup: Any,
    results: Any,
) -> None:
    at = here()
    shape = ROWS, launch.k_block
    queries = launch.rows(at, warpgroup)
    head = launch.head(arrays, at.batch, at.head)
    owned = memory.queries.take(warpgroup)

    def take_turn() -> None:
        plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.turn)

    def visit(check: bool, step: Step, carry: Any) -> Any:
        n = step.number
        largest, total, mixed = carry
        k_start = jnp.int32(0)
        if check or head.needs_index:
            k_start = work.indices[at.row, step.column] * launch.k_block
        keys = memory.keys.take(n)
        [products] = tiles.multiply((owned["q"], tiles.transposed(keys["k"])))
        segments = owned.get("segments"), keys.get("segments")
        tile = tiles.Tile(head, queries.start, k_start, shape, 0, *segments)
        if not launch.segmented:
            memory.keys.release(n)
        take_turn()

        s = tile.base_two_scores(products)
        if check:
            s = jnp.where(tile.allowed(), s, -jnp.inf)
        if launch.segmented:
            memory.keys.release(n)
        higher = jnp.maximum(largest, jnp.max(s, axis=1))
        base = jnp.where(higher == -jnp.inf, 0.0, higher)
        weights, shrink = jnp.exp2(s - tiles.spread(base, 0, shape)), jnp.exp2(largest - base)
        total = total * shrink + jnp.sum(weights, axis=1)
        mixed = mixed * tiles.spread(shrink, 0, mixed.shape)
        weights = tile.dropout()(weights).astype(launch.dtype)
        higher, total, mixed, weights = lax.optimization_barrier((higher, total, mixed, weights))

        plgpu.barrier_arrive(memory.turn)
        v = memory.values.take(n)["v"]
        plgpu.barrier_wait(memory.turn)
        [mixed] = tiles.add_product(mixed, weights, v, stage=tiles.part(memory.stage, warpgroup))
        memory.values.release(n)
        return higher, total, mixed

    # The second warpgroup stays half a step behind the first.
    pl.when(warpgroup == 1)(take_turn)
    rows = tiles.zeros(ROWS)
    carry = rows - jnp.inf, rows, tiles.zeros(ROWS, launch.width)
    largest, total, mixed = walk(work, at.row, 1, visit, carry)
    pl.when(warpgroup == 0)(take_turn)

    at = here()
    queries = launch.rows(at, warpgroup)
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    # Where the queries were there is room for what they attend to.
    out, logsumexp = owned["q"], memory.logsumexp.at[warpgroup]
    out[...] = (mixed * tiles.spread(1.0 / divisor, 0, mixed.shape)).astype(launch.dtype)
    logsumexp[...] = jnp.where(some, largest + jnp.log2(divisor), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, results[0].at[at.batch, queries, at.head])
    plgpu.copy_smem_to_gmem(logsumexp, results[1].at[at.batch, at.head, queries])
    plgpu.wait_smem_to_gmem(0)


KERNEL = Kernel("attention_forward", _memory, _load, _compute)
