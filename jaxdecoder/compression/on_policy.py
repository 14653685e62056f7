"""Let a student write texts for its teacher to judge (GKD, arXiv 2306.13649).

A student that learns only from texts of others never meets the situations that its own mistakes
lead to. So in a share of the steps it samples the rest of every row itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder, Read
from jaxdecoder.decoding import prepare
from jaxdecoder.typing import Params


def continued(
    decoder: Decoder,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    time: int,
    key: jax.Array,
    entries: int,
) -> Int[Array, "batch time"]:
    """Return the prompts with the decoder's continuations, `time` tokens in all.

    Sampled at temperature 1 from the first `entries` of the vocabulary, with the decoder's cache.
    """
    session = prepare(decoder, params)

    def step(read: Read, key: jax.Array) -> tuple[Read, jax.Array]:
        logits = read.logits[:, -1]
        known = jnp.where(jnp.arange(logits.shape[-1]) < entries, logits, -jnp.inf)
        token = jax.random.categorical(key, known).astype(jnp.int32)
        return session.extend(token[:, None], read.cache, last=True), token

    keys = jax.random.split(key, time - prompts.shape[1])
    _, drawn = jax.lax.scan(step, session.prefill(prompts), keys)
    return jnp.concatenate([prompts, drawn.T], axis=1)


def judged(
    tokens: Int[Array, "batch time"],
    weights: Float[Array, "batch time"],
    prompt: int,
    end_token: int | None,
) -> Float[Array, "batch time"]:
    """Return the weights of sampled texts: equal for all predictions of sampled tokens, else 0.

    A row whose prompt contains padding does not count. With an `end_token`, nothing after it
    counts; an end token at the start of a row belongs to the document before. The weights sum to
    the same as the batch's own `weights`, by which the step divides.
    """
    time = tokens.shape[1]
    counted = jnp.broadcast_to(jnp.arange(time) >= prompt - 1, tokens.shape)
    counted &= jnp.all(weights[:, : prompt - 1] > 0, axis=1, keepdims=True)
    if end_token is not None:
        ends = (tokens == end_token) & (jnp.arange(time) > 0)
        counted &= jnp.cumsum(ends, axis=1) == 0
    share = jnp.sum(weights) / jnp.maximum(jnp.sum(counted), 1)
    return counted.astype(jnp.float32) * share


def sampled_or_not(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    share: float,
    prompt: int,
    entries: int,
    end_token: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return tokens, their weights, and whether they were sampled.

    They are sampled with probability `share`; else they are those of the batch. Give an `end_token`
    if rows are single documents. No gradient passes through the sampling, and the key alone decides
    what is drawn.
    """
    params = jax.lax.stop_gradient(params)
    coin, draw = jax.random.split(key)

    def sample() -> tuple[jax.Array, jax.Array]:
        prompts, time = batch.inputs[:, :prompt], batch.inputs.shape[1]
        tokens = continued(decoder, params, prompts, time, draw, entries)  # type: ignore[arg-type]
        return tokens, judged(tokens, batch.weights, prompt, end_token)  # type: ignore[arg-type]

    sampled = jax.random.uniform(coin) < share
    tokens, weights = jax.lax.cond(sampled, sample, lambda: (batch.inputs, batch.weights))
    return tokens, weights, sampled
