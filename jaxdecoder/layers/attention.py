"""Attention mechanisms: how the heads of a layer mix values over time.

Most are masks in the mask algebra, and `MaskedMixing` serves them all; others have their own files.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdecoder.config import ModelConfig
from jaxdecoder.kernels import masks
from jaxdecoder.kernels.decode import decode_attention
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.kernels.flash import flash_attention
from jaxdecoder.kernels.reference import attention
from jaxdecoder.layers.cache import Cursor, KeysAndValues, Slots, extend
from jaxdecoder.layers.dropout import Dropout, of_weights
from jaxdecoder.layers.linear import linear
from jaxdecoder.layers.linear_attention import LINEAR
from jaxdecoder.layers.linformer import LINFORMER
from jaxdecoder.layers.mechanism import Heads, Mechanism, Seen
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


def context(config: ModelConfig) -> Slots:
    """All that a query may see of the last context_length tokens."""
    return Slots(config.context_length)


def window(config: ModelConfig) -> Slots:
    return Slots(min(config.attention_window, config.context_length))


def window_and_first(config: ModelConfig) -> Slots:
    """Every token of a dilated window's span: the next token's window stands between them."""
    span = (config.attention_window - 1) * config.attention_dilation + 1
    return _within_context(config, Slots(span, tuple(range(config.attention_globals))))


def block_and_summaries(config: ModelConfig) -> Slots:
    """As many tokens as a block has, and the last ones of all blocks of a context."""
    block, count = config.attention_block, config.attention_globals
    period = -(-config.context_length // block) * block
    last = (p for p in range(period) if p % block >= block - count)
    return _within_context(config, Slots(block, tuple(last), period))


def _within_context(config: ModelConfig, slots: Slots) -> Slots:
    return slots if slots.size < config.context_length else context(config)


SLOTS: dict[str, Callable[[ModelConfig], Slots]] = {
    "full": context,
    "sliding_window": window,
    "longformer": window_and_first,
    "fixed_sparse": block_and_summaries,
    "strided_sparse": context,
}
"""What decoding under each of `MASKS` keeps."""


class MaskedMixing(nn.Module):
    """Softmax attention under a mask (arXiv 1706.03762).

    Decoding past the context, it sees what the mask allows of the last context_length tokens.
    """

    config: ModelConfig
    mask: masks.Mask
    slots: Slots

    @nn.compact
    def __call__(
        self,
        heads: Heads,
        cache: KeysAndValues | None,
        cursor: Cursor | None,
        dropout: Rate | None,
    ) -> tuple[Float[Array, "batch time heads width"], KeysAndValues | None]:
        """See `Mechanism`."""
        c = self.config
        q, k, v = heads.rotate(heads.q), heads.rotate(heads.k), heads.v
        scale = q.shape[-1] ** -0.5
        dropped = of_weights(self, dropout)
        if cache is None and heads.seen is None:
            mixed = flash_attention(
                q,
                k,
                v,
                mask=self.mask,
                score=heads.score,
                scale=scale,
                implementation=c.attention_implementation,
                **dropped,
            )
            return mixed, None
        mask, held = self.mask, heads.positions
        if cache is not None and cursor is not None:
            (k, v), held, cache = extend(cache, k, v, cursor, self.slots)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            mask = mask & masks.sliding_window(c.context_length)
        there = held >= 0 if heads.seen is None else (held >= 0) & heads.seen(held)
        allowed = mask(heads.positions[:, :, None], held[:, None, :]) & there[:, None, :]
        allowed = allowed[:, None]
        if cache is None:
            mixed = attention(
                q,
                k,
                v,
                allowed,
                scale=scale,
                score=heads.score,
                q_index=heads.positions,
                k_index=held,
                **dropped,
            )
        else:
            mixed = decode_attention(
                q,
                k,
                v,
                allowed,
                scale=scale,
                score=heads.score,
                q_index=heads.positions,
                k_index=held,
                implementation="reference" if c.attention_implementation == "reference" else "auto",
            )
        return mixed, cache


def masked(name: str) -> Mechanism:
    """The mechanism of a mask."""
    mask, slots = MASKS[name], SLOTS[name]
    return Mechanism(
        lambda c, name=None: MaskedMixing(c, mask(c), slots(c), name=name),
        lambda c, batch, dtype: slots(c).empty(c, batch, dtype),
    )


ATTENTIONS: dict[str, Mechanism] = {
    **{name: masked(name) for name in MASKS},
    "linformer": LINFORMER,
    "linear": LINEAR,
}


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (arXiv 1706.03762, 2305.13245)."""

    config: ModelConfig
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
            Heads(q, k, v, positions, rotate, score, seen), cache, cursor, dropout
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
        return Dropout()(out, dropout), cache
