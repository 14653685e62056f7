"""Attention in plain XLA, block of queries by block, each over the keys that its mask can reach.

For sequences so short that all weights can be kept until the backward pass, which then computes
none of them again. The blocks are no loop, so that each has as many keys as it needs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecoder.kernels import masks
from jaxdecoder.kernels.problem import Implementation, LogSumExp, Operands, Problem, numbers
from jaxdecoder.kernels.reference import softmax

BLOCK = 64


def forward(problem: Problem, operands: Operands) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`."""
    batch, q_time, heads, width = operands.q.shape
    k_time, kv_heads = operands.k.shape[1:3]
    shape = batch, q_time, kv_heads, heads // kv_heads, width
    q = operands.q.reshape(shape).transpose(0, 2, 3, 1, 4)
    k, v = (x.swapaxes(1, 2) for x in (operands.k, operands.v))
    found = []
    for row, states in enumerate(problem.states(q_time, k_time, BLOCK, BLOCK)):
        columns = np.flatnonzero(states)
        # A row without keys looks at one block, which the mask hides: it gives zeros.
        first, last = (columns[0], columns[-1]) if columns.size else (0, 0)
        rows = np.arange(row * BLOCK, min(q_time, (row + 1) * BLOCK), dtype=np.int32)
        keys = np.arange(first * BLOCK, min(k_time, (last + 1) * BLOCK), dtype=np.int32)
        check = bool((states[first : last + 1] != masks.FULL).any())
        seen = slice(keys[0], keys[-1] + 1)
        of_row = q[..., rows[0] : rows[-1] + 1, :]
        found.append(
            _row(problem, operands, of_row, k[:, :, seen], v[:, :, seen], rows, keys, check)
        )
    outs, sums = zip(*found, strict=True)
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    logsumexp = jnp.concatenate(sums, axis=3).reshape(batch, heads, q_time)
    return out.reshape(operands.q.shape), logsumexp


def _row(
    problem: Problem,
    operands: Operands,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: np.ndarray,
    keys: np.ndarray,
    check: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of some queries, and the logarithms of the sums of exponentials."""
    batch, kv_heads, group, count, width = q.shape
    # The queries of all heads that share keys are the rows of one product.
    q = q.reshape(batch, kv_heads, group * count, width)
    sizes = (np.arange(n, dtype=np.int32) for n in (batch, kv_heads, group * count))
    entries, shared, places, k_index = np.ix_(*sizes, keys)
    q_index = rows[places % count]
    heads = shared * group + places // count
    index = *numbers(operands, entries, heads), q_index, k_index
    s = jnp.einsum("bhqw,bhkw->bhqk", q, k, preferred_element_type=jnp.float32) * problem.scale
    if check:
        q_segments, k_segments = operands.q_segments, operands.k_segments
        if q_segments is not None and k_segments is not None:
            q_segments = q_segments[:, None, q_index[0, 0, :, 0], None]
            k_segments = k_segments[:, None, None, keys]
        allowed = problem.allowed(q_index, k_index, q_segments, k_segments)
        if problem.score is not None:
            # So that no infinite slope of the score function reaches the gradient.
            s = problem.new_score(operands.score, heads, jnp.where(allowed, s, 0.0), *index)
        s = jnp.where(allowed, s, -jnp.inf)
    else:
        s = problem.new_score(operands.score, heads, s, *index)
    weights, logsumexp = softmax(s)
    if operands.dropout is not None:
        kept = problem.kept(*operands.dropout, *map(jnp.asarray, index))
        weights = jnp.where(kept, weights, 0.0)
    out = jnp.einsum("bhqk,bhkw->bhqw", weights.astype(v.dtype), v)
    apart = batch, kv_heads, group, count
    return out.reshape(*apart, width), logsumexp.reshape(apart)


IMPLEMENTATION = Implementation(forward, None)
