"""Attention in plain XLA, over all scores at once: the other implementations must agree with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxdecoder.kernels.dropout import Rate, drops, keep, scaled, threshold
from jaxdecoder.kernels.problem import Implementation, LogSumExp, Operands, Problem, numbers
from jaxdecoder.kernels.scores import Score

Parts = Sequence[Float[Array, "batch kv_heads part width"]]
"""Keys or values as a cache has them, cut into parts along the time."""


def attention(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"] | Parts,
    v: Float[Array, "batch k_time kv_heads width"] | Parts,
    allowed: Bool[Array, "#batch #heads q_time k_time"],
    *,
    scale: float,
    score: Score | None = None,
    q_index: Int[Array, "#batch q_time"] | None = None,
    k_index: Int[Array, "#batch k_time"] | None = None,
    dropout_rate: Rate = 0.0,
    dropout_seed: UInt32[Array, ""] | None = None,
    present: Sequence[Bool[Array, ""]] | None = None,
) -> Float[Array, "batch q_time heads width"]:
    """Compute softmax(score(scale q k^T)) v over the allowed keys; a query with none gives zeros.

    Consecutive groups of `heads / kv_heads` query heads share a key head (arXiv 2305.13245). Scores
    and softmax are float32. The positions that `score` sees count from 0, unless `q_index` and
    `k_index` give each row its own. Keys and values in parts are not joined;
    `present` says of each whether any of its keys may be allowed, and the others are not read.
    """
    batch, q_time, heads, _ = q.shape
    batch_index, head, q_count, k_count = _indices(batch, heads, q_time, allowed.shape[-1])
    q_at = q_count if q_index is None else q_index[:, None, :, None]
    k_at = k_count if k_index is None else k_index[:, None, None, :]

    def new_score(s: jax.Array) -> jax.Array:
        s = s * scale
        return s if score is None else score(s, batch_index, head, q_at, k_at)

    if dropout_seed is None or not drops(dropout_rate):
        return _attention(q, k, v, allowed, new_score, None, present)[0]
    index = map(jnp.asarray, (batch_index, head, q_count, k_count))
    kept = partial(keep, dropout_seed, threshold(dropout_rate), *index)
    out, _ = _attention(q, k, v, allowed, new_score, kept, present)
    return scaled(out, dropout_rate)


def forward(problem: Problem, operands: Operands) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`."""
    q, k, v = operands.q, operands.k, operands.v
    batch, q_time, heads, _ = q.shape
    batch_index, head, q_index, k_index = _indices(batch, heads, q_time, k.shape[1])
    index = *numbers(operands, batch_index, head), q_index, k_index
    q_segments, k_segments = operands.q_segments, operands.k_segments
    if q_segments is not None and k_segments is not None:
        q_segments, k_segments = q_segments[:, None, :, None], k_segments[:, None, None, :]
    allowed = problem.allowed(q_index, k_index, q_segments, k_segments)

    def score(s: jax.Array) -> jax.Array:
        return problem.new_score(operands.score, head, s * problem.scale, *index)

    if operands.dropout is None:
        return _attention(q, k, v, allowed, score, None)
    kept = partial(problem.kept, *operands.dropout, *map(jnp.asarray, index))
    return _attention(q, k, v, allowed, score, kept)


def _indices(batch: int, heads: int, q_time: int, k_time: int) -> list[np.ndarray]:
    """Return batch, head, query and key of all scores, each along its own axis."""
    return list(np.ix_(*(np.arange(n, dtype=np.int32) for n in (batch, heads, q_time, k_time))))


def _attention(
    q: jax.Array,
    k: jax.Array | Parts,
    v: jax.Array | Parts,
    allowed: jax.Array | np.ndarray,
    score: Callable[[jax.Array], jax.Array],
    kept: Callable[[], jax.Array] | None,
    present: Sequence[Bool[Array, ""]] | None = None,
) -> tuple[jax.Array, LogSumExp]:
    batch, q_time, heads, width = q.shape
    # Parts are read as they lie: before a branch of a program, XLA would copy them otherwise.
    in_parts = isinstance(k, Sequence)
    ks, vs = (x if isinstance(x, Sequence) else [x] for x in (k, v))
    there, heads_at, time_at = ("bhkw", 1, 2) if in_parts else ("bkhw", 2, 1)
    kv_heads, sizes = ks[0].shape[heads_at], [part.shape[time_at] for part in ks]
    k_time = sum(sizes)
    grouped = q.reshape(batch, q_time, kv_heads, heads // kv_heads, width)
    product = partial(jnp.einsum, f"bqhgw,{there}->bhgqk", preferred_element_type=jnp.float32)
    products = [partial(product, grouped, part) for part in ks]
    scores = jnp.concatenate(_computed(products, present), axis=-1)
    scores = scores.reshape(batch, heads, q_time, k_time)
    # Masked before the score function too, so that no infinite slope of it reaches the gradient.
    scores = jnp.where(allowed, score(jnp.where(allowed, scores, 0.0)), -jnp.inf)
    weights, logsumexp = softmax(scores)
    if kept is not None:
        weights = jnp.where(kept(), weights, 0.0)
    weights = weights.astype(vs[0].dtype).reshape(batch, kv_heads, -1, q_time, k_time)
    of_parts = jnp.split(weights, list(itertools.accumulate(sizes[:-1])), axis=-1)
    mix = partial(jnp.einsum, f"bhgqk,{there}->bqhgw")
    products = [partial(mix, *both) for both in zip(of_parts, vs, strict=True)]
    first, *others = _computed(products, present)
    out = sum(others, first)
    return out.reshape(batch, q_time, heads, width), logsumexp


def _computed(
    products: Sequence[Callable[[], jax.Array]], present: Sequence[Bool[Array, ""]] | None
) -> list[jax.Array]:
    """Compute these products, those of parts that are not present as zeros."""
    if present is None:
        return [product() for product in products]
    zeros = [partial(jnp.zeros_like, jax.eval_shape(product)) for product in products]
    return list(map(jax.lax.cond, present, products, zeros))


def softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weights over the last axis, and the logarithms of the sums of exponentials.

    A row of nothing but -inf has zeros and -inf.
    """
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return weights, (largest + jnp.log(total))[..., 0]


IMPLEMENTATION = Implementation(forward, None)
