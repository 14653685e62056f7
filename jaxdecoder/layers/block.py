"""A decoder block: how its two branches, its norms and the residual stream are wired."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdecoder.config import Architecture
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.layers import convolution
from jaxdecoder.layers.attention import ATTENTIONS, Attention
from jaxdecoder.layers.cache import Cursor
from jaxdecoder.layers.convolution import ShortConvolution
from jaxdecoder.layers.dropout import Dropout
from jaxdecoder.layers.feed_forward import FeedForward
from jaxdecoder.layers.mechanism import Seen
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.remat import nested

Stream = Float[Array, "batch time d_model"]
Branch = tuple[str, Callable[[jax.Array], jax.Array]]
NewNorm = Callable[[str], Callable[[jax.Array], jax.Array]]
Add = Callable[[str, jax.Array, jax.Array], jax.Array]
"""(branch, its input, its output) -> the two added, where the branch has a residual connection."""


def pre(x: Stream, branches: list[Branch], norm: NewNorm, add: Add) -> Stream:
    """x + f(norm(x)): GPT-2 (arXiv 2002.04745)."""
    for name, branch in branches:
        x = add(name, x, branch(norm(f"{name}_norm")(x)))
    return x


def post(x: Stream, branches: list[Branch], norm: NewNorm, add: Add) -> Stream:
    """norm(x + f(x)): the first transformer (arXiv 1706.03762)."""
    for name, branch in branches:
        x = norm(f"{name}_norm")(add(name, x, branch(x)))
    return x


def sandwich(x: Stream, branches: list[Branch], norm: NewNorm, add: Add) -> Stream:
    """x + norm(f(norm(x))) (CogView, arXiv 2105.13290)."""
    for name, branch in branches:
        x = add(name, x, norm(f"{name}_out_norm")(branch(norm(f"{name}_norm")(x))))
    return x


def parallel(x: Stream, branches: list[Branch], norm: NewNorm, add: Add) -> Stream:
    """x + attention(norm(x)) + feed_forward(norm(x)), with one norm (GPT-J)."""
    normed = norm("norm")(x)
    first, *others = (branch(normed) for _, branch in branches)
    return add(branches[0][0], x, sum(others, first))


def unnormed(x: Stream, branches: list[Branch], norm: NewNorm, add: Add) -> Stream:
    """x + f(x): no norms inside the blocks; the one before the head stays."""
    for name, branch in branches:
        x = add(name, x, branch(x))
    return x


def residual(config: Architecture) -> Add:
    """Return what a config's residual connections do."""
    return lambda branch, x, y: x + y if config.has_residual(branch) else y


class Placement(NamedTuple):
    """Where the norms stand around the residual branches."""

    wire: Callable[[Stream, list[Branch], NewNorm, Add], Stream]
    norms: Callable[[int], int]
    """(branches) -> how many norms a block has."""


PLACEMENTS: dict[str, Placement] = {
    "pre": Placement(pre, lambda branches: branches),
    "post": Placement(post, lambda branches: branches),
    "sandwich": Placement(sandwich, lambda branches: 2 * branches),
    "parallel": Placement(parallel, lambda branches: 1),
    "none": Placement(unnormed, lambda branches: 0),
}


class Convolved(NamedTuple):
    """The cache of a block whose branches read through short convolutions."""

    layer: PyTree
    """That of its attention mechanism."""
    attention: Float[Array, "batch before d_model"] | None
    feed_forward: Float[Array, "batch before d_model"] | None


def empty_cache(config: Architecture, mechanism: str, batch: int, dtype: DTypeLike) -> PyTree:
    """Return the cache of a block that has seen nothing."""
    layer = ATTENTIONS[mechanism].empty_cache(config, batch, dtype)
    if not config.convolution_width:
        return layer
    seen = convolution.empty_cache(config, batch, dtype)
    return Convolved(layer, seen, seen if config.feed_forward else None)


class Block(nn.Module):
    """Attention, then feed-forward, on the residual stream."""

    config: Architecture
    mechanism: str = "full"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Stream,
        positions: Int[Array, "#batch time"],
        cache: PyTree = None,
        cursor: Cursor | None = None,
        dropout: Rate | None = None,
        seen: Seen | None = None,
    ) -> tuple[Stream, PyTree]:
        """Return the new residual stream and, if one came in, the extended cache."""
        c = self.config
        parts = cache if isinstance(cache, Convolved) else Convolved(cache, None, None)

        def read(branch: str, h: Stream) -> Stream:
            nonlocal parts
            if not c.convolution_width:
                return h
            module = ShortConvolution(c, self.dtype, name=f"{branch}_convolution")
            h, kept = module(h, positions, getattr(parts, branch))
            parts = parts._replace(**{branch: kept})
            return h

        def attend(h: Stream) -> Stream:
            nonlocal parts
            h = read("attention", h)
            module = Attention(c, self.mechanism, self.dtype, name="attention")
            out, layer = module(h, positions, parts.layer, cursor, dropout=dropout, seen=seen)
            parts = parts._replace(layer=layer)
            return out

        def feed_forward(h: Stream) -> Stream:
            h = read("feed_forward", h)
            out = FeedForward(c, self.dtype, name="feed_forward")(h)
            return Dropout()(out, dropout)

        def branch(name: str, function: Callable[[Stream], Stream]) -> Branch:
            if cache is not None:  # decoding has no backward pass
                return name, function
            return name, partial(nested(c, lambda block, h: function(h)), self)

        branches = [branch("attention", attend)]
        if c.feed_forward:
            branches.append(branch("feed_forward", feed_forward))
        norm = partial(NORMS[c.norm].new, c, self.dtype)
        x = PLACEMENTS[c.norm_placement].wire(x, branches, norm, residual(c))
        return x, parts if isinstance(cache, Convolved) else parts.layer
