"""What enters the linear layers of a model, as Gram matrices over a calibration set."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder

Path = tuple[str, ...]
"""Where a linear layer's parameters are, such as ("head",)."""

HEAD: Path = ("head",)


def gram_matrices(decoder: Decoder, params: Any, batches: Iterable[Batch]) -> dict[Path, jax.Array]:
    """X^T X of the inputs X (tokens, d_in) of every linear layer, (*layers, d_in, d_in).

    Layers that are stacked have their axes first, as their kernels do. Padding does not count. A
    block with a router is given every token, as it is outside training, whether it takes it or not.
    """
    total: dict[Path, jax.Array] = {}
    for batch in batches:
        grams = _of_batch(decoder, params, batch)
        total = {path: total[path] + gram if total else gram for path, gram in grams.items()}
    return total


@partial(jax.jit, static_argnums=0)
def _of_batch(decoder: Decoder, params: Any, batch: Batch) -> dict[Path, jax.Array]:
    def gram(x: jax.Array) -> jax.Array:
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        return (rows * batch.weights.reshape(-1, 1)).T @ rows

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.Dense) and module.name != "router":
            module.sow("intermediates", "gram", gram(args[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        features, seen = decoder.apply(
            {"params": params}, batch.inputs, method="features", mutable=["intermediates"]
        )
    flat = flatten_dict(seen["intermediates"])
    grams = {path[:-1]: noted[0] for path, noted in flat.items() if path[-1] == "gram"}
    return {**grams, HEAD: gram(features)}  # type: ignore[arg-type]
