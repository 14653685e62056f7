"""Estimate on calibration text how important the parts of a model are for its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from rich.progress import track

from jaxdecoder.compression.calibration import added_up
from jaxdecoder.compression.parts import Gates, Part
from jaxdecoder.data.batches import Batch
from jaxdecoder.layers import tree
from jaxdecoder.layers.serial import turn
from jaxdecoder.training.losses import summed_cross_entropy
from jaxdecoder.training.runs import Model
from jaxdecoder.typing import Params

MEASURES: dict[str, Callable[[Float[Array, "rows ..."]], Float[Array, "..."]]] = {
    "taylor": lambda slopes: jnp.sum(jnp.square(slopes), axis=0),
    "gates": lambda slopes: jnp.sum(jnp.abs(slopes), axis=0),
}
"""Measures of a gate, from the slope of each row's loss along it: the mean square (first-order
Taylor expansion, arXiv 1906.10771), or the mean absolute value (Michel et al., arXiv 1905.10650).
"""


def by_gates(model: Model, part: Part, batches: Sequence[Batch], measure: str) -> Gates:
    """Return the importance of each unit, by `MEASURES`, in nats per token or their square.

    The slope along a gate at 1 is the sum of weight times gradient over the weights behind it. To
    first order, that is how the loss changes without these weights.
    """
    config, decoder = model.config.architecture, model.decoder

    @jax.jit
    def added(params: Params, batch: Batch) -> tuple[Gates, jax.Array]:
        ones = part.ones(params, config)

        def slopes(row: Batch) -> Gates:
            row = jax.tree.map(lambda x: x[None], row)
            weight = jnp.maximum(jnp.sum(row.weights), 1.0)

            def loss(gates: Gates) -> jax.Array:
                return summed_cross_entropy(decoder, part.gated(params, config, gates), row)

            return jax.tree.map(lambda g: g / weight, jax.grad(loss)(ones))

        measured = jax.tree.map(MEASURES[measure], jax.lax.map(slopes, batch))
        return measured, jnp.sum(jnp.any(batch.weights > 0, axis=1))

    return _mean(added, model.params, batches, "importance")


def influence(model: Model, batches: Sequence[Batch]) -> Gates:
    """Return how much each turn of the layers' pattern changes the residual stream.

    This is the block influence: 1 - the cosine between the stream before and after the turn,
    averaged over the tokens (ShortGPT, arXiv 2403.03853).
    """
    last = len(turn(model.config.model)) - 1

    @jax.jit
    def added(params: Params, batch: Batch) -> tuple[Gates, jax.Array]:
        weights = jnp.asarray(batch.weights)
        before: list[jax.Array] = []

        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            place = tree.number_of(module.name, tree.block)
            if context.method_name != "__call__" or place is None:
                return call(*args, **kwargs)
            if place == 0:
                before[:] = [args[0]]
            out = call(*args, **kwargs)
            if place == last:
                changed = jnp.sum(weights * (1.0 - cosine(before[0], out[0])))
                module.sow("intermediates", "influence", changed)
            return out

        with nn.intercept_methods(interceptor):
            _, seen = model.decoder.apply(
                {"params": params}, batch.inputs, method="features", mutable=["intermediates"]
            )
        (found,) = tree.at(seen["intermediates"], (*tree.SERIAL, tree.block(last), "influence"))
        return {tree.SERIAL: found}, jnp.sum(weights)

    return _mean(added, model.params, batches, "block influence")


def cosine(x: Float[Array, "*rows width"], y: Float[Array, "*rows width"]) -> Float[Array, "*rows"]:
    """Return the cosine of the angle between vectors; 0 if one of them is 0."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(lengths, 1e-30)


def _mean(
    added: Callable[[Params, Batch], tuple[Gates, jax.Array]],
    params: Params,
    batches: Sequence[Batch],
    description: str,
) -> Gates:
    """Divide the sums over all batches by their counts."""
    sums, count = added_up(partial(added, params), track(batches, description=description))
    return jax.tree.map(lambda x: x / count, sums)
