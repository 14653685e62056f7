"""Losses, in nats a token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder


def summed_cross_entropy(
    decoder: Decoder, params: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> Float[Array, ""]:
    """The weighted sum of next-token losses over a batch; dropout is on if a key is given."""
    logits = decoder.apply(
        {"params": params},
        batch.inputs,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.weights)
