"""Linear layers, initialised as the config says."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdecoder.config import ModelConfig


def linear(
    config: ModelConfig,
    d_in: int,
    d_out: int,
    *,
    bias: bool,
    dtype: Any,
    residual_output: bool = False,
    out_dtype: Any = None,
    name: str | None = None,
) -> nn.Dense:
    """A dense layer d_in -> d_out. `residual_output`: its result is added to the residual stream.

    `out_dtype` is that of the result where it is wider than `dtype`, that of the factors. The
    fan-in is asked for because PyTorch's default draws the bias from it as well.
    """
    kernel, bias_init = initializers(config, d_in, residual_output=residual_output)
    return nn.Dense(
        d_out,
        use_bias=bias,
        dtype=dtype,
        kernel_init=kernel,
        bias_init=bias_init,
        dot_general=partial(product, preferred_element_type=out_dtype),
        name=name,
    )


def product(
    x: jax.Array, kernel: jax.Array, *_: Any, preferred_element_type: Any = None, **__: Any
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
    if rows.shape[0] >= d_in > d_out and jax.default_backend() == "cpu":
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
