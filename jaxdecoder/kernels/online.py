"""The online softmax (arXiv 1805.02867): scores come in pieces, and no piece is kept.

Of each row it keeps the largest score so far, and the sum of the exponentials of the differences
to it. When a larger score comes, this sum shrinks, and so must the caller's sum of values that are
weighted by these exponentials. All operations here are such that XLA, Triton and Mosaic compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Base(NamedTuple):
    """The base of the exponentials: e, or 2 where that is quicker."""

    power: Callable[[jax.Array], jax.Array]
    log: Callable[[jax.Array], jax.Array]


E, TWO = Base(jnp.exp, jnp.log), Base(jnp.exp2, jnp.log2)


class Sums(NamedTuple):
    """The softmax of the scores so far, float32 (*rows,)."""

    largest: jax.Array
    """The largest score; -inf before the first."""
    total: jax.Array
    """The sum of power(score - largest)."""


Running = tuple[Sums, jax.Array]
"""The softmax of the scores so far, and the sum of their weighted values (*rows, width)."""


class Added(NamedTuple):
    """The result of adding scores to a softmax."""

    sums: Sums
    weights: jax.Array
    """power(score - largest) of the new scores, to multiply their values by."""
    shrink: jax.Array
    """(*rows,): multiply the sum of weighted values so far by it, before new ones are added."""


def add(
    sums: Sums,
    scores: jax.Array,
    *,
    may_be_empty: bool = True,
    base: Base = E,
    factor: float | None = None,
) -> Added:
    """Add scores (*rows, columns).

    `may_be_empty`: a row may have had nothing but -inf so far. `factor`: a positive number that
    the scores are still to be multiplied by; with the subtraction that is one instruction.
    """
    highest = jnp.max(scores, axis=-1)
    largest = jnp.maximum(sums.largest, highest if factor is None else highest * factor)
    # A row of nothing but -inf has no largest score to subtract.
    start = jnp.where(largest == -jnp.inf, 0.0, largest) if may_be_empty else largest
    scaled = scores if factor is None else scores * factor
    weights = base.power(scaled - spread(start, scores.shape))
    shrink = base.power(sums.largest - start)
    return Added(Sums(largest, sums.total * shrink + jnp.sum(weights, axis=-1)), weights, shrink)


def finish(sums: Sums, base: Base = E) -> tuple[jax.Array, jax.Array]:
    """Return what to divide weighted values by, and the logarithm of the sum of exponentials.

    A row without scores has 1 and -inf.
    """
    some = sums.total > 0
    divisor = jnp.where(some, sums.total, 1.0)
    return divisor, jnp.where(some, sums.largest + base.log(divisor), -jnp.inf)


def spread(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number for each row over the last axis of the shape."""
    # Mosaic has no layout for what `rows[..., None]` is.
    return jax.lax.broadcast_in_dim(rows, shape, tuple(range(rows.ndim)))
