"""Short convolutions: each token sees the few before it without any attention."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture
from jaxdecoder.layers.costs import Costs
from jaxdecoder.layers.linear import symmetric_uniform


class ShortConvolution(nn.Module):
    """x and a causal depthwise convolution of it (Canon layers, arXiv 2512.17351).

    Feature i of token t gets sum_j taps[i, j] x[t - j, i] over the last convolution_width tokens,
    its own included. What it remembers is the inputs of all of them but the newest.
    """

    config: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time width"],
        positions: Int[Array, "#batch time"],
        cache: Float[Array, "batch before width"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Float[Array, "batch before width"] | None]:
        """Return the sum and, if one came in, the new cache. Negative positions are padding."""
        count, time = self.config.convolution_width, x.shape[1]
        init = symmetric_uniform(count**-0.5)
        taps = self.param("taps", init, (x.shape[-1], count), jnp.float32).astype(self.dtype)
        own = jnp.where(positions[..., None] >= 0, x, 0)
        before = jnp.zeros_like(x, shape=(len(x), count - 1, x.shape[-1]))
        seen = jnp.concatenate([before if cache is None else cache.astype(x.dtype), own], axis=1)
        out = x
        for j in range(count):
            start = count - 1 - j
            out = out + taps[:, j] * seen[:, start : start + time]
        return out, None if cache is None else seen[:, time:].astype(cache.dtype)


def empty_cache(
    config: Architecture, batch: int, dtype: DTypeLike
) -> Float[Array, "batch before d_model"]:
    """Return the cache of a convolution that has seen nothing."""
    return jnp.zeros((batch, config.convolution_width - 1, config.d_model), dtype)


def count(c: Architecture) -> int:
    """Count the convolutions of all blocks, one a branch."""
    return c.n_layers * (2 if c.feed_forward else 1) if c.convolution_width else 0


def taps(c: Architecture) -> int:
    """Count the taps of all convolutions; each is a multiply-add a token."""
    return count(c) * c.convolution_width * c.d_model


COSTS = Costs(
    taps, taps, lambda c, number: number * count(c) * (c.convolution_width - 1) * c.d_model
)
