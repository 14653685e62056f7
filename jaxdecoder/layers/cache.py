"""What decoding remembers: mostly keys and values in a ring of slots.

A batch of prompts of different lengths is padded on the left, so that all rows write the same slot
at the same time. Token number i of the stream (padding included) goes to slot i mod slots; row b's
first real token is number `start[b]`, and a token's position is its number minus that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.config import ModelConfig


class KeysAndValues(NamedTuple):
    """Keys and values of one layer, heads before slots: as the products of decoding read them."""

    k: Float[Array, "batch kv_heads slots width"]
    v: Float[Array, "batch kv_heads slots width"]

    @property
    def slots(self) -> int:
        """Tokens there is room for."""
        return self.k.shape[2]


Caches = tuple[Any, ...]
"""One a layer, in their order; each as its mechanism has it."""


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
    cache: KeysAndValues,
    k: Float[Array, "batch time kv_heads width"],
    v: Float[Array, "batch time kv_heads width"],
    cursor: Cursor,
) -> KeysAndValues:
    """Puts `time` new tokens into their slots. More than one at once must not wrap around."""
    at = (0, 0, cursor.length % cache.slots, 0)
    k, v = (x.swapaxes(1, 2).astype(cache.k.dtype) for x in (k, v))
    return KeysAndValues(
        jax.lax.dynamic_update_slice(cache.k, k, at), jax.lax.dynamic_update_slice(cache.v, v, at)
    )


def empty_ring(config: ModelConfig, batch: int, dtype: Any) -> KeysAndValues:
    """The cache of one layer, with room for the keys and values of context_length tokens."""
    c = config.resolve()
    shape = (batch, c.n_kv_heads, c.context_length, c.d_head)
    return KeysAndValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
