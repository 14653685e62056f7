"""The parallel layout: stacks of decoder layers that stand side by side.

The layers of a stack read the same input and run as one computation, batched over their
parameters; each gives a narrow slice of the features, and the stack goes on with all slices in a
row. Depth is the number of stacks, not of layers. The idea and its shapes are a public system's,
which has no paper; docs/variants.md relates its parameter count to this one's.
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
from jaxdecoder.layers import feed_forward, tree
from jaxdecoder.layers.attention import ATTENTIONS, Attention
from jaxdecoder.layers.block import PLACEMENTS, residual
from jaxdecoder.layers.body import Head, Layout, Passed
from jaxdecoder.layers.cache import Caches, Cursor
from jaxdecoder.layers.costs import Kernels
from jaxdecoder.layers.dropout import Dropout
from jaxdecoder.layers.feed_forward import FeedForward
from jaxdecoder.layers.linear import linear
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.remat import nested, unit

WIDENING = 4
"""The last stack, and so what the head sees, is this many times d_model wide."""


class SliceLayer(nn.Module):
    """Attention on the stream, then a slice of features: skip(h) + narrow(feed_forward(h))."""

    config: Architecture
    mechanism: str
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        cache: PyTree,
        cursor: Cursor | None,
        dropout: Rate | None,
    ) -> tuple[Float[Array, "batch time slice"], PyTree]:
        """Return the slice and, if one came in, the extended cache."""
        c = self.config

        def stream(layer: SliceLayer, x: jax.Array, cache: PyTree) -> tuple[jax.Array, PyTree]:
            def attend(h: jax.Array) -> jax.Array:
                nonlocal cache
                module = Attention(c, self.mechanism, self.dtype, name="attention")
                out, cache = module(h, positions, cache, cursor, dropout=dropout)
                return out

            norm = partial(NORMS[c.norm].new, c, self.dtype)
            h = PLACEMENTS[c.norm_placement].wire(x, [("attention", attend)], norm, residual(c))
            return h, cache

        def narrow(layer: SliceLayer, h: jax.Array) -> jax.Array:
            project = partial(linear, c, c.d_model, self.width, bias=c.bias, dtype=self.dtype)
            if not c.feed_forward:
                return project(name="skip")(h)
            out = project(name="narrow")(FeedForward(c, self.dtype, name="feed_forward")(h))
            out = Dropout()(out, dropout)
            return project(name="skip")(h) + out if c.has_residual("feed_forward") else out

        # Apart, so that only one of the two has its activations there in the backward pass.
        h, cache = unit(c, stream)(self, x, cache)
        return unit(c, narrow)(self, h), cache


class SideBySide(nn.Module):
    """As many layers side by side as the attention pattern has mechanisms."""

    config: Architecture
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        dropout: Rate | None,
    ) -> tuple[Float[Array, "batch time slices"], Caches | None]:
        """Return the slices in a row, and the layers' caches."""
        slices, extended = [], []
        for i, mechanism in enumerate(self.config.attention_pattern):
            layer = SliceLayer(self.config, mechanism, self.width, self.dtype, name=tree.block(i))
            cache = None if caches is None else caches[i]
            out, cache = layer(x, positions, cache, cursor, dropout)
            slices.append(out)
            extended.append(cache)
        return jnp.concatenate(slices, axis=-1), None if caches is None else tuple(extended)


class Stack(nn.Module):
    """Layers side by side, their slices in a row, a feed-forward over all of them, and a norm."""

    config: Architecture
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        dropout: Rate | None,
    ) -> tuple[Float[Array, "batch time width"], Caches | None]:
        """Return the features and the caches, each with a leading axis over the pattern's turns."""
        c = self.config
        blocks = nn.vmap(
            SideBySide,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(None, None, 0, None, None),
            axis_size=n_turns(c),
        )(c, self.width // c.layers_side_by_side, self.dtype, name=tree.BLOCKS)
        slices, caches = blocks(x, positions, caches, cursor, dropout)
        x = jnp.moveaxis(slices, 0, -2).reshape(*x.shape[:-1], self.width)
        if c.feed_forward:
            d_ff = c.d_ff * (self.width // c.d_model)
            x = FeedForward(c, self.dtype, d_ff, name="feed_forward")(x)
        return NORMS[c.norm].new(c, self.dtype, name="norm")(x), caches


class ParallelStacks(nn.Module):
    """A norm, then stacks one after another; all but the first have a norm of their own before.

    A batched product reads the weights where they lie, so decoding takes them as they are.
    """

    config: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        dropout: Rate | None,
        head: Head | None = None,
    ) -> Passed:
        """See `Body`; there is a tuple of caches for each stack, and no exit to ask the head at."""
        c = self.config
        extended = []
        for i in range(c.n_stacks):
            last = i == c.n_stacks - 1
            x = NORMS[c.norm].new(c, self.dtype, name=f"norm_{i}")(x)
            known = () if isinstance(dropout, jax.Array) else 5
            whole = nested(c, Stack, static_argnums=known)
            stack = whole(c, width(c) if last else c.d_model, self.dtype, name=tree.stack(i))
            own = None if caches is None else caches[i]
            x, own = stack(x, positions, own, cursor, dropout)
            self.sow("intermediates", tree.after(tree.stack(i)), x)
            extended.append(own)
        return Passed(x, None if caches is None else tuple(extended))


def width(config: Architecture) -> int:
    """Return how wide the features are that the head sees."""
    return WIDENING * config.d_model


def n_turns(config: Architecture) -> int:
    """Return how often the attention pattern repeats within a stack."""
    return config.layers_side_by_side // len(config.attention_pattern)


def empty_caches(config: Architecture, batch: int, dtype: DTypeLike) -> Caches:
    """Return the caches of all stacks, with nothing in them."""

    def empty(name: str) -> PyTree:
        cache = ATTENTIONS[name].empty_cache(config, batch, dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n_turns(config), *x.shape)), cache)

    return tuple(tuple(map(empty, config.attention_pattern)) for _ in range(config.n_stacks))


def factors(c: Architecture) -> list[int]:
    """Return the widths of the stacks, in multiples of d_model."""
    return [1] * (c.n_stacks - 1) + [WIDENING]


def kernels(c: Architecture) -> dict[str, list[Kernels]]:
    """Return a feed-forward a layer and a stack, and the projections to slices."""
    layers = c.layers_side_by_side
    projections = layers * (2 if c.feed_forward and c.has_residual("feed_forward") else 1)
    wider = (kernel for factor in factors(c) for kernel in feed_forward.kernels(c, 1, factor))
    return {
        "feed_forward": [*feed_forward.kernels(c, c.n_layers), *wider],
        "slices": [Kernels(projections, c.d_model, n * c.d_model // layers) for n in factors(c)],
    }


def norms(c: Architecture) -> int:
    """Count those of the layers, and of the stacks one before and one after."""
    return c.n_layers * PLACEMENTS[c.norm_placement].norms(1) + c.n_stacks + sum(factors(c))


STACKS = Layout(ParallelStacks, lambda body: body, empty_caches, width, kernels, norms)
