"""Dropout as a layer: takes its seed from the `dropout` key stream.

Modules are told the rate of the pass: None outside training, where the variants that train another
way than they run tell the two apart by it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdecoder.kernels.dropout import Rate, dropout, drops


class Dropout(nn.Module):
    """Zeroes a share `rate` of its input (arXiv 1207.0580)."""

    @nn.compact
    def __call__(self, x: jax.Array, rate: Rate | None) -> jax.Array:
        if rate is None or not drops(rate):
            return x
        return dropout(x, dropout_seed(self), rate)


def of_weights(module: nn.Module, rate: Rate | None) -> dict[str, Any]:
    """Return the arguments by which `flash_attention` knows of a module's dropout."""
    if rate is None or not drops(rate):
        return {}
    return {"dropout_rate": rate, "dropout_seed": dropout_seed(module)}


def dropout_seed(module: nn.Module) -> jax.Array:
    """Return a fresh 32-bit seed from a module's `dropout` keys."""
    return jax.random.bits(module.make_rng("dropout"), (), jnp.uint32)
