"""The feed-forward branch and its activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdecoder.config import ModelConfig
from jaxdecoder.layers.linear import linear


class ActivationFunction(NamedTuple):
    """`function` of the hidden units, or, when `gated`, of the gate that multiplies them."""

    function: Callable[[jax.Array], jax.Array]
    gated: bool = False


def squared_relu(x: jax.Array) -> jax.Array:
    """relu(x)^2 (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


gelu = partial(jax.nn.gelu, approximate=True)
gelu_exact = partial(jax.nn.gelu, approximate=False)

ACTIVATIONS: dict[str, ActivationFunction] = {
    "relu": ActivationFunction(jax.nn.relu),
    "gelu": ActivationFunction(gelu),  # arXiv 1606.08415, the tanh form of GPT-2
    "gelu_exact": ActivationFunction(gelu_exact),
    "swish": ActivationFunction(jax.nn.silu),  # arXiv 1710.05941
    "relu2": ActivationFunction(squared_relu),
    "swiglu": ActivationFunction(jax.nn.silu, gated=True),  # arXiv 2002.05202, as the next two
    "geglu": ActivationFunction(gelu, gated=True),
    "reglu": ActivationFunction(jax.nn.relu, gated=True),
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) for gated units.

    `feed_forward_projection = false` leaves out down.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d_model"]) -> Float[Array, "batch time d_model"]:
        c = self.config.resolve()
        activation = ACTIVATIONS[c.activation]
        assert c.d_ff is not None
        inner = partial(linear, c, c.d_model, c.d_ff, bias=c.bias, dtype=self.dtype)
        if activation.gated:
            hidden = activation.function(inner(name="gate")(x)) * inner(name="up")(x)
        else:
            hidden = activation.function(inner(name="up")(x))
        if not c.feed_forward_projection:
            return hidden
        down = linear(
            c, c.d_ff, c.d_model, bias=c.bias, dtype=self.dtype, residual_output=True, name="down"
        )
        return down(hidden)
