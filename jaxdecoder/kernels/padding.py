"""Sizes rounded up to whole blocks, and arrays padded to such sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdecoder.kernels.typing import AnyArray


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


def padded(x: AnyArray, axis: int, size: int, filling: float = 0) -> jax.Array:
    """Return x with `filling` appended along an axis until it has `size` entries there."""
    axis %= x.ndim
    if x.shape[axis] == size:
        return jnp.asarray(x)
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=filling)
