"""Attention mechanisms: how the heads of a layer mix values over time.

Most are masks in the mask algebra, and `MaskedMixing` serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdecoder.config import ModelConfig
from jaxdecoder.kernels import masks, scores
from jaxdecoder.kernels.flash import flash_attention
from jaxdecoder.kernels.reference import attention
from jaxdecoder.layers.cache import Cursor, KeysAndValues, empty_ring, write
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


MASKS: dict[str, Callable[[ModelConfig], masks.Mask]] = {
    "full": full,
    "sliding_window": sliding_window,
    "longformer": longformer,
    "fixed_sparse": fixed_sparse,
    "strided_sparse": strided_sparse,
}


Seen = Callable[[Int[Array, "batch keys"]], Bool[Array, "batch keys"]]
"""Which keys, given by their positions, there are to see at all."""


class Heads(NamedTuple):
    """What a mechanism mixes: the heads of a layer and how positions reach them."""

    q: Float[Array, "batch time heads width"]
    k: Float[Array, "batch time kv_heads width"]
    v: Float[Array, "batch time kv_heads width"]
    positions: Int[Array, "#batch time"]
    """Of these tokens; negative ones are padding."""
    rotate: Callable[[jax.Array], jax.Array]
    """Turns queries or keys by their positions; the identity where positions do not rotate."""
    score: scores.Score | None
    seen: Seen | None = None
    """None: all keys, and positions are consecutive."""


class Mechanism(NamedTuple):
    """One way to mix values over time.

    mixing: (config, name) -> module from (heads, cache, cursor, deterministic) to the mixed values
        (batch, time, heads, width) and the cache. Without a cache it mixes within the heads given;
        with one, these tokens follow what the cache holds, and it comes back with them in it.
    empty_cache: (config, batch, dtype) -> the cache of one layer that has seen nothing.
    """

    mixing: Callable[..., Any]
    empty_cache: Callable[[ModelConfig, int, Any], Any]


class MaskedMixing(nn.Module):
    """Softmax attention under a mask (arXiv 1706.03762)."""

    config: ModelConfig
    mask: masks.Mask

    @nn.compact
    def __call__(
        self,
        heads: Heads,
        cache: KeysAndValues | None,
        cursor: Cursor | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time heads width"], KeysAndValues | None]:
        """See `Mechanism`."""
        c = self.config
        q, k, v = heads.rotate(heads.q), heads.rotate(heads.k), heads.v
        time, scale = q.shape[1], q.shape[-1] ** -0.5
        dropped = c.dropout > 0 and not deterministic
        dropout: dict[str, Any] = {
            "dropout_rate": c.dropout if dropped else 0.0,
            "dropout_seed": dropout_seed(self) if dropped else None,
        }
        if cache is None and heads.seen is None:
            mixed = flash_attention(
                q,
                k,
                v,
                mask=self.mask,
                score=heads.score,
                scale=scale,
                implementation=c.attention_implementation,
                **dropout,
            )
            return mixed, None
        held = heads.positions
        if cache is not None and cursor is not None:
            cache = write(cache, k, v, cursor)
            held = cursor.slot_positions(time, cache.slots)
            k, v = cache.k.swapaxes(1, 2), cache.v.swapaxes(1, 2)
        there = held >= 0 if heads.seen is None else (held >= 0) & heads.seen(held)
        mixed = attention(
            q,
            k,
            v,
            (self.mask(heads.positions[:, :, None], held[:, None, :]) & there[:, None, :])[:, None],
            scale=scale,
            score=heads.score,
            q_index=heads.positions,
            k_index=held,
            **dropout,
        )
        return mixed, cache


def masked(mask: Callable[[ModelConfig], masks.Mask]) -> Mechanism:
    """The mechanism of a mask."""
    return Mechanism(lambda c, name=None: MaskedMixing(c, mask(c), name=name), empty_ring)


ATTENTIONS: dict[str, Mechanism] = {name: masked(mask) for name, mask in MASKS.items()}


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
        cache: Any = None,
        cursor: Cursor | None = None,
        *,
        deterministic: bool = True,
        seen: Seen | None = None,
    ) -> tuple[Float[Array, "batch time d_model"], Any]:
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

        def rotate(x: jax.Array) -> jax.Array:
            return x if position.rotate is None else position.rotate(c, x, positions)

        score = None if position.score is None else position.score(c, name="positions")()
        mixing = ATTENTIONS[self.mechanism].mixing(c, name="mixing")
        mixed, cache = mixing(
            Heads(q, k, v, positions, rotate, score, seen), cache, cursor, deterministic
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
