"""Dynamic depth: how many of the blocks a token passes.

A decoder of fixed depth spends as much on every token. With early exits a token that is decoded
stops as soon as the model is confident of the next one; in a mixture of depths the routers of some
blocks choose the tokens that these blocks take, and the others pass by.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdecoder.config import Architecture, ModelConfig
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.layers.block import Block, Stream
from jaxdecoder.layers.body import Head
from jaxdecoder.layers.cache import Caches, Cursor
from jaxdecoder.layers.costs import Costs


class Depth(NamedTuple):
    """How deep tokens go.

    exits: (config) -> the depths, in blocks passed, at which a token may stop, each with its share
        of the training loss. The last is that of all blocks, and the shares are 1 together.
    routed: (config) -> whether each block of a turn, which repeats over the depth, has a router.
    """

    exits: Callable[[ModelConfig], dict[int, float]]
    routed: Callable[[ModelConfig], tuple[bool, ...]]


def last_only(config: ModelConfig) -> dict[int, float]:
    """All tokens pass all blocks."""
    return {config.n_layers: 1.0}


def early_exits(config: ModelConfig) -> dict[int, float]:
    """An exit after exit_minimum blocks and after every exit_every from there on.

    All are trained through the one norm and head that they share (LayerSkip, arXiv 2404.16710).
    The loss at depth d weighs as d to the power exit_loss_power, so that the full depth has the
    largest say; 1 gives the weights of CALM (arXiv 2207.07061).
    """
    c = config
    depths = (*range(c.exit_minimum, c.n_layers, c.exit_every), c.n_layers)
    weights = {depth: float(depth) ** c.exit_loss_power for depth in depths}
    total = sum(weights.values())
    return {depth: weight / total for depth, weight in weights.items()}


def none_routed(config: ModelConfig) -> tuple[bool, ...]:
    """Every block takes every token."""
    return (False,)


def last_routed(config: ModelConfig) -> tuple[bool, ...]:
    """The last of every mod_every blocks has a router."""
    return (*[False] * (config.mod_every - 1), True)


DEPTHS: dict[str, Depth] = {
    "fixed": Depth(last_only, none_routed),
    "early_exit": Depth(early_exits, none_routed),
    "mixture_of_depths": Depth(last_only, last_routed),
}


def exits_of(config: ModelConfig) -> dict[int, float]:
    """Return the depths at which a token may stop, each with its share of the training loss."""
    return DEPTHS[config.depth].exits(config)


# --- Early exits ---------------------------------------------------------------------------------

BlockStep = Callable[[Stream, PyTree], tuple[Stream, PyTree]]
"""(residual stream, the block's cache) -> both after it."""


def probability(logits: Float[Array, "*rows vocab"]) -> Float[Array, "*rows"]:
    """Return that of the likeliest token."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return 1.0 / jnp.sum(jnp.exp(logits - largest), axis=-1)


def margin(logits: Float[Array, "*rows vocab"]) -> Float[Array, "*rows"]:
    """Return by how much the likeliest token beats the second (arXiv 2207.07061)."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # Without the one likeliest, so that of two that are equally likely one remains.
    others = jnp.arange(logits.shape[-1]) != jnp.argmax(logits, axis=-1)[..., None]
    second = jnp.max(jnp.where(others, logits, -jnp.inf), axis=-1, keepdims=True)
    return probability(logits) * (1.0 - jnp.exp(second - largest)[..., 0])


CONFIDENCES: dict[str, Callable[[Float[Array, "*rows vocab"]], Float[Array, "*rows"]]] = {
    "probability": probability,
    "margin": margin,
}


class Stopping(NamedTuple):
    """Where a row of a batch is on its way up, one token each."""

    x: Float[Array, "batch 1 d_model"]
    logits: Float[Array, "batch 1 vocab"]
    """What the head said at the last exit."""
    going: Bool[Array, "batch"]
    depth: Int[Array, "batch"]
    """Blocks passed."""


def stop_early(
    config: Architecture,
    blocks: Sequence[BlockStep],
    head: Head,
    x: Float[Array, "batch 1 d_model"],
    caches: Caches,
) -> tuple[Stopping, Caches]:
    """Take one token of each row through the blocks, until it is sure of the next.

    A row that has stopped keeps its residual stream, from which the blocks it skips take the keys
    and values that later tokens will look for (the state propagation of CALM, arXiv 2207.07061).
    Once all rows have stopped, nothing else is computed.

    This is a chain of conditionals over unrolled blocks, not a loop over layers: on CPUs a loop
    that slices stacked weights, and one that switches between blocks, through which XLA copies
    every cache, both took longer at every depth.
    """
    exits = exits_of(config)
    confidence = CONFIDENCES[config.exit_confidence]

    def go_on(first: int, last: int, s: Stopping, own: Caches) -> tuple[Stopping, Caches]:
        stream, extended = s.x, []
        for block, cache in zip(blocks[first:last], own, strict=True):
            out, cache = block(stream, cache)
            stream = jnp.where(s.going[:, None, None], out, stream)
            extended.append(cache)
        logits = jnp.where(s.going[:, None, None], head(stream), s.logits)
        going = s.going & (confidence(logits)[:, 0] <= config.exit_threshold)
        return Stopping(stream, logits, going, jnp.where(s.going, last, s.depth)), tuple(extended)

    def skip(first: int, last: int, s: Stopping, own: Caches) -> tuple[Stopping, Caches]:
        # XLA leaves out what only the discarded outputs need.
        return s, tuple(
            block(s.x, cache)[1] for block, cache in zip(blocks[first:last], own, strict=True)
        )

    rows = len(x)
    unknown = jnp.zeros_like(head(x))
    state = Stopping(x, unknown, jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32))
    extended: Caches = ()
    for first, last in itertools.pairwise((0, *exits)):
        ways = [functools.partial(way, first, last) for way in (go_on, skip)]
        state, own = jax.lax.cond(jnp.any(state.going), *ways, state, caches[first:last])
        extended += own
    return state, extended


# --- Mixture of depths ---------------------------------------------------------------------------


class RoutedCache(NamedTuple):
    """The cache of a block with a router."""

    layer: PyTree
    """That of its attention mechanism."""
    taken: Bool[Array, "batch context"]
    """Whether the block took token number i of the stream, at i mod context."""


class Routed(nn.Module):
    """A block that takes some of the tokens (mixture of depths, arXiv 2404.02258).

    A linear router scores every token. In training the block takes those of the highest scores of
    each sequence, mod_capacity of them, and computes them alone, attention among themselves
    included. Which tokens these are depends on later ones, so elsewhere a token is taken if its own
    score is positive, which a binary cross-entropy teaches the router to say. What is taken goes a
    share sigmoid(score) of the way from its input to the block's output, so that the router learns
    from the model's loss too; the paper has the score itself as the factor.
    """

    config: Architecture
    mechanism: str = "full"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Stream,
        positions: Int[Array, "#batch time"],
        cache: RoutedCache | None = None,
        cursor: Cursor | None = None,
        dropout: Rate | None = None,
    ) -> tuple[Stream, RoutedCache | None, Float[Array, "batch time"]]:
        """Return the new residual stream, the extended cache, if any, and the router's loss."""
        c = self.config
        block = Block(c, self.mechanism, self.dtype, name="block")
        # Always with a bias: the share of tokens to take is far from a half.
        router = nn.Dense(1, kernel_init=nn.initializers.normal(c.init_std), name="router")
        score = router(x.astype(jnp.float32))[..., 0]
        taken = score > 0
        if dropout is not None:
            taken, chosen = top_tokens(score, capacity(c, x.shape[1]))
            positions = jnp.broadcast_to(positions, x.shape[:2])
            rows = jnp.arange(len(x))[:, None]
            of_these = x[rows, chosen]
            at = positions[rows, chosen]
            out, _ = block(of_these, at, dropout=dropout, seen=lambda k_positions: k_positions >= 0)
            new = x.at[rows, chosen].set(_towards(of_these, out, score[rows, chosen]))
        elif cache is None or cursor is None:
            out, _ = block(x, positions, seen=lambda k_positions: taken)
            new = jnp.where(taken[..., None], _towards(x, out, score), x)
        else:
            new, cache = self._extend(block, x, positions, cache, cursor, score)
        self.sow("intermediates", "taken", taken)
        return new, cache, optax.sigmoid_binary_cross_entropy(score, taken)

    def _extend(
        self,
        block: Block,
        x: Stream,
        positions: Int[Array, "batch time"],
        cache: RoutedCache,
        cursor: Cursor,
        score: Float[Array, "batch time"],
    ) -> tuple[Stream, RoutedCache]:
        """Take tokens that follow what the cache holds; if it takes none, nothing is done."""
        taken, context = score > 0, cache.taken.shape[1]
        at = (0, cursor.length % context)
        ever_taken = jax.lax.dynamic_update_slice(cache.taken, taken, at)

        def seen(k_positions: Int[Array, "batch keys"]) -> Bool[Array, "batch keys"]:
            numbers = (k_positions + cursor.start[:, None]) % context
            return jnp.take_along_axis(ever_taken, numbers, axis=1)

        def enter(block: Block, x: Stream, layer: PyTree) -> tuple[Stream, PyTree]:
            out, layer = block(x, positions, layer, cursor, seen=seen)
            return jnp.where(taken[..., None], _towards(x, out, score), x), layer

        ways = enter, lambda block, x, layer: (x, layer)
        new, layer = nn.cond(jnp.any(taken), *ways, block, x, cache.layer)
        return new, RoutedCache(layer, ever_taken)


def capacity(config: ModelConfig, tokens: int) -> int:
    """Return how many of so many tokens a routed block takes in training."""
    return max(1, round(config.mod_capacity * tokens))


def top_tokens(
    score: Float[Array, "batch time"], count: int
) -> tuple[Bool[Array, "batch time"], Int[Array, "batch count"]]:
    """Return where each row's `count` highest scores are, and their indices in order."""
    chosen = jnp.sort(jax.lax.top_k(score, count)[1])
    rows = jnp.arange(len(score))[:, None]
    return jnp.zeros(score.shape, bool).at[rows, chosen].set(True), chosen


def _towards(x: Stream, out: Stream, score: Float[Array, "batch time"]) -> Stream:
    return x + nn.sigmoid(score)[..., None].astype(x.dtype) * (out - x)


def routers(c: Architecture) -> int:
    """Count the blocks that have a router."""
    routed = DEPTHS[c.depth].routed(c)
    return c.n_layers // len(routed) * sum(routed)


COSTS = Costs(
    lambda c: routers(c) * (c.d_model + 1),
    lambda c: routers(c) * c.d_model,
    # A byte a token: whether the block took it.
    lambda c, number: routers(c) * c.context_length,
)
