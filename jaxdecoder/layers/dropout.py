"""Dropout as a layer: takes its seed from the `dropout` key stream."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdecoder.kernels.dropout import dropout


class Dropout(nn.Module):
    """Zeroes a share `rate` of its input, unless `deterministic` (arXiv 1207.0580)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        return dropout(x, dropout_seed(self), self.rate)


def dropout_seed(module: nn.Module) -> jax.Array:
    """A fresh 32-bit seed from a module's `dropout` keys."""
    return jax.random.bits(module.make_rng("dropout"), (), jnp.uint32)
