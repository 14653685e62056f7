"""What goes into the linear layers when a model reads its training text.

The layers themselves know nothing of this: an interceptor stands before each and sows sums over
its input, which come out stacked over the layers as the parameters are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float
from rich.progress import track

from jaxdecoder.config import Config
from jaxdecoder.data import batches
from jaxdecoder.data.batches import Batch
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.layers.depth import Routed
from jaxdecoder.training.evaluation import predicted
from jaxdecoder.training.runs import Model
from jaxdecoder.training.sparsity import Path, body_matrices

SOWN = "of_inputs"


class Inputs(NamedTuple):
    """Sums over calibration tokens, by the paths of the kernels that the inputs x meet."""

    squares: dict[Path, Float[Array, "*layers d_in"]]
    """Of x^2, each feature's."""
    grams: dict[Path, Float[Array, "*layers d_in d_in"]]
    """Of x x^T; empty unless asked for."""
    tokens: int


def calibrate(model: Model, corpus: Corpus, tokens: int, *, grams: bool = False) -> Inputs:
    """Sums over some `tokens` tokens of the training split, of every linear layer's input.

    The text is the same for the same config: whole batches, their rows spread evenly over the
    split. Padding is left out, and so are, for the layers of a block with a router, the tokens that
    it does not take. A head of its own is among the layers; embeddings and routers are not.

    Raises:
        UserError: if the split has fewer tokens, or those asked for are fewer than the widest input
            has features, so that they could not tell what these are like.
    """
    chosen = calibration_batches(model.config, corpus, tokens)
    kernels = body_matrices(model.params, head=True)
    widest = max(kernel.shape[-2] for kernel in kernels.values())
    total = int(sum(np.count_nonzero(batch.weights) for batch in chosen))
    if total < widest:
        raise UserError(
            f"--calibration-tokens {tokens}: the widest layer has {widest:,} inputs, and {total:,} "
            f"tokens cannot tell what they are like; give at least {widest:,}"
        )
    summed = jax.jit(lambda params, batch: sums(model.decoder, params, batch, grams=grams))
    added: Any = None
    for batch in track(chosen, description="calibration"):
        new = summed(model.params, batch)
        added = new if added is None else jax.tree.map(jnp.add, added, new)
    squares, products = added
    return Inputs(
        {path: squares[path] for path in kernels},
        {path: products[path] for path in kernels} if grams else {},
        total,
    )


def calibration_batches(config: Config, corpus: Corpus, tokens: int) -> list[Batch]:
    """Batches of about so many tokens of the training split, in whole batches.

    Raises:
        UserError: if the split has fewer.
    """
    have = predicted(config, corpus.train)
    if not 0 < tokens <= have:
        raise UserError(
            f"--calibration-tokens {tokens}: must be between 1 and the {have:,} tokens that the "
            "training split of the run's data has"
        )
    a_row = float(config.model.context_length)
    if config.data.mode == "padded":
        a_row = have / len(corpus.train.starts)
    count = math.ceil(tokens / a_row / config.train.batch_size)
    return list(batches.fixed(config, corpus, "train", count))


def sums(
    decoder: nn.Module, params: Any, batch: Batch, *, grams: bool = False
) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """Of one batch the sums over its tokens of x^2 and, if asked for, of x x^T."""

    def of(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        x = x.astype(jnp.float32)
        rows, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1)
        products = ((rows * weights[:, None]).T @ rows,) if grams else ()
        return (weights @ jnp.square(rows), *products)

    with observed(of, (jnp.asarray(batch.weights) > 0).astype(jnp.float32)) as weights:
        features, seen = decoder.apply(
            {"params": params}, batch.inputs, method="features", mutable=["intermediates"]
        )
    found = {
        path[: path.index(SOWN)]: value[0]
        for path, value in flatten_dict(seen["intermediates"]).items()
        if SOWN in path
    }
    # The head is a product of another kind, which no module's call makes.
    found["head",] = of(features, weights)
    by_kernel = {(*path, "kernel"): value for path, value in found.items()}
    return (
        {path: value[0] for path, value in by_kernel.items()},
        {path: value[1] for path, value in by_kernel.items()} if grams else {},
    )


@contextlib.contextmanager
def observed(
    of: Callable[[jax.Array, jax.Array], Any], weights: Float[Array, "batch time"]
) -> Iterator[Float[Array, "batch time"]]:
    """Within it, linear layers sow what `of` makes of their input and its tokens' weights."""
    held = [weights]

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, Routed):
            # The block inside computes every token, but what it makes of some goes nowhere.
            router = module.variables["params"]["router"]
            score = args[0].astype(jnp.float32) @ router["kernel"] + router["bias"]
            held.append(held[-1] * (score[..., 0] > 0))
            try:
                return call(*args, **kwargs)
            finally:
                held.pop()
        if isinstance(module, nn.Dense):
            module.sow("intermediates", SOWN, of(args[0], held[-1]))
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield weights
