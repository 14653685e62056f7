"""Dropout by counter: whether a value is kept is a hash of the seed and its indices.

There is no random state to carry, so every implementation, tiling, sharding and `vmap` of an
operation drops the same values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxdecoder.kernels.typing import AnyArray


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Map 32-bit words one to one, so that every input bit moves every output bit.

    Two rounds of xor-shift and multiply, as in MurmurHash3's finaliser.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def word(seed: UInt32[Array, ""], *indices: AnyArray) -> UInt32[Array, "*shape"]:
    """Return 32 bits that look random: a hash of the seed and the (broadcast) indices."""
    bits = seed
    for index in indices:
        bits = mix(bits ^ (index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))
    return bits


Rate = float | Float[Array, ""]
"""A share to drop, in [0, 1); it may be traced."""


def drops(rate: Rate) -> bool:
    """Return whether anything can be dropped, as far as is known before the run."""
    return isinstance(rate, jax.core.Tracer) or bool(rate > 0)


def threshold(rate: Rate) -> UInt32[Array, ""]:
    """Return the number that `keep` compares hashes to: rate * 2^32."""
    return (jnp.asarray(rate, jnp.float32) * 2.0**32).astype(jnp.uint32)


def keep(
    seed: UInt32[Array, ""], threshold: UInt32[Array, ""], *indices: AnyArray
) -> Bool[Array, "*shape"]:
    """Return True with probability 1 - threshold / 2^32, by `word` of seed and indices."""
    return word(seed, *indices) >= threshold


def scaled(x: jax.Array, rate: Rate) -> jax.Array:
    """Return x / (1 - rate) in the type of x, so that the expected sum stays the same."""
    return (x / (1.0 - rate)).astype(x.dtype)


def dropout(x: jax.Array, seed: UInt32[Array, ""], rate: Rate) -> jax.Array:
    """Zero a share `rate` of x and scale the rest by 1 / (1 - rate) (arXiv 1207.0580)."""
    return jnp.where(keep(seed, threshold(rate), *places(x)), scaled(x, rate), 0.0).astype(x.dtype)


def places(x: jax.Array) -> list[UInt32[Array, "*shape"]]:
    """Return the index of every entry of x along each axis, one array for each axis."""
    return [jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) for axis in range(x.ndim)]
