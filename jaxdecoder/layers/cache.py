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
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdecoder.config import Architecture
from jaxdecoder.kernels.device import current_device


class KeysAndValues(NamedTuple):
    """Keys and values of one layer, heads before slots: as the products of decoding read them."""

    k: Float[Array, "batch kv_heads slots width"]
    v: Float[Array, "batch kv_heads slots width"]


Parts = tuple[KeysAndValues, ...]
"""Keys and values cut into parts of consecutive slots."""

PARTS = 4
"""How many parts a cache is cut into, on a CPU."""

SHORTEST = 32
"""Slots of a part, at least."""


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

    def parts(self) -> int:
        """Return how many parts to cut the slots into.

        A CPU skips the parts that are empty. Pinned slots do not fill in their order, so a cache
        that has any is not cut.
        """
        whole = self.pinned or self.ring % PARTS or self.ring < PARTS * SHORTEST
        return 1 if whole or current_device().platform != "cpu" else PARTS

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


def cut(whole: KeysAndValues, parts: int) -> Parts:
    """Cut keys and values into so many parts."""
    return tuple(map(KeysAndValues, *(jnp.split(x, parts, axis=2) for x in whole)))


def joined(parts: Parts) -> KeysAndValues:
    """Join keys and values that `cut` has cut."""
    if len(parts) == 1:
        return parts[0]
    return KeysAndValues(*(jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True)))


def write_one(
    parts: Parts,
    k: Float[Array, "batch 1 kv_heads width"],
    v: Float[Array, "batch 1 kv_heads width"],
    cursor: Cursor,
) -> Parts:
    """Write one token into the ring that the parts make up; each part is changed in place."""
    size = parts[0].k.shape[2]
    slot = cursor.length % (size * len(parts))

    def write(number: int, part: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(part.dtype)
        place = (0, 0, jnp.clip(slot - number * size, 0, size - 1), 0)
        kept = jnp.where(slot // size == number, new, jax.lax.dynamic_slice(part, place, new.shape))
        return jax.lax.dynamic_update_slice(part, kept, place)

    return tuple(
        KeysAndValues(write(i, part.k, k), write(i, part.v, v)) for i, part in enumerate(parts)
    )


def present(parts: Parts, cursor: Cursor) -> list[Bool[Array, ""]]:
    """Return which parts hold any token once one more is written."""
    size, count = parts[0].k.shape[2], jnp.asarray(cursor.length) + 1
    return [count > number * size for number in range(len(parts))]


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
