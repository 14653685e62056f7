"""Losses, in nats a token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.typing import Params


def summed_cross_entropy(
    decoder: Decoder,
    params: Params,
    batch: Batch,
    *,
    dropout: Rate | None = None,
    dropout_key: jax.Array | None = None,
) -> Float[Array, ""]:
    """Return the weighted sum of next-token losses over a batch; no dropout outside training."""
    losses = decoder.apply(
        {"params": params},
        batch.inputs,
        batch.targets,
        dropout=dropout,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="losses",
    )
    return jnp.sum(losses * batch.weights)  # type: ignore[arg-type]
