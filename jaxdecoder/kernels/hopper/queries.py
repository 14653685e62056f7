"""The backward kernel that owns queries, and streams keys and values past them.

It computes the gradient of the queries and of the score's learned numbers: the one pass of
FlashAttention-2's two (arXiv 2307.08691), with `wgmma` throughout. Like the other, `keys.py`, it
computes the attention weights again from the logarithms of their sums.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels.hopper import memory
from jaxdecoder.kernels.hopper.launch import Block, Kernel, Launch, stream_keys
from jaxdecoder.kernels.hopper.memory import Product, Ring, spread
from jaxdecoder.kernels.hopper.tiles import ROWS, Tile
from jaxdecoder.kernels.hopper.walk import Step, walk_with
from jaxdecoder.kernels.typing import Ref
from jaxdecoder.typing import Index


class _Memory(NamedTuple):
    """Shared memory; of `queries` and of what is no ring, each compute warpgroup has its own."""

    queries: Ring
    keys: Ring
    values: Ring
    stage: Ref | None
    learned: Ref


_Carry = tuple[jax.Array, list[jax.Array]]
"""The gradients of the queries, and of each learned number the sum over the keys."""


def _memory(launch: Launch) -> _Memory:
    n = launch.learned_numbers()
    return _Memory(
        queries=launch.own(
            q=launch.owned(),
            dout=launch.owned(),
            numbers=memory.vector(launch.consumers, 2 + launch.segmented, ROWS, dtype=jnp.int32),
        ),
        keys=launch.ring(k=launch.streamed(), segments=launch.streamed_segments()),
        values=launch.ring(v=launch.streamed()),
        stage=launch.stage(),
        learned=memory.vector(launch.consumers, n, ROWS) if n else None,
    )


def _load(block: Block) -> None:
    at, launch, arrays, shared = block.here(), block.launch, block.arrays, block.memory
    for warpgroup in range(launch.consumers):
        queries = launch.rows(at, warpgroup)
        shared.queries.fill(
            warpgroup,
            q=arrays.operands.q.at[at.batch, queries, at.head],
            dout=arrays.dout.at[at.batch, queries, at.head],
            numbers=arrays.of_queries.at[at.batch, at.head, :, queries],
        )
    stream_keys(block, at, shared.keys, shared.values)


def _compute(block: Block, warpgroup: jax.Array, results: list[Ref]) -> None:
    at, launch, arrays = block.here(), block.launch, block.arrays
    shared: _Memory = block.memory
    shape = ROWS, launch.k_block
    queries = launch.rows(at, warpgroup)
    head = launch.head(arrays, at.batch, at.head)
    owned = shared.queries.take(warpgroup)
    numbers = owned["numbers"]
    logsumexp, delta = (memory.floats_along(0, numbers.at[i]) for i in range(2))
    stage = memory.part(shared.stage, warpgroup)
    drops = launch.problem.dropout

    def factors(n: Index) -> tuple[Product, Product]:
        """Return those of the products, and of the gradients of the weights less `delta`."""
        k, v = shared.keys.take(n)["k"], shared.values.take(n)["v"]
        start = None if drops else spread(-delta, 0, shape)
        return (
            Product(owned["q"], memory.transposed(k)),
            Product(owned["dout"], memory.transposed(v), start),
        )

    def multiply(n: Index) -> list[jax.Array]:
        found = memory.multiply(*factors(n), stage=stage)
        shared.values.release(n)
        return found

    def visit(
        check: bool, step: Step, carry: _Carry, products: list[jax.Array], more: bool
    ) -> tuple[_Carry, list[jax.Array]]:
        n = step.number
        dq, sums = carry
        of_scores, dweights = products
        k_start = at.start(step, launch.k_block) if check or head.needs_index else jnp.int32(0)
        segments = launch.segments_of(numbers), shared.keys.held(n).get("segments")
        tile = Tile(head, queries.start, k_start, shape, 0, *segments)
        s, factor, pull = tile.scores(check, of_scores, learned=True)
        weights = jnp.exp2(s * factor - spread(logsumexp, 0, shape))
        if drops:
            dweights = tile.dropout()(dweights) - spread(delta, 0, shape)
        ds, terms = pull(weights * dweights)
        sums = [total + jnp.sum(term, axis=1) for total, term in zip(sums, terms, strict=True)]
        following = factors(n + 1) if more else ()
        of_dq = Product(ds.astype(launch.dtype), shared.keys.held(n)["k"], dq)
        dq, *found = memory.multiply(of_dq, *following, stage=stage)
        shared.keys.release(n)
        if more:
            shared.values.release(n + 1)
        return (dq, sums), found

    none = [memory.zeros(ROWS) for _ in range(launch.learned_numbers())]
    carry = memory.zeros(ROWS, launch.width), none
    dq, sums = walk_with(at, 1, multiply, visit, carry, ahead=launch.sizes.rotated)

    # The gradient takes the place of the queries in shared memory.
    at = block.here()
    queries = launch.rows(at, warpgroup)
    out = owned["q"]
    out[...] = (dq * launch.problem.scale).astype(launch.dtype)
    learned = memory.part(shared.learned, warpgroup)
    for i, total in enumerate(sums):
        learned.at[i][...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, results[0].at[at.batch, queries, at.head])
    if sums:
        plgpu.copy_smem_to_gmem(learned, results[1].at[at.batch, at.head, :, queries])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


QUERIES = Kernel("attention_queries_gradient", _memory, _load, _compute)
