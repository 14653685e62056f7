"""Attention mechanisms. Each is a mask in the mask algebra; the operation is one and the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.config import ModelConfig
from jaxdecoder.kernels import masks
from jaxdecoder.kernels.flash import flash_attention
from jaxdecoder.kernels.reference import attention
from jaxdecoder.layers.cache import Cursor, LayerCache, write
from jaxdecoder.layers.dropout import Dropout, dropout_seed
from jaxdecoder.layers.linear import linear
from jaxdecoder.layers.positions import POSITIONS


def full(config: ModelConfig) -> masks.Mask:
    """Every earlier token (arXiv 1706.03762)."""
    return masks.causal()


def sliding_window(config: ModelConfig) -> masks.Mask:
    """The last attention_window tokens (arXiv 2004.05150, 2310.06825)."""
    return masks.causal() & masks.sliding_window(config.attention_window)


def longformer(config: ModelConfig) -> masks.Mask:
    """A window, attention_dilation apart, and the first tokens (Longformer, arXiv 2004.05150).

    The paper's global tokens see every token as well; made causal, they see those before them.
    """
    window = masks.dilated(config.attention_window, config.attention_dilation)
    return masks.causal() & (window | _first(config.attention_globals))


def fixed_sparse(config: ModelConfig) -> masks.Mask:
    """The own block and the last tokens of all earlier ones (Sparse Transformer, arXiv 1904.10509).

    The paper gives the two patterns to different heads or merges them; here they are merged.
    """
    return masks.causal() & masks.fixed_blocks(config.attention_block, config.attention_globals)


def strided_sparse(config: ModelConfig) -> masks.Mask:
    """The last attention_block tokens, and every attention_block-th before them (arXiv 1904.10509).

    Merged like `fixed_sparse`.
    """
    near = masks.sliding_window(config.attention_block)
    return masks.causal() & (near | masks.strided(config.attention_block))


def _first(n: int) -> masks.Mask:
    return masks.first(n) if n else masks.nothing()


ATTENTIONS: dict[str, Callable[[ModelConfig], masks.Mask]] = {
    "full": full,
    "sliding_window": sliding_window,
    "longformer": longformer,
    "fixed_sparse": fixed_sparse,
    "strided_sparse": strided_sparse,
}


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (arXiv 1706.03762, 2305.13245)."""

    config: ModelConfig
    mechanism: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        cache: LayerCache | None = None,
        cursor: Cursor | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch time d_model"], LayerCache | None]:
        """Attends within x, or, given a cache, from x to the cache with x written to it."""
        c = self.config.resolve()
        assert c.d_head is not None
        assert c.n_kv_heads is not None
        d_head = c.d_head
        batch, time, _ = x.shape

        def heads(name: str, count: int) -> Float[Array, "batch time heads width"]:
            width = count * d_head
            dense = linear(c, c.d_model, width, bias=c.qkv_bias, dtype=self.dtype, name=name)
            return dense(x).reshape(batch, time, count, d_head)

        q = heads("query", c.n_heads)
        k, v = heads("key", c.n_kv_heads), heads("value", c.n_kv_heads)
        if c.qk_norm:
            q = nn.RMSNorm(epsilon=c.norm_epsilon, dtype=self.dtype, name="query_norm")(q)
            k = nn.RMSNorm(epsilon=c.norm_epsilon, dtype=self.dtype, name="key_norm")(k)
        position = POSITIONS[c.position]
        if position.rotate is not None:
            q, k = position.rotate(c, q, positions), position.rotate(c, k, positions)
        score = None if position.score is None else position.score(c, name="positions")()

        mask = ATTENTIONS[self.mechanism](c)
        scale = d_head**-0.5
        if cache is None or cursor is None:
            dropped = c.dropout > 0 and not deterministic
            mixed = flash_attention(
                q,
                k,
                v,
                mask=mask,
                score=score,
                scale=scale,
                dropout_rate=c.dropout if dropped else 0.0,
                dropout_seed=dropout_seed(self) if dropped else None,
                implementation=c.attention_implementation,
            )
        else:
            cache = write(cache, k, v, cursor)
            held = cursor.slot_positions(time, cache.slots)
            allowed = mask(positions[:, :, None], held[:, None, :]) & (held >= 0)[:, None, :]
            k, v = cache.k.swapaxes(1, 2), cache.v.swapaxes(1, 2)
            mixed = attention(
                q,
                k,
                v,
                allowed[:, None],
                scale=scale,
                score=score,
                q_index=positions,
                k_index=held,
            )

        out = mixed.reshape(batch, time, c.n_heads * d_head)
        if c.attention_projection:
            out = linear(
                c,
                c.n_heads * d_head,
                c.d_model,
                bias=c.bias,
                dtype=self.dtype,
                residual_output=True,
                name="out",
            )(out)
        return Dropout(c.dropout)(out, deterministic=deterministic), cache
