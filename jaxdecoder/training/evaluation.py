"""Losses over fixed batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder
from jaxdecoder.training.losses import summed_cross_entropy

Evaluator = Callable[[Any, Iterable[Batch]], float]


def make_evaluator(decoder: Decoder) -> Evaluator:
    """A function from weights and batches to the mean loss in nats a token."""

    @jax.jit
    def totals(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return summed_cross_entropy(decoder, params, batch), jnp.sum(batch.weights)

    def evaluate(params: Any, batches: Iterable[Batch]) -> float:
        # All dispatched before the first is read, so that the device never waits.
        parts = [totals(params, batch) for batch in batches]
        loss = math.fsum(float(loss) for loss, _ in parts)
        return loss / max(1.0, math.fsum(float(weight) for _, weight in parts))

    return evaluate


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """A loss in nats a token as bits for each byte of text, which any tokenizer shares."""
    return loss / math.log(2) * tokens / max(1, n_bytes)
