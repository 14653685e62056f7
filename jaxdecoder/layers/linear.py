"""Linear layers, initialised as the config says."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdecoder.config import ModelConfig
from jaxdecoder.kernels.product import product


def linear(
    config: ModelConfig,
    d_in: int,
    d_out: int,
    *,
    bias: bool,
    dtype: Any,
    residual_output: bool = False,
    name: str | None = None,
) -> nn.Dense:
    """A dense layer d_in -> d_out. `residual_output`: its result is added to the residual stream.

    The fan-in is asked for because PyTorch's default draws the bias from it as well.
    """
    kernel, bias_init = initializers(config, d_in, residual_output=residual_output)
    return nn.Dense(
        d_out,
        use_bias=bias,
        dtype=dtype,
        kernel_init=kernel,
        bias_init=bias_init,
        dot_general=product,
        name=name,
    )


class Weights(nn.Module):
    """Kernel and bias of a linear layer d_in -> d_out, for a product of another kind."""

    config: ModelConfig
    d_in: int
    d_out: int
    bias: bool

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "d_in d_out"], Float[Array, " d_out"] | None]:
        kernel, bias = initializers(self.config, self.d_in, residual_output=False)
        shape = (self.d_in, self.d_out)
        return (
            self.param("kernel", kernel, shape, jnp.float32),
            self.param("bias", bias, shape[1:], jnp.float32) if self.bias else None,
        )


def initializers(config: ModelConfig, fan_in: int, *, residual_output: bool) -> tuple[Any, Any]:
    """Initialisers of a kernel with this fan-in and of its bias."""
    if config.initializer == "uniform_fan_in":
        uniform = symmetric_uniform(fan_in**-0.5)
        return uniform, uniform
    std = config.init_std
    if config.initializer == "scaled" and residual_output:
        std /= (2 * config.n_layers) ** 0.5
    return nn.initializers.normal(std), nn.initializers.zeros


def embedding_initializer(config: ModelConfig) -> Any:
    """Initialiser of token and position embeddings."""
    return nn.initializers.normal(
        1.0 if config.initializer == "uniform_fan_in" else config.init_std
    )


def symmetric_uniform(bound: float) -> Any:
    """U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
