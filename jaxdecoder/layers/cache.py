"""What decoding remembers: mostly keys and values in slots.

A batch of prompts of different lengths is padded on the left, so that all rows write the same slot
at the same time. Token number i of the stream (padding included) goes to slot i mod ring; row b's
first real token is number `start[b]`, and a token's position is its number minus that. A few slots
after the ring may be pinned to positions, which differ in number from row to row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdecoder.config import Architecture


class KeysAndValues(NamedTuple):
    """Keys and values of one layer, heads before slots: as the products of decoding read them."""

    k: Float[Array, "batch kv_heads slots width"]
    v: Float[Array, "batch kv_heads slots width"]


Caches = tuple[PyTree, ...]
"""One a layer, in their order; each as its mechanism has it."""


class Cursor(NamedTuple):
    """Where in the stream a cache stands; shared by all layers."""

    length: Int[Array | np.ndarray, ""]
    """Tokens seen so far, padding included; a NumPy number where it is known before tracing."""
    start: Int[Array, "batch"]
    """Number of each row's first real token."""

    def query_positions(self, time: int) -> Int[Array, "batch time"]:
        """Return positions of the next `time` tokens; negative ones are padding."""
        return jnp.arange(time) + self.length - self.start[:, None]


class Cache(NamedTuple):
    """The decoding state of a whole decoder."""

    cursor: Cursor
    layers: Caches


NEVER = 2**30


class Slots(NamedTuple):
    """Which tokens a layer keeps: the last `ring` ones, and those at pinned positions.

    Pinned slot i keeps the newest token whose position is `pinned[i]`, or that and a multiple of
    `period`.
    """

    ring: int
    pinned: tuple[int, ...] = ()
    period: int = NEVER

    @property
    def size(self) -> int:
        """How many there are."""
        return self.ring + len(self.pinned)

    def positions(self, cursor: Cursor, time: int) -> Int[Array, "batch slots"]:
        """Return positions in the slots once `time` more tokens are written; negative: none."""
        newest = jnp.asarray(cursor.length) + time - 1
        number = newest - (newest - jnp.arange(self.ring)) % self.ring
        ring = number - cursor.start[:, None]
        if not self.pinned:
            return ring
        last = (newest - cursor.start)[:, None]
        pinned = last - (last - jnp.asarray(self.pinned)) % self.period
        return jnp.concatenate([ring, pinned], axis=1)

    def visible(self, cursor: Cursor, time: int) -> Int[Array, "batch slots"]:
        """Return the same, less what the pinned slots hold of the ring's tokens."""
        found = self.positions(cursor, time)
        oldest = (cursor.length + time - self.ring - cursor.start)[:, None]
        twice = (jnp.arange(self.size) >= self.ring) & (found >= oldest)
        return jnp.where(twice, -1, found)

    def filled(self, cursor: Cursor, time: int) -> Int[Array, ""] | None:
        """Return how many first slots one more token fills; None for others and pinned slots."""
        if time > 1 or self.pinned:
            return None
        return jnp.minimum(cursor.length + 1, self.ring)

    def empty(self, config: Architecture, batch: int, dtype: DTypeLike) -> KeysAndValues:
        """Return a cache that has seen nothing."""
        shape = (batch, config.n_kv_heads, self.size, config.d_head)
        return KeysAndValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def extend(
    cache: KeysAndValues,
    k: Float[Array, "batch time kv_heads width"],
    v: Float[Array, "batch time kv_heads width"],
    cursor: Cursor,
    slots: Slots,
) -> tuple[KeysAndValues, Int[Array, "batch keys"], KeysAndValues]:
    """Return what `time` new tokens attend to, its positions (negative: none), and the cache.

    One token is written first, and attends to the slots. Several may push out of the ring what the
    first of them still see, so they attend to the slots as they were and to themselves; to
    themselves alone where it is known that nothing came before.
    """
    time = k.shape[1]
    new = KeysAndValues(*(x.swapaxes(1, 2).astype(cache.k.dtype) for x in (k, v)))
    written = jax.tree.map(lambda old, x: _write(old, x, cursor, slots), cache, new)
    if time == 1:
        return written, slots.visible(cursor, 1), written
    if isinstance(cursor.length, np.ndarray | np.generic) and cursor.length == 0:
        return new, cursor.query_positions(time), written
    seen = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=2), cache, new)
    positions = [slots.visible(cursor, 0), cursor.query_positions(time)]
    return seen, jnp.concatenate(positions, axis=1), written


def _write(
    old: Float[Array, "batch kv_heads slots width"],
    new: Float[Array, "batch kv_heads time width"],
    cursor: Cursor,
    slots: Slots,
) -> Float[Array, "batch kv_heads slots width"]:
    """Put new tokens into their slots."""
    time, first = new.shape[2], 0
    if time == 1:
        # In place; only pinned slots have to ask whether the token is theirs.
        old = jax.lax.dynamic_update_slice(old, new, (0, 0, cursor.length % slots.ring, 0))
        if not slots.pinned:
            return old
        first = slots.ring
    which = slots.positions(cursor, time)[:, first:] - cursor.query_positions(time)[:, :1]
    which = which[:, None, :, None]
    taken = jnp.take_along_axis(new, jnp.clip(which, 0), axis=2)
    return old.at[:, :, first:].set(jnp.where(which >= 0, taken, old[:, :, first:]))
