"""What an attention mechanism is given, and what it gives: the seam that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdecoder.config import ModelConfig
from jaxdecoder.kernels import scores

Seen = Callable[[Int[Array, "batch keys"]], Bool[Array, "batch keys"]]
"""Which keys, given by their positions, there are to see at all."""


class Heads(NamedTuple):
    """What a mechanism mixes: the heads of a layer and how positions reach them."""

    q: Float[Array, "batch time heads width"]
    k: Float[Array, "batch time kv_heads width"]
    v: Float[Array, "batch time kv_heads width"]
    positions: Int[Array, "#batch time"]
    """Of these tokens; negative ones are padding."""
    rotate: Callable[[jax.Array], jax.Array]
    """Turns queries or keys by their positions; the identity where positions do not rotate."""
    score: scores.Score | None
    seen: Seen | None = None
    """None: all keys, and positions are consecutive."""


class Mechanism(NamedTuple):
    """One way to mix values over time.

    mixing: (config, name) -> module from (heads, cache, cursor, dropout) to the mixed values
        (batch, time, heads, width) and the cache. Without a cache it mixes within the heads given;
        with one, these tokens follow what the cache holds, and it comes back with them in it.
    empty_cache: (config, batch, dtype) -> the cache of one layer that has seen nothing.
    """

    mixing: Callable[..., Any]
    empty_cache: Callable[[ModelConfig, int, DTypeLike], PyTree]
