"""What an attention mechanism is given, gives and costs: the seam that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdecoder.config import Architecture
from jaxdecoder.kernels import scores
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.layers.cache import Cursor
from jaxdecoder.layers.costs import nothing

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


Mixing = Callable[
    [Heads, PyTree, Cursor | None, Rate | None],
    tuple[Float[Array, "batch time heads width"], PyTree],
]
"""(heads, cache, cursor, dropout) -> the values, mixed over time, and the cache. Without a cache,
they are mixed within the heads given. With one, these tokens follow what it holds, and it comes
back with them in it."""


class AttentionCosts(NamedTuple):
    """What one layer of a mechanism costs, besides the projections that all mechanisms have."""

    mixing: Callable[[Architecture, int, int], int]
    """(config, queries, start) -> multiply-adds of so many queries from `start` on, at best."""
    dense: Callable[[Architecture, int, int], int]
    """The same as plain XLA computes it: in one pass from 0 on, and later token by token."""
    drawn: Callable[[Architecture, int, int], float]
    """(config, tokens, n) -> multiply-adds of n tokens drawn at random, which see one another."""
    cache: Callable[[Architecture, int], int]
    """(config, bytes a number) -> bytes that decoding keeps for a sequence."""
    parameters: Callable[[Architecture], int] = nothing


class Mechanism(NamedTuple):
    """One way to mix values over time.

    mixing: (config, name) -> the module.
    empty_cache: (config, batch, dtype) -> the cache of one layer that has seen nothing.
    """

    mixing: Callable[..., Mixing]
    empty_cache: Callable[[Architecture, int, DTypeLike], PyTree]
    costs: AttentionCosts


def of_pairs(c: Architecture, pairs: int) -> int:
    """Return multiply-adds: a pair is a product for its score and one for its value, a head."""
    return 2 * c.query_width * pairs
