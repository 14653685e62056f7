"""Attention under a mask: softmax attention that a mask and the slots of its cache describe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from jaxdecoder.config import Architecture
from jaxdecoder.kernels import masks
from jaxdecoder.kernels.decode import decode_attention
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.kernels.flash import flash_attention
from jaxdecoder.kernels.reference import attention
from jaxdecoder.layers.cache import Cursor, Parts, Slots, cut, extend, joined, present, write_one
from jaxdecoder.layers.dropout import of_weights
from jaxdecoder.layers.mechanism import AttentionCosts, Heads, Mechanism, of_pairs


def full(config: Architecture) -> masks.Mask:
    """Every earlier token (arXiv 1706.03762)."""
    return masks.causal()


def sliding_window(config: Architecture) -> masks.Mask:
    """The last attention_window tokens (arXiv 2004.05150, 2310.06825)."""
    return masks.causal() & masks.sliding_window(config.attention_window)


def longformer(config: Architecture) -> masks.Mask:
    """A window, attention_dilation apart, and the first tokens (Longformer, arXiv 2004.05150).

    The paper's global tokens see every token as well; made causal, they see those before them.
    """
    window = masks.dilated(config.attention_window, config.attention_dilation)
    first = masks.first(config.attention_globals) if config.attention_globals else masks.nothing()
    return masks.causal() & (window | first)


def fixed_sparse(config: Architecture) -> masks.Mask:
    """The own block and the last tokens of all earlier ones (Sparse Transformer, arXiv 1904.10509).

    The paper gives the two patterns to different heads or merges them; here they are merged.
    """
    return masks.causal() & masks.fixed_blocks(config.attention_block, config.attention_globals)


def strided_sparse(config: Architecture) -> masks.Mask:
    """The last attention_block tokens, and every attention_block-th before them (arXiv 1904.10509).

    Merged like `fixed_sparse`.
    """
    near = masks.sliding_window(config.attention_block)
    return masks.causal() & (near | masks.strided(config.attention_block))


def context(config: Architecture) -> Slots:
    """Keep all that a query may see of the last context_length tokens."""
    return Slots(config.context_length)


def window(config: Architecture) -> Slots:
    """Keep the last attention_window tokens."""
    return Slots(min(config.attention_window, config.context_length))


def window_and_first(config: Architecture) -> Slots:
    """Keep a dilated window's whole span: the next token's window stands between its tokens."""
    span = (config.attention_window - 1) * config.attention_dilation + 1
    return _within_context(config, Slots(span, tuple(range(config.attention_globals))))


def block_and_summaries(config: Architecture) -> Slots:
    """Keep as many tokens as a block has, and the last ones of all blocks of a context."""
    block, count = config.attention_block, config.attention_globals
    period = -(-config.context_length // block) * block
    last = (p for p in range(period) if p % block >= block - count)
    return _within_context(config, Slots(block, tuple(last), period))


def _within_context(config: Architecture, slots: Slots) -> Slots:
    return slots if slots.size < config.context_length else context(config)


class Masked(NamedTuple):
    """What a masked mechanism is; its module, its cache and its costs follow."""

    mask: Callable[[Architecture], masks.Mask]
    slots: Callable[[Architecture], Slots]
    """What decoding keeps: all that the mask may still allow a later query."""


MASKED: dict[str, Masked] = {
    "full": Masked(full, context),
    "sliding_window": Masked(sliding_window, window),
    "longformer": Masked(longformer, window_and_first),
    "fixed_sparse": Masked(fixed_sparse, block_and_summaries),
    "strided_sparse": Masked(strided_sparse, context),
}


class MaskedMixing(nn.Module):
    """Softmax attention under a mask (arXiv 1706.03762).

    Decoding past the context, it sees what the mask allows of the last context_length tokens.
    """

    config: Architecture
    mask: masks.Mask
    slots: Slots

    @nn.compact
    def __call__(
        self, heads: Heads, cache: Parts | None, cursor: Cursor | None, dropout: Rate | None
    ) -> tuple[Float[Array, "batch time heads width"], Parts | None]:
        """See `Mechanism`."""
        c = self.config
        q, k, v = heads.rotate(heads.q), heads.rotate(heads.k), heads.v
        scale, score = q.shape[-1] ** -0.5, heads.score
        dropped, implementation = of_weights(self, dropout), c.attention_implementation
        if cache is None and heads.seen is None:
            attend = partial(flash_attention, mask=self.mask, implementation=implementation)
            return attend(q, k, v, score=score, scale=scale, **dropped), None
        mask, k_positions = self.mask, heads.positions
        if cache is None or cursor is None:
            attend = partial(attention, q, k, v, **dropped)
        else:
            mask = mask & masks.sliding_window(c.context_length)
            if len(cache) > 1 and k.shape[1] == 1:
                cache, k_positions = write_one(cache, k, v, cursor), self.slots.visible(cursor, 1)
                keys, values = [part.k for part in cache], [part.v for part in cache]
                attend = partial(attention, q, keys, values, present=present(cache, cursor))
            else:
                (k, v), k_positions, whole = extend(joined(cache), k, v, cursor, self.slots)
                cache = cut(whole, len(cache))
                implementation = "reference" if implementation == "reference" else "auto"
                both = k.swapaxes(1, 2), v.swapaxes(1, 2)
                attend = partial(decode_attention, q, *both, implementation=implementation)
        there = k_positions >= 0
        if heads.seen is not None:
            there = there & heads.seen(k_positions)
        allowed = mask(heads.positions[:, :, None], k_positions[:, None, :]) & there[:, None, :]
        at = {"q_index": heads.positions, "k_index": k_positions}
        return attend(allowed[:, None], scale=scale, score=score, **at), cache


def mechanism(masked: Masked) -> Mechanism:
    """Return the mechanism of a mask and its slots; a layer costs the pairs allowed, and slots."""
    mask, slots = masked

    def mixing(c: Architecture, queries: int, start: int) -> int:
        return of_pairs(c, masks.allowed_entries(mask(c), queries, start + queries, start))

    def dense(c: Architecture, queries: int, start: int) -> int:
        return of_pairs(c, queries * (slots(c).size if start else queries))

    def drawn(c: Architecture, tokens: int, n: int) -> float:
        # A token always sees itself, and another one only if that was drawn as well.
        both = n * (n - 1) / (tokens * (tokens - 1))
        return of_pairs(c, n) + (mixing(c, tokens, 0) - of_pairs(c, tokens)) * both

    def cache(c: Architecture, number: int) -> int:
        return number * 2 * c.kv_width * slots(c).size

    return Mechanism(
        lambda c, name=None: MaskedMixing(c, mask(c), slots(c), name=name),
        lambda c, batch, dtype: cut(slots(c).empty(c, batch, dtype), slots(c).parts()),
        AttentionCosts(mixing, dense, drawn, cache),
    )
