"""Dropout by counter: whether a value is kept is a hash of the seed and its indices.

There is no random state to carry, so every implementation, tiling, sharding and `vmap` of an
operation drops the same values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32-bit words in which every input bit moves every output bit.

    Two rounds of xor-shift and multiply (the construction of MurmurHash3's finaliser).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def word(seed: UInt32[Array, ""], *indices: jax.Array) -> UInt32[Array, "*shape"]:
    """32 bits that look random, a hash of the seed and the (broadcast) indices."""
    bits = seed
    for index in indices:
        bits = mix(bits ^ (index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))
    return bits


Rate = float | Float[Array, ""]
"""A share to drop, in [0, 1); it may be traced."""


def drops(rate: Rate) -> bool:
    """Whether anything can be dropped at all, as far as is known before the run."""
    return isinstance(rate, jax.core.Tracer) or bool(rate > 0)


def threshold(rate: Rate) -> UInt32[Array, ""]:
    """What `keep` needs to know of a rate."""
    return (jnp.asarray(rate, jnp.float32) * 2.0**32).astype(jnp.uint32)


def keep(
    seed: UInt32[Array, ""], threshold: UInt32[Array, ""], *indices: jax.Array
) -> Bool[Array, "*shape"]:
    """True with the probability of the `threshold`, decided by seed and (broadcast) indices."""
    return word(seed, *indices) >= threshold


def scaled(x: jax.Array, rate: Rate) -> jax.Array:
    """x / (1 - rate) in the type of x: what is kept stands for what is dropped as well."""
    return (x / (1.0 - rate)).astype(x.dtype)


def dropout(x: jax.Array, seed: UInt32[Array, ""], rate: Rate) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate) (arXiv 1207.0580)."""
    return jnp.where(keep(seed, threshold(rate), *places(x)), scaled(x, rate), 0.0).astype(x.dtype)


def places(x: jax.Array) -> list[UInt32[Array, "*shape"]]:
    """The index of every entry of x, axis by axis."""
    return [jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) for axis in range(x.ndim)]
