"""How a token's place reaches the model: by its embedding, its queries and keys, or their score."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture
from jaxdecoder.kernels import scores
from jaxdecoder.layers.costs import nothing
from jaxdecoder.layers.linear import embedding_initializer


class Position(NamedTuple):
    """One way to tell positions apart; each hook may be absent.

    embed: (config, name) -> module from positions to vectors added to the token embeddings.
    rotate: (config, x, positions) -> x, for queries and keys.
    score: (config, name) -> module without arguments that gives the `Score` of a layer; it tells
        the positions of a query and of a key to the score of the two.
    slides: whether positions past the context length mean something, so that decoding may go on
        with a cache; where not, decoding crops to the last context_length tokens and starts over.
    parameters: (config) -> how many the positions of the whole model have.
    """

    embed: Callable[..., Callable[[jax.Array], jax.Array]] | None = None
    rotate: Callable[[Architecture, jax.Array, jax.Array], jax.Array] | None = None
    score: Callable[..., Callable[[], scores.Score]] | None = None
    slides: bool = True
    parameters: Callable[[Architecture], int] = nothing


class LearnedPositions(nn.Module):
    """A learned vector for each absolute position (arXiv 1706.03762, section 3.5)."""

    config: Architecture

    @nn.compact
    def __call__(self, positions: Int[Array, "*batch time"]) -> Float[Array, "*batch time d_model"]:
        c = self.config
        table = self.param("embedding", embedding_initializer(c), (c.context_length, c.d_model))
        return jnp.take(table, positions, axis=0, mode="clip")


def sinusoidal(config: Architecture, name: str | None = None) -> Callable[[jax.Array], jax.Array]:
    """Fixed sines and cosines, interleaved over the width (arXiv 1706.03762, section 3.5)."""

    def embed(positions: Int[Array, "*batch time"]) -> Float[Array, "*batch time d_model"]:
        even = jnp.arange(0, config.d_model, 2)
        angles = positions[..., None] / config.rope_base ** (even / config.d_model)
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return waves.reshape(*positions.shape, -1)[..., : config.d_model]

    return embed


def rotate(
    config: Architecture,
    x: Float[Array, "batch time heads width"],
    positions: Int[Array, "#batch time"],
) -> Float[Array, "batch time heads width"]:
    """Rotary positions (RoFormer, arXiv 2104.09864), pairing coordinate i with i + rope_width / 2.

    Coordinates from rope_width on stay as they are (GPT-J). Positions divided by rope_scaling
    stretch the context that the frequencies were trained on (arXiv 2306.15595).
    """
    width = config.rope_width
    half = width // 2
    frequencies = config.rope_base ** (-jnp.arange(half) / half) / config.rope_scaling
    angles = (positions[..., None] * frequencies)[:, :, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b, rest = x[..., :half], x[..., half:width], x[..., width:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def alibi(config: Architecture, name: str | None = None) -> Callable[[], scores.Score]:
    """Subtracts a fixed slope a head times the distance (ALiBi, arXiv 2108.12409)."""
    return lambda: scores.alibi(scores.alibi_slopes(config.n_heads))


class RelativeBias(nn.Module):
    """A learned number for every head and bucket of distances (T5, arXiv 1910.10683).

    T5 shares one table among all layers and does not scale its scores; here each layer has its
    own, and scores are scaled as everywhere.
    """

    config: Architecture

    @nn.compact
    def __call__(self) -> scores.Score:
        c = self.config
        table = self.param("bias", embedding_initializer(c), (c.n_heads, c.position_buckets))
        return scores.relative_bias(table, c.position_max_distance)


POSITIONS: dict[str, Position] = {
    "none": Position(),
    "learned": Position(
        embed=LearnedPositions, slides=False, parameters=lambda c: c.context_length * c.d_model
    ),
    "sinusoidal": Position(embed=sinusoidal),
    "rope": Position(rotate=rotate),
    "alibi": Position(score=alibi),
    "t5": Position(
        score=RelativeBias, parameters=lambda c: c.n_layers * c.n_heads * c.position_buckets
    ),
}
