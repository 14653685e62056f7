"""Attention in plain XLA, exact: the definition that the other implementations are held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxdecoder.kernels.dropout import keep


def attention(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"],
    v: Float[Array, "batch k_time kv_heads width"],
    allowed: Bool[Array, "#batch #heads q_time k_time"],
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_seed: UInt32[Array, ""] | None = None,
) -> Float[Array, "batch q_time heads width"]:
    """softmax(scale q k^T) v over the allowed keys; a query with none gives zeros.

    Consecutive groups of `heads / kv_heads` queries share a key head (arXiv 2305.13245). Scores
    and softmax are float32.
    """
    batch, q_time, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, q_time, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bqhgw,bkhw->bhgqk", grouped * scale, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, q_time, k.shape[1])
    scores = jnp.where(allowed, scores, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    if dropout_seed is not None and dropout_rate > 0:
        index = [jax.lax.broadcasted_iota(jnp.uint32, weights.shape, axis) for axis in range(4)]
        kept = keep(dropout_seed, dropout_rate, *index)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, -1, q_time, k.shape[1])
    out = jnp.einsum("bhgqk,bkhw->bqhgw", weights, v)
    return out.reshape(batch, q_time, heads, width)
