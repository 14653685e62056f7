"""Copying: a head that points at earlier tokens, so that they come again."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture
from jaxdecoder.layers.cache import Cursor, Parts
from jaxdecoder.layers.costs import Costs, Kernels
from jaxdecoder.layers.linear import linear
from jaxdecoder.layers.masked import MASKED, mechanism
from jaxdecoder.layers.mechanism import Heads

POINTED = 0.25
"""How much of what it points at the head adds at first, in units of the normalised embedding."""

FULL = mechanism(MASKED["full"])


class Copying(nn.Module):
    """What the head of the vocabulary sees, and the embeddings of the tokens pointed at.

    One attention head as wide as the stream looks back at all tokens read so far; its values are
    their embeddings, brought to unit mean square. A gate of its own says how much of them is added
    to the features. A tied head then finds just these tokens more likely. In a layer of attention
    copying pays only once values, outputs and queries have all come to fit; here it pays from the
    first step on, so that names are kept after hundreds of steps instead of many thousands.

    It is a pointer network (arXiv 1506.03134, 1609.07843) that mixes features rather than
    probabilities: whatever reads features (the loss in chunks, distillation, a packed head) need
    not know of it.
    """

    config: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "batch time d_model"],
        embedded: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        cache: Parts | None = None,
        cursor: Cursor | None = None,
    ) -> tuple[Float[Array, "batch time d_model"], Parts | None]:
        """Return the new features and, if one came in, the extended cache.

        `embedded` are the tokens' rows of the embedding, without their positions.
        """
        c, width = self.config, self.config.d_model
        batch, time, _ = features.shape

        def project(name: str) -> Float[Array, "batch time 1 d_model"]:
            dense = linear(c, width, width, bias=False, dtype=self.dtype, name=name)
            return dense(features).reshape(batch, time, 1, width)

        # The embedding learns as the head's kernel; as a value it is taken as it is.
        value = jax.lax.stop_gradient(embedded).astype(jnp.float32)
        value *= jax.lax.rsqrt(jnp.mean(jnp.square(value), axis=-1, keepdims=True) + c.norm_epsilon)
        q, k, v = project("query"), project("key"), value.astype(self.dtype)[:, :, None]
        heads = Heads(q, k, v, positions, rotate=lambda x: x, score=None)
        mixing = FULL.mixing(head(c), name="mixing")
        pointed, cache = mixing(heads, cache, cursor, None)
        init, bias = nn.initializers.normal(c.init_std), nn.initializers.constant(POINTED)
        gate = nn.Dense(1, dtype=self.dtype, kernel_init=init, bias_init=bias, name="gate")
        return features + gate(features) * pointed[:, :, 0], cache


def head(c: Architecture) -> Architecture:
    """Return what its one attention head is like, in a config's terms."""
    return replace(c, n_heads=1, n_kv_heads=1, d_head=c.d_model, position="none")


def empty_cache(config: Architecture, batch: int, dtype: DTypeLike) -> Parts:
    """Return the cache of a head that has seen nothing to point at."""
    return FULL.empty_cache(head(config), batch, dtype)


def weights(c: Architecture) -> int:
    """Count the weights of query, key and gate; each is a multiply-add a token."""
    return c.copying * (2 * c.d_model**2 + c.d_model)


def pairs(c: Architecture, queries: int, start: int, dense: bool) -> int:
    """Count the multiply-adds of what so many queries from `start` on point at."""
    count = FULL.costs.dense if dense else FULL.costs.mixing
    return c.copying * count(head(c), queries, start)


COSTS = Costs(
    lambda c: weights(c) + c.copying,
    weights,
    lambda c, number: c.copying * FULL.costs.cache(head(c), number),
    pairs,
    lambda c: [Kernels(2, c.d_model, c.d_model)] if c.copying else [],
)
