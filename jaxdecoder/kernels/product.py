"""The matrix product of linear layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdecoder.kernels.device import current_device


def product(
    x: jax.Array,
    kernel: jax.Array,
    *_: Any,
    preferred_element_type: DTypeLike | None = None,
    **__: Any,
) -> jax.Array:
    """x @ kernel, in the one of several equal forms whose gradient is the quickest on CPUs.

    All leading axes as one: with two, XLA copies transposed activations for the gradient of the
    kernel, recomputing what they came from. A kernel with more rows than columns goes in
    transposed, because its gradient is then a product that gathers the narrower of its operands
    by columns; the barrier keeps XLA from swapping them back. Few rows, as in decoding, are not
    worth a transposition.
    """
    rows = x.reshape(-1, x.shape[-1])
    d_in, d_out = kernel.shape
    if rows.shape[0] >= d_in > d_out and current_device().platform == "cpu":
        transposed = jax.lax.optimization_barrier(kernel.T)
        out = jax.lax.dot_general(
            rows,
            transposed,
            (((1,), (1,)), ((), ())),
            preferred_element_type=preferred_element_type,
        )
    else:
        out = jnp.matmul(rows, kernel, preferred_element_type=preferred_element_type)
    return out.reshape(*x.shape[:-1], d_out)
