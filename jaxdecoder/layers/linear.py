"""Linear layers, initialised as the config says."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdecoder.config import Architecture, ModelConfig
from jaxdecoder.kernels import packing
from jaxdecoder.kernels.product import product, turned_product
from jaxdecoder.kernels.quantized import packed_product
from jaxdecoder.layers import tree
from jaxdecoder.layers.remat import product_kept

Initializer = Callable[..., jax.Array]
"""(key, shape, dtype) -> a parameter."""

Kernel = Float[Array, "d_in d_out"] | packing.Packed


def linear(
    config: Architecture,
    d_in: int,
    d_out: int,
    *,
    bias: bool,
    dtype: DTypeLike,
    residual_output: bool = False,
    name: str | None = None,
) -> Linear | Quantized:
    """Return a dense layer d_in -> d_out. `residual_output`: the residual stream gets its result.

    The fan-in is asked for because PyTorch's default draws the bias from it as well.
    """
    if config.quantized:
        return Quantized(config, d_in, d_out, bias, dtype, residual_output, name=name)
    kernel, bias_init = initializers(config, d_in, residual_output=residual_output)
    return Linear(d_out, bias, dtype, kernel, bias_init, name=name)


class Linear(nn.Module):
    """A dense layer x @ kernel + bias, in `dtype` from float32 parameters.

    `decoding.prepare` may give it the kernel turned, (d_out, d_in), under a name of its own.
    """

    d_out: int
    bias: bool
    dtype: DTypeLike
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        x = x.astype(self.dtype)
        if self.has_variable("params", tree.TURNED):
            turned: jax.Array = self.get_variable("params", tree.TURNED)
            out = turned_product(x, turned.astype(self.dtype))
        else:
            shape = (x.shape[-1], self.d_out)
            kernel = self.param(tree.KERNEL, self.kernel_init, shape, jnp.float32)
            out = product(x, kernel.astype(self.dtype))
        if self.bias:
            bias = self.param("bias", self.bias_init, (self.d_out,), jnp.float32)
            out = out + bias.astype(self.dtype)
        return product_kept(out)


class Quantized(nn.Module):
    """A dense layer whose kernel has few levels, and perhaps its input, as the config says."""

    config: Architecture
    d_in: int
    d_out: int
    bias: bool
    dtype: DTypeLike = jnp.float32
    residual_output: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        c = self.config
        init, bias_init = initializers(c, self.d_in, residual_output=self.residual_output)
        kernel = _quantized_kernel(self, c, init, self.d_in, self.d_out)
        out = packed_product(x.astype(self.dtype), kernel, activations=c.activation_format)
        if self.bias:
            bias = self.param("bias", bias_init, (self.d_out,), jnp.float32)
            out = out + bias.astype(self.dtype)
        return product_kept(out)


class Weights(nn.Module):
    """Kernel and bias of a linear layer d_in -> d_out, for a product of another kind."""

    config: Architecture
    d_in: int
    d_out: int
    bias: bool

    @nn.compact
    def __call__(self) -> tuple[Kernel, Float[Array, " d_out"] | None]:
        c = self.config
        init, bias_init = initializers(c, self.d_in, residual_output=False)
        shape = (self.d_in, self.d_out)
        if c.quantizes_head:
            kernel: Kernel = _quantized_kernel(self, c, init, *shape)
        else:
            kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", bias_init, shape[1:], jnp.float32) if self.bias else None
        return kernel, bias


def _quantized_kernel(
    module: nn.Module, config: Architecture, init: Initializer, d_in: int, d_out: int
) -> Kernel:
    """Make a kernel: packed, its parts are parameters; else it is one, rounded where it is used."""
    scheme = scheme_of(config)
    if not config.packed:
        kernel = module.param("kernel", init, (d_in, d_out), jnp.float32)
        return packing.straight_through(scheme, kernel)
    # A packed model is made of a float one; only its shapes are asked for.
    empty = packing.empty(scheme, d_in, d_out)
    parts = {name: module.param(name, lambda _, part=part: part) for name, part in empty.items()}
    return packing.of_parameters(scheme, parts)


def scheme_of(c: ModelConfig) -> packing.Scheme:
    """Return how a config quantizes kernels."""
    return packing.Scheme(
        c.weight_format, c.weight_granularity, c.weight_group_size, c.weight_symmetric
    )


def initializers(
    config: Architecture, fan_in: int, *, residual_output: bool
) -> tuple[Initializer, Initializer]:
    """Return initialisers of a kernel with this fan-in and of its bias."""
    if config.initializer == "uniform_fan_in":
        uniform = symmetric_uniform(fan_in**-0.5)
        return uniform, uniform
    std = config.init_std
    if config.initializer == "scaled" and residual_output:
        std /= (2 * config.n_layers) ** 0.5
    return nn.initializers.normal(std), nn.initializers.zeros


def embedding_initializer(config: Architecture) -> Initializer:
    """Return the initialiser of token and position embeddings."""
    std = 1.0 if config.initializer == "uniform_fan_in" else config.init_std
    return nn.initializers.normal(std)


def symmetric_uniform(bound: float) -> Initializer:
    """Return an initialiser that draws from U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
