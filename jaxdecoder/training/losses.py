"""Losses, in nats a token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder


def summed_cross_entropy(
    decoder: Decoder,
    params: Any,
    batch: Batch,
    *,
    training: bool = False,
    dropout_key: jax.Array | None = None,
) -> Float[Array, ""]:
    """The weighted sum of next-token losses over a batch.

    `training`: with dropout, whose key must be given where the model has any.
    """
    losses = decoder.apply(
        {"params": params},
        batch.inputs,
        batch.targets,
        deterministic=not training,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="losses",
    )
    return jnp.sum(losses * batch.weights)  # type: ignore[arg-type]
