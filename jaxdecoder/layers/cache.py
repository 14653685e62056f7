"""What decoding remembers: keys and values in a ring of slots.

A batch of prompts of different lengths is padded on the left, so that all rows write the same slot
at the same time. Token number i of the stream (padding included) goes to slot i mod slots; row b's
first real token is number `start[b]`, and a token's position is its number minus that.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """Keys and values of one layer, heads before slots: as the products of decoding read them."""

    k: Float[Array, "batch kv_heads slots width"]
    v: Float[Array, "batch kv_heads slots width"]

    @property
    def slots(self) -> int:
        """Tokens there is room for."""
        return self.k.shape[2]


Caches = tuple[LayerCache, ...]
"""One a layer, in their order."""


class Cursor(NamedTuple):
    """Where in the stream a cache stands; shared by all layers."""

    length: Int[Array, ""]
    """Tokens seen so far, padding included."""
    start: Int[Array, "batch"]
    """Number of each row's first real token."""

    def query_positions(self, time: int) -> Int[Array, "batch time"]:
        """Positions of the next `time` tokens; negative ones are padding."""
        return self.length + jnp.arange(time) - self.start[:, None]

    def slot_positions(self, time: int, slots: int) -> Int[Array, "batch slots"]:
        """Positions held by the slots once the next `time` tokens are written; negative: none."""
        newest = self.length + time - 1
        number = newest - (newest - jnp.arange(slots)) % slots
        return jnp.where(number >= 0, number - self.start[:, None], -1)


class Cache(NamedTuple):
    """The decoding state of a whole decoder."""

    cursor: Cursor
    layers: Caches


def write(
    cache: LayerCache,
    k: Float[Array, "batch time kv_heads width"],
    v: Float[Array, "batch time kv_heads width"],
    cursor: Cursor,
) -> LayerCache:
    """Puts `time` new tokens into their slots. More than one at once must not wrap around."""
    at = (0, 0, cursor.length % cache.slots, 0)
    k, v = (x.swapaxes(1, 2).astype(cache.k.dtype) for x in (k, v))
    return LayerCache(
        jax.lax.dynamic_update_slice(cache.k, k, at), jax.lax.dynamic_update_slice(cache.v, v, at)
    )
