"""The forward kernel: FlashAttention-3's division of labour (arXiv 2407.08608), any mask and score.

Of a block's three warpgroups one copies keys and values ahead, and each of the others attends from
64 queries. Those two take turns: one multiplies matrices while the other takes exponentials.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels import online
from jaxdecoder.kernels.hopper import memory
from jaxdecoder.kernels.hopper.launch import Block, Kernel, Launch, stream_keys
from jaxdecoder.kernels.hopper.memory import Product, Ring
from jaxdecoder.kernels.hopper.tiles import ROWS, Tile
from jaxdecoder.kernels.hopper.walk import Step, walk_with
from jaxdecoder.kernels.typing import Ref
from jaxdecoder.typing import Index


class _Memory(NamedTuple):
    """Shared memory; of `queries` and of what is no ring, each compute warpgroup has its own."""

    queries: Ring
    keys: Ring
    values: Ring
    logsumexp: Ref
    stage: Ref | None
    turn: Ref


def _memory(launch: Launch) -> _Memory:
    if launch.consumers != 2 and launch.sizes.turns != "none":
        raise ValueError(f"{launch.sizes}: only two warpgroups take turns")
    return _Memory(
        queries=launch.own(q=launch.owned(), segments=launch.owned_segments()),
        keys=launch.ring(k=launch.streamed(), segments=launch.streamed_segments()),
        values=launch.ring(v=launch.streamed()),
        logsumexp=memory.vector(launch.consumers, ROWS),
        stage=launch.stage(),
        turn=plgpu.Barrier(num_arrivals=launch.consumers),
    )


def _load(block: Block) -> None:
    at, launch, operands, shared = block.here(), block.launch, block.arrays.operands, block.memory
    for warpgroup in range(launch.consumers):
        queries = launch.rows(at, warpgroup)
        shared.queries.fill(
            warpgroup,
            q=operands.q.at[at.batch, queries, at.head],
            segments=launch.segments(operands.q_segments, at.batch, queries),
        )
    stream_keys(block, at, shared.keys, shared.values)


class _Turn(NamedTuple):
    """The turn at the tensor cores: of two warpgroups, one multiplies while the other does not."""

    barrier: Ref
    kind: str
    """See `Sizes.turns`."""

    def pass_over(self) -> None:
        """Let the other one multiply; it says the same when it is done with its scores."""
        if self.kind != "none":
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)

    def issued(self) -> None:
        """Do what is to be done while a product of scores is under way."""
        if self.kind == "early":
            plgpu.barrier_arrive(self.barrier)

    def multiplied(self) -> None:
        """Do what is to be done once this product is there."""
        if self.kind == "early":
            plgpu.barrier_wait(self.barrier)
        elif self.kind == "late":
            self.pass_over()

    def weighed(self) -> None:
        """Say that there are weights to multiply values with."""
        if self.kind != "none":
            plgpu.barrier_arrive(self.barrier)

    def take(self) -> None:
        """Wait for the turn to multiply values."""
        if self.kind != "none":
            plgpu.barrier_wait(self.barrier)


def _compute(block: Block, warpgroup: jax.Array, results: list[Ref]) -> None:
    at, launch, arrays = block.here(), block.launch, block.arrays
    shared: _Memory = block.memory
    shape = ROWS, launch.k_block
    queries = launch.rows(at, warpgroup)
    head = launch.head(arrays, at.batch, at.head)
    owned = shared.queries.take(warpgroup)
    turn = _Turn(shared.turn, launch.sizes.turns)
    stage = memory.part(shared.stage, warpgroup)

    def factors(n: Index) -> Product:
        return Product(owned["q"], memory.transposed(shared.keys.take(n)["k"]))

    def release_keys(n: Index) -> None:
        """Release keys whose product is there, unless their segments are still to be read."""
        if not launch.segmented:
            shared.keys.release(n)

    def multiply(n: Index) -> list[jax.Array]:
        products = memory.multiply(factors(n), stage=stage, issued=turn.issued)
        release_keys(n)
        turn.multiplied()
        return products

    def softmax(
        check: bool, step: Step, products: list[jax.Array], carry: online.Running
    ) -> tuple[online.Sums, jax.Array, jax.Array]:
        """Add the scores of a step; return the sums, the rescaled values, and the weights."""
        n = step.number
        sums, mixed = carry
        k_start = at.start(step, launch.k_block) if check or head.needs_index else jnp.int32(0)
        segments = owned.get("segments"), shared.keys.held(n).get("segments")
        tile = Tile(head, queries.start, k_start, shape, 0, *segments)
        s, factor = tile.base_two_scores(*products)
        if check:
            s = jnp.where(tile.allowed(), s, -jnp.inf)
        if launch.segmented:
            shared.keys.release(n)
        sums, weights, shrink = online.add(sums, s, base=online.TWO, factor=factor)
        mixed = mixed * online.spread(shrink, mixed.shape)
        weights = tile.dropout()(weights).astype(launch.dtype)
        return lax.optimization_barrier((sums, mixed, weights))

    def visit(
        check: bool, step: Step, carry: online.Running, products: list[jax.Array], more: bool
    ) -> tuple[online.Running, list[jax.Array]]:
        n = step.number
        sums, mixed, weights = softmax(check, step, products, carry)
        turn.weighed()
        v = shared.values.take(n)["v"]
        following = [factors(n + 1)] if more else []
        turn.take()
        issued = turn.issued if more else lambda: None
        mixed, *found = memory.multiply(
            Product(weights, v, mixed), *following, stage=stage, issued=issued
        )
        shared.values.release(n)
        if more:
            release_keys(n + 1)
            turn.multiplied()
        return (sums, mixed), found

    # The second warpgroup stays half a step behind the first.
    pl.when(warpgroup == 1)(turn.pass_over)
    rows = memory.zeros(ROWS)
    carry = online.Sums(rows - jnp.inf, rows), memory.zeros(ROWS, launch.width)
    sums, mixed = walk_with(at, 1, multiply, visit, carry, ahead=launch.sizes.rotated)
    pl.when(warpgroup == 0)(turn.pass_over)

    at = block.here()
    queries = launch.rows(at, warpgroup)
    divisor, found = online.finish(sums, online.TWO)
    # The output takes the place of the queries in shared memory.
    out, logsumexp = owned["q"], shared.logsumexp.at[warpgroup]
    # One division a row, rather than one a value as elsewhere.
    out[...] = (mixed * online.spread(1.0 / divisor, mixed.shape)).astype(launch.dtype)
    logsumexp[...] = found
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, results[0].at[at.batch, queries, at.head])
    plgpu.copy_smem_to_gmem(logsumexp, results[1].at[at.batch, at.head, queries])
    # The kernel must not end before its shared memory has been read; writing ends with the kernel.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


FORWARD = Kernel("attention_forward", _memory, _load, _compute)
