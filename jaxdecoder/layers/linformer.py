"""Linformer made causal: the past in a few keys a block, the present exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture
from jaxdecoder.kernels import masks
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.kernels.flash import flash_attention
from jaxdecoder.kernels.reference import attention
from jaxdecoder.kernels.typing import Indices
from jaxdecoder.layers.cache import Cursor, KeysAndValues, Slots, extend
from jaxdecoder.layers.costs import FLOAT32
from jaxdecoder.layers.dropout import of_weights
from jaxdecoder.layers.mechanism import AttentionCosts, Heads, Mechanism, of_pairs


class Memory(NamedTuple):
    """What decoding remembers of a layer: its size is fixed by the config, whatever the length."""

    exact: KeysAndValues
    """The last attention_block tokens."""
    compressed: KeysAndValues
    """attention_rank slots for each block of a context, block i in the place of i mod blocks.

    Each token of a block is added to its slots as it comes; float32, because of all those sums.
    """


def empty_memory(config: Architecture, batch: int, dtype: DTypeLike) -> Memory:
    """Return the cache of a layer that has seen nothing; its sums are always float32."""
    compressed = Slots(config.attention_rank * blocks(config))
    exact = Slots(config.attention_block).empty(config, batch, dtype)
    return Memory(exact, compressed.empty(config, batch, jnp.float32))


def blocks(config: Architecture) -> int:
    """Count the blocks of a context."""
    return config.context_length // config.attention_block


def own_block(config: Architecture) -> masks.Mask:
    """Return the mask of what is seen exactly: the own block up to the query."""
    return masks.causal() & masks.fixed_blocks(config.attention_block, 0)


def mask(config: Architecture, time: int) -> masks.Mask:
    """Return that of `time` exact keys and, after them, compressed ones of earlier blocks."""
    earlier = masks.summaries(config.attention_block, config.attention_rank, time)
    return own_block(config) | earlier


@dataclasses.dataclass(frozen=True)
class _AtBlockEnds:
    """A score function whose keys from `time` on stand where the blocks end that they stand for."""

    function: Callable[..., jax.Array]
    block: int
    rank: int
    time: int

    def __call__(
        self, score: jax.Array, batch: Indices, head: Indices, q: Indices, k: Indices, *rest: object
    ) -> jax.Array:
        end = ((k - self.time) // self.rank + 1) * self.block - 1
        place = jnp.where(k < self.time, k, end)
        return self.function(score, batch, head, q, place, *rest)


class LinformerMixing(nn.Module):
    """Attention to the own block exactly, and to learned sums of every block before it.

    Linformer (arXiv 2006.04768) projects the n keys and values of a sequence to k << n by learned
    matrices over positions, E and F, so that every query sees k sums over the whole sequence. That
    leaks the future: each sum holds tokens after the query, and no mask over sums can take them out
    again. Here the projections work within blocks of attention_block tokens, each of which becomes
    attention_rank keys and values once it lies wholly in the past; the own block, which does not
    yet, is seen exactly. The projections are learned per layer and shared by its heads, one for
    keys and one for values (the paper's headwise sharing), and by all blocks.

    A query of a context of T tokens, blocks of b and rank r sees up to b exact keys and r T / b
    compressed ones, where the paper has a fixed k; so the cost of a sequence is b T / 2 + r T^2 /
    2b pairs. It grows linearly while the exact ones are most of them, for T up to b^2 / r, and with
    the square beyond, r / b times that of full attention. With b = sqrt(r T) it is T^1.5.

    Rotary positions turn keys before they are summed. For scores that depend on positions, a
    compressed key stands at the last position of its block. Decoding past the context, whole blocks
    are forgotten: a query sees its own block and the context_length / attention_block - 1 before.
    """

    config: Architecture

    @nn.compact
    def __call__(
        self, heads: Heads, cache: Memory | None, cursor: Cursor | None, dropout: Rate | None
    ) -> tuple[Float[Array, "batch time heads width"], Memory | None]:
        """See `Mechanism`."""
        c = self.config
        # A sum is then about as large as what it sums.
        init = nn.initializers.normal(c.attention_block**-0.5)
        shape = (c.attention_rank, c.attention_block)
        projections = [self.param(name, init, shape) for name in ("keys", "values")]
        heads = heads._replace(q=heads.rotate(heads.q), k=heads.rotate(heads.k))
        if cache is not None and cursor is not None:
            return self._extend(heads, cache, cursor, projections)
        time, score = heads.q.shape[1], heads.score
        if score is not None:
            placed = _AtBlockEnds(score.function, c.attention_block, c.attention_rank, time)
            score = dataclasses.replace(score, function=placed)
        k, v = (
            jnp.concatenate([x, _compressed(x, projection)], axis=1)
            for x, projection in zip((heads.k, heads.v), projections, strict=True)
        )
        attend = partial(flash_attention, mask=mask(c, time), score=score)
        how = {"implementation": c.attention_implementation, **of_weights(self, dropout)}
        return attend(heads.q, k, v, **how), None

    def _extend(
        self, heads: Heads, cache: Memory, cursor: Cursor, projections: list[jax.Array]
    ) -> tuple[Float[Array, "batch time heads width"], Memory]:
        """Attend from tokens that follow what the cache holds."""
        c, positions = self.config, heads.positions
        span = spans(positions, blocks(c), c.attention_block)
        (k, v), at, exact = extend(cache.exact, heads.k, heads.v, cursor, Slots(c.attention_block))
        new = zip(cache.compressed, (heads.k, heads.v), projections, strict=True)
        parts = [_add(old, x, projection, span) for old, x, projection in new]
        seen, compressed = zip(*parts, strict=True)
        k, v = (
            jnp.concatenate([sums.astype(x.dtype), x], axis=2)
            for sums, x in zip(seen, (k, v), strict=True)
        )
        block = jnp.repeat(span.seen, c.attention_rank, axis=1)[:, None]
        own = span.own[:, :, None]
        allowed = (block >= 0) & (block < own) & (block > own - blocks(c))
        exactly = own_block(c)(positions[:, :, None], at[:, None]) & (at >= 0)[:, None]
        ends = (block[:, 0] + 1) * c.attention_block - 1
        mixed = attention(
            heads.q,
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            jnp.concatenate([allowed, exactly], axis=2)[:, None],
            scale=heads.q.shape[-1] ** -0.5,
            score=heads.score,
            q_index=positions,
            k_index=jnp.concatenate([ends, at], axis=1),
        )
        return mixed, Memory(exact, KeysAndValues(*compressed))


class Spans(NamedTuple):
    """The blocks of new tokens and those of the cache, by row, counted from the row's first."""

    own: Int[Array, "batch time"]
    """Of each token; negative: padding."""
    phase: Int[Array, "batch time"]
    """Each token's place in it."""
    fresh: Int[Array, "batch blocks"]
    """Blocks that new tokens belong to. The cache may have the beginning of the first."""
    before: Int[Array, "batch places"]
    """In each place of the cache before the new tokens; negative: none."""
    after: Int[Array, "batch places"]
    """The same after them."""

    @property
    def seen(self) -> Int[Array, "batch blocks"]:
        """What there is to see: what the cache has of earlier blocks, and the fresh ones."""
        whole = jnp.where(self.before < self.fresh[:, :1], self.before, -1)
        return jnp.concatenate([whole, self.fresh], axis=1)


def spans(positions: Int[Array, "batch time"], places: int, block: int) -> Spans:
    """See `Spans`."""
    own, time = positions // block, positions.shape[1]

    def newest(last: Int[Array, "batch 1"]) -> Int[Array, "batch places"]:
        return last - (last - jnp.arange(places)) % places

    return Spans(
        own,
        positions % block,
        jnp.maximum(own[:, :1], 0) + jnp.arange(1 + (time + block - 2) // block),
        newest((positions[:, :1] - 1) // block),
        newest(own[:, -1:]),
    )


def _add(
    old: Float[Array, "batch kv_heads slots width"],
    x: Float[Array, "batch time kv_heads width"],
    projection: Float[Array, "rank block"],
    span: Spans,
) -> tuple[Float[Array, "batch kv_heads seen width"], Float[Array, "batch kv_heads slots width"]]:
    """Return the sums of the blocks `span.seen`, and the slots with new tokens added to theirs."""
    batch, kv_heads, _, width = old.shape
    rank = projection.shape[0]
    old = old.reshape(batch, kv_heads, -1, rank, width)
    places = old.shape[2]

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index[:, None, :, None, None], axis=2)

    own = span.own[:, :, None] == span.fresh[:, None]
    weights = projection.T[span.phase][:, :, None]
    weights = jnp.where(own[..., None], weights, 0.0)
    fresh = jnp.einsum("btnr,bthw->bhnrw", weights, x.astype(old.dtype))
    first = span.fresh[:, :1]
    goes_on = jnp.take_along_axis(span.before, first % places, axis=1) == first
    begun = jnp.where(goes_on[:, None, :, None, None], at(old, first % places), 0.0)
    fresh = fresh.at[:, :, :1].add(begun)
    which = span.after - first
    new = jnp.where((which >= 0)[:, None, :, None, None], at(fresh, jnp.maximum(which, 0)), old)
    seen = jnp.concatenate([old, fresh], axis=2)
    return tuple(y.reshape(batch, kv_heads, -1, width) for y in (seen, new))  # type: ignore


def _compressed(
    x: Float[Array, "batch time kv_heads width"], projection: Float[Array, "rank block"]
) -> Float[Array, "batch slots kv_heads width"]:
    """Return the sums of all blocks but the last, which no query sees."""
    batch, time, kv_heads, width = x.shape
    rank, block = projection.shape
    n = (time - 1) // block
    x = x[:, : n * block].reshape(batch, n, block, kv_heads, width)
    sums = jnp.einsum("rj,bnjhw->bnrhw", projection.astype(x.dtype), x)
    return sums.reshape(batch, n * rank, kv_heads, width)


def past(c: Architecture, tokens: int) -> int:
    """Count the tokens before the block of the last one: a block is of use when it is over."""
    return (tokens - 1) // c.attention_block * c.attention_block if tokens else 0


def compressing(c: Architecture, tokens: int) -> int:
    """Count the multiply-adds that bring so many tokens into their blocks' sums."""
    return 2 * c.attention_rank * c.kv_width * tokens


def mixing_cost(c: Architecture, queries: int, start: int) -> int:
    """Count the pairs of queries with exact and compressed keys, and the compressing."""
    end = start + queries
    keys = end + c.attention_rank * (past(c, end) // c.attention_block)
    pairs = masks.allowed_entries(mask(c, end), queries, keys, start)
    return of_pairs(c, pairs) + compressing(c, past(c, end) - past(c, start))


def dense_cost(c: Architecture, queries: int, start: int) -> int:
    """Count all pairs: in one pass, or with all slots."""
    if start == 0:
        keys = queries + c.attention_rank * (past(c, queries) // c.attention_block)
        return of_pairs(c, queries * keys) + compressing(c, past(c, queries))
    # All compressed slots, and those of the token's own block once more as they grow.
    slots = c.attention_block + c.attention_rank * (blocks(c) + 1)
    return of_pairs(c, queries * slots) + compressing(c, queries)


def drawn_cost(c: Architecture, tokens: int, n: int) -> float:
    """Refuse: a router would pick tokens out of blocks, and no config may ask for it."""
    raise AssertionError("a config that draws tokens from this mechanism is refused")


def cache_cost(c: Architecture, number: int) -> int:
    """Count the bytes of a `Memory`."""
    return 2 * c.kv_width * (number * c.attention_block + FLOAT32 * c.attention_rank * blocks(c))


COSTS = AttentionCosts(
    mixing_cost,
    dense_cost,
    drawn_cost,
    cache_cost,
    lambda c: 2 * c.attention_rank * c.attention_block,
)

LINFORMER = Mechanism(LinformerMixing, empty_memory, COSTS)
