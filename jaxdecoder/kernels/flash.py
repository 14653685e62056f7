"""The attention operation: any mask, one signature, several implementations."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxdecoder.kernels import masks, reference


def flash_attention(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"],
    v: Float[Array, "batch k_time kv_heads width"],
    *,
    mask: masks.Mask,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: UInt32[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_time heads width"]:
    """softmax(scale q k^T) v over the keys that `mask` allows; a query with none gives zeros.

    `scale` is 1 / sqrt(width) when left out. Dropout acts on the attention weights.
    """
    q_index, k_index = jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    allowed = mask(q_index[:, None], k_index[None, :])
    return reference.attention(
        q,
        k,
        v,
        allowed[None, None],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
    )
