"""How a token's place reaches the model: added to its embedding or turned into q and k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.config import ModelConfig
from jaxdecoder.layers.linear import embedding_initializer


class Position(NamedTuple):
    """One way to tell positions apart; each hook may be absent.

    embed: (config, name) -> module from positions to vectors added to the token embeddings.
    rotate: (config, x, positions) -> x, for queries and keys.
    slides: whether positions past the context length mean something, so that decoding may go on
        with a cache; where not, decoding crops to the last context_length tokens and starts over.
    """

    embed: Callable[..., Any] | None = None
    rotate: Callable[..., Any] | None = None
    slides: bool = True


class LearnedPositions(nn.Module):
    """A learned vector for each absolute position (arXiv 1706.03762, section 3.5)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, positions: Int[Array, "*batch time"]) -> Float[Array, "*batch time d_model"]:
        c = self.config
        table = self.param("embedding", embedding_initializer(c), (c.context_length, c.d_model))
        return jnp.take(table, positions, axis=0, mode="clip")


def sinusoidal(config: ModelConfig, name: str | None = None) -> Callable[..., Any]:
    """Fixed sines and cosines, interleaved over the width (arXiv 1706.03762, section 3.5)."""

    def embed(positions: Int[Array, "*batch time"]) -> Float[Array, "*batch time d_model"]:
        even = jnp.arange(0, config.d_model, 2)
        angles = positions[..., None] / config.rope_base ** (even / config.d_model)
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return waves.reshape(*positions.shape, -1)[..., : config.d_model]

    return embed


def rotate(
    config: ModelConfig,
    x: Float[Array, "batch time heads width"],
    positions: Int[Array, "#batch time"],
) -> Float[Array, "batch time heads width"]:
    """Rotary positions (RoFormer, arXiv 2104.09864), pairing coordinate i with i + width / 2."""
    half = x.shape[-1] // 2
    frequencies = config.rope_base ** (-jnp.arange(half) / half)
    angles = (positions[..., None] * frequencies)[:, :, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


POSITIONS: dict[str, Position] = {
    "none": Position(),
    "learned": Position(embed=LearnedPositions, slides=False),
    "sinusoidal": Position(embed=sinusoidal),
    "rope": Position(rotate=rotate),
}
