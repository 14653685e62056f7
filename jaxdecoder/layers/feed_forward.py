"""The feed-forward branch and its activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdecoder.config import Architecture
from jaxdecoder.kernels.mesh import split
from jaxdecoder.layers.costs import Kernels
from jaxdecoder.layers.linear import linear


class ActivationFunction(NamedTuple):
    """`function` of the hidden units, or, when `gated`, of the gate that multiplies them."""

    function: Callable[[jax.Array], jax.Array]
    gated: bool = False
    recomputed: bool = False
    """Whether the backward pass, in half precision, computes it again from its inputs, where XLA
    would keep more for it. (It keeps no more of the others: benchmarks/step_memory.py.)"""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The linear layers whose outputs it takes."""
        return ("gate", "up") if self.gated else ("up",)

    def __call__(self, x: jax.Array, *gated: jax.Array) -> jax.Array:
        """Return the hidden units, of x or, when `gated`, of the gate and what it multiplies."""

        def hidden(x: jax.Array, *gated: jax.Array) -> jax.Array:
            return math.prod(gated, start=self.function(x))

        again = self.recomputed and jnp.dtype(x.dtype).itemsize < 4
        return (jax.checkpoint(hidden) if again else hidden)(x, *gated)


def squared_relu(x: jax.Array) -> jax.Array:
    """relu(x)^2 (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


gelu = partial(jax.nn.gelu, approximate=True)
gelu_exact = partial(jax.nn.gelu, approximate=False)

ACTIVATIONS: dict[str, ActivationFunction] = {
    "relu": ActivationFunction(jax.nn.relu),
    "gelu": ActivationFunction(gelu, recomputed=True),  # arXiv 1606.08415, the tanh form of GPT-2
    "gelu_exact": ActivationFunction(gelu_exact, recomputed=True),
    "swish": ActivationFunction(jax.nn.silu),  # arXiv 1710.05941
    "relu2": ActivationFunction(squared_relu),
    # arXiv 2002.05202, as the next two
    "swiglu": ActivationFunction(jax.nn.silu, gated=True, recomputed=True),
    "geglu": ActivationFunction(gelu, gated=True, recomputed=True),
    "reglu": ActivationFunction(jax.nn.relu, gated=True),
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) for gated units.

    It is as wide as its input; `d_ff` is the hidden width, the config's own when left out.
    `feed_forward_projection = false` leaves out down, so that the hidden units are the output.
    """

    config: Architecture
    dtype: DTypeLike = jnp.float32
    d_ff: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        c, width = self.config, x.shape[-1]
        activation, d_ff = ACTIVATIONS[c.activation], self.d_ff or c.d_ff
        inner = partial(linear, c, width, d_ff, bias=c.bias, dtype=self.dtype)
        hidden = activation(*(inner(name=name)(x) for name in activation.inputs))
        hidden = split(hidden, "batch", "tokens", "neurons")
        if not c.feed_forward_projection:
            return hidden
        outer = partial(linear, c, d_ff, width, bias=c.bias, dtype=self.dtype)
        return split(outer(residual_output=True, name="down")(hidden), "batch", "tokens", None)


def kernels(c: Architecture, count: int = 1, factor: int = 1) -> list[Kernels]:
    """Return the matrices of so many feed-forwards `factor` times as wide as the config's."""
    width, d_ff = factor * c.d_model, factor * c.d_ff
    inputs = count * len(ACTIVATIONS[c.activation].inputs)
    found = [Kernels(inputs, width, d_ff), Kernels(count * c.feed_forward_projection, d_ff, width)]
    return found if c.feed_forward else []
