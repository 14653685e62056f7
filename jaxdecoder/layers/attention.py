"""Attention: the heads of a layer, and the mechanisms by which they mix values over time.

Most mechanisms are masks (`masked.py`); others have their own files.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdecoder.config import Architecture
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.kernels.mesh import split
from jaxdecoder.layers.cache import Cursor
from jaxdecoder.layers.costs import Kernels, weights
from jaxdecoder.layers.dropout import Dropout
from jaxdecoder.layers.linear import linear
from jaxdecoder.layers.linear_attention import LINEAR
from jaxdecoder.layers.linformer import LINFORMER
from jaxdecoder.layers.masked import MASKED, mechanism
from jaxdecoder.layers.mechanism import Heads, Mechanism, Seen
from jaxdecoder.layers.positions import POSITIONS

ATTENTIONS: dict[str, Mechanism] = {
    **{name: mechanism(masked) for name, masked in MASKED.items()},
    "linformer": LINFORMER,
    "linear": LINEAR,
}


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (arXiv 1706.03762, 2305.13245)."""

    config: Architecture
    mechanism: str = "full"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        cache: PyTree = None,
        cursor: Cursor | None = None,
        *,
        dropout: Rate | None = None,
        seen: Seen | None = None,
    ) -> tuple[Float[Array, "batch time d_model"], PyTree]:
        """Attend within x or, given a cache, from x to the cache with x written to it."""
        c, (batch, time, _) = self.config, x.shape
        project = partial(linear, c, dtype=self.dtype)

        def heads(name: str, count: int) -> Float[Array, "batch time heads width"]:
            dense = project(c.d_model, count * c.d_head, bias=c.qkv_bias, name=name)
            return dense(x).reshape(batch, time, count, c.d_head)

        q = split(heads("query", c.n_heads), "batch", "tokens", "heads", None)
        k, v = (
            split(heads(name, c.n_kv_heads), "batch", "tokens", "kv_heads", None)
            for name in ("key", "value")
        )
        if c.qk_norm:
            q = nn.RMSNorm(epsilon=c.norm_epsilon, dtype=self.dtype, name="query_norm")(q)
            k = nn.RMSNorm(epsilon=c.norm_epsilon, dtype=self.dtype, name="key_norm")(k)
        position = POSITIONS[c.position]

        def rotate(x: jax.Array) -> jax.Array:
            return x if position.rotate is None else position.rotate(c, x, positions)

        score = None if position.score is None else position.score(c, name="positions")()
        mixing = ATTENTIONS[self.mechanism].mixing(c, name="mixing")
        given = Heads(q, k, v, positions, rotate, score, seen)
        mixed, cache = mixing(given, cache, cursor, dropout)
        out = mixed.reshape(batch, time, c.query_width)
        if c.attention_projection:
            output = partial(project, c.query_width, c.d_model, bias=c.bias)
            out = output(residual_output=True, name="out")(out)
        out = split(out, "batch", "tokens", None)
        return Dropout()(out, dropout), cache


def projections(c: Architecture, layers: int = 1) -> list[Kernels]:
    """Return the matrices of queries, keys, values and outputs in so many layers."""
    found = [Kernels(layers, c.d_model, c.query_width), Kernels(2 * layers, c.d_model, c.kv_width)]
    if c.attention_projection:
        found.append(Kernels(layers, c.query_width, c.d_model))
    return found


def projection_parameters(c: Architecture) -> int:
    """Count a layer's projections, their biases, and the scales of norms of queries and keys."""
    biases = c.qkv_bias * (c.query_width + 2 * c.kv_width)
    biases += c.attention_projection * c.bias * c.d_model
    return weights(projections(c)) + biases + c.qk_norm * 2 * c.d_head
