"""Losses over fixed batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Config
from jaxdecoder.data.batches import Batch
from jaxdecoder.data.tokens import Split
from jaxdecoder.decoder import Decoder
from jaxdecoder.decoding import prepare
from jaxdecoder.layers.cache import Cache
from jaxdecoder.training.losses import summed_cross_entropy
from jaxdecoder.typing import Params

IN_FLIGHT = 8
"""Batches dispatched before the first result is waited for, so that the device never waits."""


def make_evaluator(decoder: Decoder) -> Callable[[Params, Iterable[Batch]], float]:
    """Return a function from weights and batches to the mean loss in nats a token."""

    @jax.jit
    def totals(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return summed_cross_entropy(decoder, params, batch), jnp.sum(batch.weights)

    def evaluate(params: Params, batches: Iterable[Batch]) -> float:
        waiting: list[tuple[jax.Array, jax.Array]] = []
        for batch in batches:
            waiting.append(totals(params, batch))
            jax.block_until_ready(waiting[-IN_FLIGHT - 1 : -IN_FLIGHT])
        loss, weight = (math.fsum(float(pair[i]) for pair in waiting) for i in (0, 1))
        return loss / max(1.0, weight)

    return evaluate


@partial(jax.jit, static_argnums=0)
def decoded_losses(
    decoder: Decoder, params: Params, batch: Batch
) -> tuple[Float[Array, "batch time"], Int[Array, "batch time"]]:
    """Return the loss at each token, in nats, and the blocks it passed, when texts are decoded.

    The tokens go one by one through the cache, as in sampling, so that each stops at its own exit.
    """
    session = prepare(decoder, params)

    def step(cache: Cache, tokens: Batch) -> tuple[Cache, tuple[jax.Array, jax.Array]]:
        read = session.extend(jnp.asarray(tokens.inputs)[:, None], cache)
        losses = optax.softmax_cross_entropy_with_integer_labels(read.logits[:, 0], tokens.targets)
        everything = jnp.full(losses.shape, decoder.config.n_layers)
        return read.cache, (losses, everything if read.depth is None else read.depth)

    cache = session.empty_cache(len(batch.inputs))
    _, (losses, depths) = jax.lax.scan(step, cache, jax.tree.map(jnp.transpose, batch))
    return losses.T, depths.T


def predicted(config: Config, split: Split) -> int:
    """Return how many tokens of a split are predicted when all of it is evaluated."""
    return len(split.tokens) - (config.data.mode == "packed")


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """Convert a loss in nats a token to bits a byte of text, which no tokenizer changes."""
    return loss / math.log(2) * tokens / max(1, n_bytes)


def bigram_loss(
    train: np.ndarray, validation: np.ndarray, vocab_size: int, *, most: int = 20_000_000
) -> float:
    """Return the loss on `validation` of a bigram model, which sees one token, in nats a token.

    Counts of pairs in (the first `most` tokens of) `train`, mixed with single-token counts in the
    proportion of Witten and Bell (1991); a floor that any trained decoder should fall through.
    """
    train, validation = (np.asarray(part[:most], np.int64) for part in (train, validation))
    singles = np.bincount(train, minlength=vocab_size)
    unigram = (singles + 1) / (singles.sum() + vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    # Of each first token: how often it has a successor, and how many different ones.
    total = np.bincount(pairs // vocab_size, counts, minlength=vocab_size)
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)
    first, second = validation[:-1], validation[1:]
    wanted = first * vocab_size + second
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    backed_off = np.maximum(kinds, 1)[first]
    probability = (seen + backed_off * unigram[second]) / (total[first] + backed_off)
    return float(-np.log(probability).mean())
