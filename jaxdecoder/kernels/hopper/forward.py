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
from jaxdecoder.kernels.hopper.launch import (
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


class _Memory(NamedTuple):
    """Shared memory; what is not a ring, and the ring `queries`, is one a compute warpgroup."""

    queries: Ring
    keys: Ring
    values: Ring
    logsumexp: Any
    stage: Any
    turn: Any


def _memory(launch: Launch) -> _Memory:
    if launch.consumers != 2 and launch.sizes.turns != "none":
        raise ValueError(f"{launch.sizes}: only two warpgroups take turns")
    return _Memory(
        queries=launch.own(q=launch.owned(), segments=launch.owned_segments()),
        keys=launch.ring(k=launch.streamed(), segments=launch.streamed_segments()),
        values=launch.ring(v=launch.streamed()),
        logsumexp=tiles.vector(launch.consumers, ROWS),
        stage=launch.stage(),
        turn=plgpu.Barrier(num_arrivals=launch.consumers),
    )


def _load(launch: Launch, arrays: Arrays, work: Work, at: At, memory: _Memory) -> None:
    for warpgroup in range(launch.consumers):
        queries = launch.rows(at, warpgroup)
        memory.queries.fill(
            warpgroup,
            q=arrays.q.at[at.batch, queries, at.head],
            segments=launch.segments(arrays.q_segments, at.batch, queries),
        )
    stream_keys(launch, arrays, work, at, memory.keys, memory.values)


class _Turn(NamedTuple):
    """Whose the tensor cores are: of two warpgroups, one multiplies while the other does not."""

    barrier: Any
    kind: str
    """See `Sizes.turns`."""

    def _arrive(self) -> None:
        plgpu.barrier_arrive(self.barrier)

    def _wait(self) -> None:
        plgpu.barrier_wait(self.barrier)

    def pass_over(self) -> None:
        """Lets the other one multiply; it says the same when it is done with its scores."""
        if self.kind != "none":
            self._arrive()
            self._wait()

    def issued(self) -> None:
        """While a product of scores is under way."""
        if self.kind == "early":
            self._arrive()

    def multiplied(self) -> None:
        """Once it is there."""
        if self.kind == "early":
            self._wait()
        elif self.kind == "late":
            self.pass_over()

    def weighed(self) -> None:
        """Once there are weights to multiply values with."""
        if self.kind != "none":
            self._arrive()

    def take(self) -> None:
        """Before they are."""
        if self.kind != "none":
            self._wait()


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
    turn = _Turn(memory.turn, launch.sizes.turns)
    stage = tiles.part(memory.stage, warpgroup)

    def factors(n: Any) -> Product:
        return Product(owned["q"], tiles.transposed(memory.keys.take(n)["k"]))

    def release_keys(n: Any) -> None:
        """Once their product is there, unless their segments are still to be read."""
        if not launch.segmented:
            memory.keys.release(n)

    def multiply(n: Any) -> Any:
        [products] = tiles.multiply(factors(n), stage=stage, issued=turn.issued)
        release_keys(n)
        turn.multiplied()
        return products

    def softmax(check: bool, step: Step, products: Any, carry: Any) -> Any:
        """The carry of the step, and its weights."""
        n = step.number
        largest, total, mixed = carry
        k_start = jnp.int32(0)
        if check or head.needs_index:
            k_start = column_of(work, at, step) * launch.k_block
        segments = owned.get("segments"), memory.keys.held(n).get("segments")
        tile = tiles.Tile(head, queries.start, k_start, shape, 0, *segments)
        s, factor = tile.base_two_scores(products)
        if check:
            s = jnp.where(tile.allowed(), s, -jnp.inf)
        if launch.segmented:
            memory.keys.release(n)
        # Scaled after the maximum is sought: the difference below is then one instruction.
        higher = jnp.maximum(largest, jnp.max(s, axis=1) * factor)
        base = jnp.where(higher == -jnp.inf, 0.0, higher)
        weights = jnp.exp2(s * factor - tiles.spread(base, 0, shape))
        shrink = jnp.exp2(largest - base)
        total = total * shrink + jnp.sum(weights, axis=1)
        mixed = mixed * tiles.spread(shrink, 0, mixed.shape)
        weights = tile.dropout()(weights).astype(launch.dtype)
        higher, total, mixed, weights = lax.optimization_barrier((higher, total, mixed, weights))
        return (higher, total, mixed), weights

    def visit(check: bool, step: Step, carry: Any) -> Any:
        n = step.number
        (largest, total, mixed), weights = softmax(check, step, multiply(n), carry)
        turn.weighed()
        v = memory.values.take(n)["v"]
        turn.take()
        [mixed] = tiles.multiply(Product(weights, v, mixed), stage=stage)
        memory.values.release(n)
        return largest, total, mixed

    def visit_ahead(check: bool, step: Step, carry: Any, products: Any, more: bool) -> Any:
        n = step.number
        (largest, total, mixed), weights = softmax(check, step, products, carry)
        turn.weighed()
        v = memory.values.take(n)["v"]
        following = [factors(n + 1)] if more else []
        turn.take()
        issued = turn.issued if more else lambda: None
        mixed, *found = tiles.multiply(
            Product(weights, v, mixed), *following, stage=stage, issued=issued
        )
        memory.values.release(n)
        if more:
            release_keys(n + 1)
            turn.multiplied()
        return (largest, total, mixed), (found[0] if more else None)

    # The second warpgroup stays half a step behind the first.
    pl.when(warpgroup == 1)(turn.pass_over)
    rows = tiles.zeros(ROWS)
    carry = rows - jnp.inf, rows, tiles.zeros(ROWS, launch.width)
    if launch.sizes.rotated:
        carry = walk_ahead(work, at, 1, lambda _: multiply(jnp.int32(0)), visit_ahead, carry)
    else:
        carry = walk(work, at, 1, visit, carry)
    largest, total, mixed = carry
    pl.when(warpgroup == 0)(turn.pass_over)

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
    # Shared memory must outlast its being read; what is written is there when the kernel ends.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


FORWARD = Kernel("attention_forward", _memory, _load, _compute)
