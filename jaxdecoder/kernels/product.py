"""Matrix products: of linear layers, and of tiles inside kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdecoder.kernels.device import current_device


def dot(
    a: jax.Array,
    b: jax.Array,
    axes: tuple[int, int] = (1, 0),
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """Return the matrix product over one axis of each, summed in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def product(
    x: jax.Array, kernel: jax.Array, *, preferred_element_type: DTypeLike | None = None
) -> jax.Array:
    """Return x @ kernel, in the form whose gradient is the quickest on CPUs.

    Leading axes are joined: with two of them, XLA copies transposed activations for the gradient of
    the kernel, and recomputes what they came from. A kernel with more rows than columns is
    transposed first, so that its gradient is a product that gathers the narrower operand by
    columns; the barrier keeps XLA from swapping them back. Few rows, as in decoding, are not worth
    a transposition.
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


def turned_product(x: jax.Array, turned: jax.Array) -> jax.Array:
    """Return x @ turned.T of a kernel kept as (d_out, d_in), as decoding multiplies a few rows.

    XLA on a CPU gathers the right factor into tiles each time: the few rows are that factor.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(turned, rows, (((1,), (1,)), ((), ())))
    # The barrier keeps XLA from swapping the factors back.
    return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], turned.shape[0])
