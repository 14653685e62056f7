"""Which blocks segments leave something to do in, when only the run can tell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxdecoder.kernels.masks import BlockLists


def narrowed(
    lists: BlockLists,
    rows: Int[Array, "batch row_time"],
    row_block: int,
    columns: Int[Array, "batch column_time"],
    column_block: int,
    together: bool = False,
) -> BlockLists:
    """The lists of each batch entry, (batch, ...), without blocks that share no segment; or, for
    all `together`, one without those that share none in any entry.

    A block is left out if the ranges of its rows' and its columns' segments are disjoint, which
    tells exactly for segments that are packed in order. The lists have no FULL blocks, because no
    block of unknown segments is FULL.
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
    """The least and the greatest segment of each block, (batch, blocks)."""
    missing = -segments.shape[1] % block
    blocks = jnp.pad(segments, ((0, 0), (0, missing)), mode="edge")
    blocks = blocks.reshape(segments.shape[0], -1, block)
    return blocks.min(axis=-1), blocks.max(axis=-1)
