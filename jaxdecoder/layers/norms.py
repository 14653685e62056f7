"""Normalisation functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdecoder.config import Architecture
from jaxdecoder.layers.costs import nothing


def _standardised(
    x: Float[Array, "*rows width"], epsilon: float
) -> tuple[Float[Array, "*rows width"], Float[Array, "*rows 1"], Float[Array, "*rows 1"]]:
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return centred * inverse, mean, inverse


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def standardise(x: Float[Array, "*rows width"], epsilon: float) -> Float[Array, "*rows width"]:
    """Give x mean 0 and variance 1 over its last axis, in float32.

    The gradient rule is by hand, for it needs less than what automatic differentiation keeps: the
    result itself and one number a row, or of x in half precision, which is smaller than the result,
    x and two numbers a row.
    """
    return _standardised(x, epsilon)[0]


_Kept = tuple[jax.Array, jax.Array | None, jax.Array]


def _standardise_forward(x: jax.Array, epsilon: float) -> tuple[jax.Array, _Kept]:
    out, mean, inverse = _standardised(x, epsilon)
    if x.dtype.itemsize < 4:
        # Else XLA computes both again from x, row by row, which keeps what uses them apart.
        return out, (x, *jax.lax.optimization_barrier((mean, inverse)))
    return out, (out, None, inverse)


def _standardise_backward(epsilon: float, kept: _Kept, g: jax.Array) -> tuple[jax.Array]:
    saved, mean, inverse = kept
    out = saved if mean is None else (saved.astype(jnp.float32) - mean) * inverse
    slope = jnp.mean(g * out, axis=-1, keepdims=True)
    d_x = inverse * (g - jnp.mean(g, axis=-1, keepdims=True) - out * slope)
    return (d_x.astype(saved.dtype),)


standardise.defvjp(_standardise_forward, _standardise_backward)


class LayerNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450), in float32; the result is of `dtype`."""

    epsilon: float
    use_bias: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        width = x.shape[-1:]
        out = standardise(x, self.epsilon)
        out = out * self.param("scale", nn.initializers.ones, width)
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, width)
        return out.astype(self.dtype)


def layernorm(config: Architecture, dtype: DTypeLike, name: str | None = None) -> LayerNorm:
    """Layer normalisation, with a bias if the config has biases."""
    return LayerNorm(config.norm_epsilon, config.bias, dtype, name=name)


def rmsnorm(config: Architecture, dtype: DTypeLike, name: str | None = None) -> nn.RMSNorm:
    """Root-mean-square normalisation (arXiv 1910.07467)."""
    return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)


def identity(
    config: Architecture, dtype: DTypeLike, name: str | None = None
) -> Callable[[jax.Array], jax.Array]:
    """No normalisation."""
    return lambda x: x


class Norm(NamedTuple):
    """A normalisation function.

    new: (config, dtype, name) -> a module or function x -> x normalised over its last axis.
    parameters: (config) -> how many one norm of the residual stream has.
    """

    new: Callable[..., Callable[[jax.Array], jax.Array]]
    parameters: Callable[[Architecture], int]


NORMS: dict[str, Norm] = {
    "layernorm": Norm(layernorm, lambda c: c.d_model * (1 + c.bias)),
    "rmsnorm": Norm(rmsnorm, lambda c: c.d_model),
    "none": Norm(identity, nothing),
}
