"""How much a model's parts matter to its loss, estimated on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float
from rich.progress import track

from jaxdecoder.compression.calibration import added_up
from jaxdecoder.compression.parts import BLOCKS, Gates, Part
from jaxdecoder.data.batches import Batch
from jaxdecoder.layers.serial import turn
from jaxdecoder.training.losses import summed_cross_entropy
from jaxdecoder.training.runs import Model

Measure = Callable[[Float[Array, "rows ..."]], Float[Array, "..."]]

MEASURES: dict[str, Measure] = {
    "taylor": lambda slopes: jnp.sum(jnp.square(slopes), axis=0),
    "gates": lambda slopes: jnp.sum(jnp.abs(slopes), axis=0),
}
"""Of the loss's slope along a gate, for each row of text: its mean square (Taylor expansion to the
first order, arXiv 1906.10771), or its mean size (Michel et al., arXiv 1905.10650)."""


def by_gates(model: Model, part: Part, batches: Sequence[Batch], measure: str) -> Gates:
    """The importance of each unit, by `MEASURES`, in nats a token or their square.

    The slope along a gate at 1 is the sum of weight times gradient over the weights behind it: what
    the loss would lose without them, to the first order.
    """
    config, decoder = model.config.architecture, model.decoder

    @jax.jit
    def added(params: Any, batch: Batch) -> tuple[Gates, jax.Array]:
        ones = part.ones(params, config)

        def slopes(row: Batch) -> Any:
            row = jax.tree.map(lambda x: x[None], row)
            weight = jnp.maximum(jnp.sum(row.weights), 1.0)

            def loss(gates: Any) -> jax.Array:
                return summed_cross_entropy(decoder, part.gated(params, config, gates), row)

            return jax.tree.map(lambda g: g / weight, jax.grad(loss)(ones))

        measured = jax.tree.map(MEASURES[measure], jax.lax.map(slopes, batch))
        return measured, jnp.sum(jnp.any(batch.weights > 0, axis=1))

    return _mean(added, model.params, batches, "importance")


def influence(model: Model, batches: Sequence[Batch]) -> Gates:
    """How much each turn of the layers' pattern changes the residual stream (block influence).

    1 - the cosine between the stream before and after it, averaged over the tokens (ShortGPT,
    arXiv 2403.03853).
    """
    last = len(turn(model.config.model)) - 1

    @jax.jit
    def added(params: Any, batch: Batch) -> tuple[Gates, jax.Array]:
        weights = jnp.asarray(batch.weights)
        before: list[jax.Array] = []

        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or not str(module.name).startswith("block_"):
                return call(*args, **kwargs)
            if module.name == "block_0":
                before[:] = [args[0]]
            out = call(*args, **kwargs)
            if module.name == f"block_{last}":
                changed = jnp.sum(weights * (1.0 - cosine(before[0], out[0])))
                module.sow("intermediates", "influence", changed)
            return out

        with nn.intercept_methods(interceptor):
            _, seen = model.decoder.apply(
                {"params": params}, batch.inputs, method="features", mutable=["intermediates"]
            )
        found = flatten_dict(seen["intermediates"])
        return {BLOCKS: found[*BLOCKS, f"block_{last}", "influence"][0]}, jnp.sum(weights)

    return _mean(added, model.params, batches, "block influence")


def cosine(x: Float[Array, "*rows width"], y: Float[Array, "*rows width"]) -> Float[Array, "*rows"]:
    """Of the angle between vectors; 0 where one of them is 0."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(lengths, 1e-30)


def _mean(
    added: Callable[[Any, Batch], Any], params: Any, batches: Sequence[Batch], description: str
) -> Gates:
    """The sums of all batches over their counts."""
    sums, count = added_up(partial(added, params), track(batches, description=description))
    return jax.tree.map(lambda x: x / count, sums)
