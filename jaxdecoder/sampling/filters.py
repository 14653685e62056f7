"""Logit filters: pure functions from logits to logits, applied in the order they are given.

A filter takes the logits of one step, (batch, vocab) in float32, and how often each token has
occurred in each row so far, (batch, vocab). It sets the logits of forbidden tokens to -inf. At
least one token always stays. The same arguments give the same function object, so that decoding
compiles once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdecoder.errors import UserError

Logits = Float[Array, "batch vocab"]
Counts = Int[Array, "batch vocab"]
Filter = Callable[[Logits, Counts], Logits]

SMALLEST, LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
"""What float32 holds to its full precision; devices may take smaller numbers for 0."""


@functools.cache
def chain(*filters: Filter) -> Filter:
    """Return one filter that applies these filters one after another."""

    def apply(logits: Logits, counts: Counts) -> Logits:
        for each in filters:
            logits = each(logits, counts)
        return logits

    return apply


@functools.cache
def temperature(value: float) -> Filter:
    """Divide the logits by `value`; 0 keeps only the largest logit (greedy decoding)."""
    _check("temperature", value, 0 <= value <= LARGEST, f"from 0 to {LARGEST:.1e}")
    if value < SMALLEST:
        return top_k(1)

    def apply(logits: Logits, counts: Counts) -> Logits:
        largest = jnp.max(logits, axis=-1, keepdims=True)
        # Where quotients overflow, only their distances from the largest one count.
        safe = jnp.where(jnp.isfinite(largest / value), logits, logits - largest)
        # Some devices multiply by 1 / value, which may be 0.
        return jnp.where(jnp.isneginf(logits), -jnp.inf, safe / value)

    return apply


@functools.cache
def first(n: int) -> Filter:
    """Keep the first n tokens: a head may have more rows than the tokenizer has entries."""
    _check("first", n, n >= 1, "1 or more")
    return lambda logits, counts: jnp.where(jnp.arange(logits.shape[-1]) < n, logits, -jnp.inf)


@functools.cache
def top_k(k: int) -> Filter:
    """Keep the k largest logits (arXiv 1805.04833); of equal ones, those of the lower tokens."""
    _check("top_k", k, k >= 1, "1 or more")

    def apply(logits: Logits, counts: Counts) -> Logits:
        rows = jnp.arange(logits.shape[0])[:, None]
        values, tokens = jax.lax.top_k(logits, min(k, logits.shape[-1]))
        return jnp.full_like(logits, -jnp.inf).at[rows, tokens].set(values)

    return apply


@functools.cache
def top_p(p: float) -> Filter:
    """Keep the fewest tokens whose probabilities sum to p or more (arXiv 1904.09751)."""
    _check("top_p", p, 0 < p <= 1, "in (0, 1]")

    def apply(logits: Logits, counts: Counts) -> Logits:
        tokens = jnp.argsort(-logits, axis=-1)
        ordered = jax.nn.softmax(jnp.take_along_axis(logits, tokens, axis=-1), axis=-1)
        # A token stays if the tokens before it sum to less than p. So the first always stays.
        stays = jnp.cumsum(ordered, axis=-1) - ordered < max(p, SMALLEST)
        rows = jnp.arange(logits.shape[0])[:, None]
        kept = jnp.zeros(logits.shape, bool).at[rows, tokens].set(stays)
        return jnp.where(kept, logits, -jnp.inf)

    return apply


@functools.cache
def min_p(p: float) -> Filter:
    """Keep tokens that are at least p times as probable as the likeliest (arXiv 2407.01082)."""
    _check("min_p", p, 0 < p <= 1, "in (0, 1]")
    return lambda logits, counts: jnp.where(
        logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(p), logits, -jnp.inf
    )


@functools.cache
def repetition_penalty(factor: float) -> Filter:
    """Divide the positive logits of tokens that have occurred, multiply their negative ones.

    CTRL (arXiv 1909.05858), with the usual treatment of negative logits.
    """
    fine = SMALLEST <= factor <= LARGEST
    _check("repetition_penalty", factor, fine, f"from {SMALLEST:.1e} to {LARGEST:.1e}")

    def apply(logits: Logits, counts: Counts) -> Logits:
        penalised = jnp.where(logits > 0, logits / factor, logits * factor)
        # Too small or large for a float is still neither forbidden nor certain.
        penalised = jnp.clip(penalised, -LARGEST, LARGEST)
        return jnp.where((counts > 0) & ~jnp.isneginf(logits), penalised, logits)

    return apply


FILTERS: dict[str, Callable[..., Filter]] = {
    "repetition_penalty": repetition_penalty,
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
}
"""The filters that take one number, in the order in which `sample.py` applies them.

A penalty is for the raw logits; what cuts off the unlikely ones comes after the temperature.
"""


def _check(name: str, value: float, fine: bool, right: str) -> None:
    if not fine:
        raise UserError(f"{name} = {value}: must be {right}")
