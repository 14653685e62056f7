"""GPTQ: rounding that corrects its own errors (arXiv 2210.17323).

It rounds one weight after another. The weights that are not rounded yet correct each error, as well
as their inputs allow. This keeps |X (W - Q)|^2 small over a calibration set of inputs X, instead of
|W - Q|^2.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdecoder.kernels.packing import Packed, Scheme, Steps, levels_of, pack, steps_of, weights_of

DAMPING = 0.01
"""Share of the mean diagonal of the Gram matrix that is added to its diagonal (from the paper)."""

BLOCK = 128
"""Inputs whose errors are applied together to later weights (lazy batches in the paper)."""


@partial(jax.jit, static_argnums=0)
def gptq(
    scheme: Scheme, kernel: Float[Array, "d_in d_out"], gram: Float[Array, "d_in d_in"]
) -> Packed:
    """Quantize a kernel for inputs with the Gram matrix X^T X.

    The weights of inputs that are always 0 are rounded to the nearest level.
    """
    d_in, d_out = kernel.shape
    factor = _inverse_factor(gram)
    grouped = scheme.granularity == "group"
    # The scale of a group comes from its weights after the corrections so far.
    divisors = (size for size in range(1, BLOCK + 1) if d_in % size == 0)
    block = scheme.group_size if grouped else max(divisors)
    fixed = steps_of(scheme, kernel)
    place = jnp.arange(d_in)

    def one_block(
        weights: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Steps]]:
        start = number * block
        own = jax.lax.dynamic_slice_in_dim(weights, start, block)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, block)
        square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        single = scheme._replace(group_size=block)
        steps = steps_of(single, own) if grouped else fixed

        def one_row(own: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            levels = levels_of(scheme, own[i][None], *steps)[0]
            error = (own[i] - weights_of(levels[None], *steps)[0]) / square[i, i]
            # Only later rows change; rows that are already rounded stay.
            own = own - jnp.outer(jnp.where(jnp.arange(block) > i, square[i], 0.0), error)
            return own, (levels, error)

        _, (levels, errors) = jax.lax.scan(one_row, own, jnp.arange(block))
        later = jnp.where(place >= start + block, rows, 0.0)
        return weights - later.T @ errors, (levels, steps)

    _, (levels, steps) = jax.lax.scan(one_block, kernel, jnp.arange(d_in // block))
    if grouped:
        scales, zeros = steps
        steps = Steps(scales[:, 0], None if zeros is None else zeros[:, 0])
    return pack(scheme, levels.reshape(d_in, d_out), steps if grouped else fixed)


def output_error(
    kernel: Float[Array, "d_in d_out"],
    rounded: Float[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
) -> Float[Array, ""]:
    """Return |X (W - Q)|^2 / |X W|^2, by the Gram matrix."""

    def squared(difference: jax.Array) -> jax.Array:
        return jnp.sum(difference * (gram @ difference))

    return squared(kernel - rounded) / squared(kernel)


def _inverse_factor(gram: Float[Array, "d_in d_in"]) -> Float[Array, "d_in d_in"]:
    """Return the upper triangular U for which U^T U is the inverse of the damped Gram matrix."""
    diagonal = jnp.diagonal(gram)
    there = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(there), 1)
    damped = gram + jnp.diag(jnp.where(there, DAMPING * mean, 1.0))
    lower = jnp.linalg.cholesky(damped)
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    inverse = jax.scipy.linalg.cho_solve((lower, True), identity)
    return jnp.linalg.cholesky(inverse).T
