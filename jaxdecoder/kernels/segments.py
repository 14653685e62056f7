"""The blocks that an attention kernel visits, also where segments that are data empty some."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxdecoder.kernels.masks import BlockLists, block_lists
from jaxdecoder.kernels.problem import Operands, Problem


def lists_of(
    problem: Problem,
    operands: Operands,
    block_q: int,
    block_k: int,
    *,
    by_keys: bool = False,
    together: bool = False,
) -> BlockLists:
    """Return the blocks with work: of every row of queries the columns of keys.

    With `by_keys`, rows are keys and columns queries. The lists have a first axis for the batch
    entries, of 1 if all have the same; `together`, they have none.
    """
    states = problem.states(operands.q.shape[1], operands.k.shape[1], block_q, block_k)
    lists = block_lists(states.T if by_keys else states)
    if not problem.segments_vary:
        return lists if together else BlockLists(*(x[None] for x in lists))
    assert operands.q_segments is not None
    assert operands.k_segments is not None
    queries, keys = (operands.q_segments, block_q), (operands.k_segments, block_k)
    rows, columns = (keys, queries) if by_keys else (queries, keys)
    return narrowed(lists, *rows, *columns, together=together)


def narrowed(
    lists: BlockLists,
    rows: Int[Array, "batch row_time"],
    row_block: int,
    columns: Int[Array, "batch column_time"],
    column_block: int,
    together: bool = False,
) -> BlockLists:
    """Return the lists of each batch entry, (batch, ...), without blocks that share no segment.

    `together`: return one list, without the blocks that share no segment in any entry.

    A block is left out if the ranges of its rows' and its columns' segments are disjoint. For
    segments that are packed in order this is exact. No block of the lists is FULL, because its
    segments are unknown before the run.
    """
    low, high = _ranges(rows, row_block)
    column_low, column_high = (x[:, lists.indices] for x in _ranges(columns, column_block))
    listed = jnp.arange(lists.indices.shape[1]) < jnp.asarray(lists.counts)[:, None]
    shared = (low[..., None] <= column_high) & (column_low <= high[..., None]) & listed
    if together:
        shared = jnp.any(shared, axis=0)
    order = jnp.argsort(~shared, axis=-1, stable=True)
    indices = jnp.broadcast_to(lists.indices, order.shape)
    counts = jnp.sum(shared, axis=-1, dtype=jnp.int32)
    return BlockLists(counts, jnp.zeros_like(counts), jnp.take_along_axis(indices, order, axis=-1))


def _ranges(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Return the least and the greatest segment of each block, (batch, blocks)."""
    missing = -segments.shape[1] % block
    blocks = jnp.pad(segments, ((0, 0), (0, missing)), mode="edge")
    blocks = blocks.reshape(segments.shape[0], -1, block)
    return blocks.min(axis=-1), blocks.max(axis=-1)
