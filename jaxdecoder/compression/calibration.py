"""What goes into the linear layers when a model reads its training text.

The layers themselves know nothing of this: an interceptor stands before each and sows sums over
its input, which come out stacked over the layers as the parameters are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.progress import track

from jaxdecoder.config import Config
from jaxdecoder.data.batches import Batch, Feed
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.layers import tree
from jaxdecoder.layers.depth import Routed
from jaxdecoder.layers.tree import Matrices, body_matrices
from jaxdecoder.training.evaluation import predicted
from jaxdecoder.training.runs import Model

SOWN = "of_inputs"


def calibration_batches(
    config: Config, corpus: Corpus, tokens: int, inputs: int = 1
) -> list[Batch]:
    """Batches of about so many tokens of the training split, in whole batches.

    The text is the same for the same config, its rows spread evenly over the split.

    Raises:
        UserError: if the split has fewer tokens, or those asked for are fewer than the widest
            layer has `inputs`, so that they could not tell what these are like.
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
    chosen = list(Feed.of(config, corpus, "train").fixed(count))
    if (total := weighty(chosen)) < inputs:
        raise UserError(
            f"--calibration-tokens {tokens}: the widest layer has {inputs:,} inputs, and {total:,} "
            f"tokens cannot tell what they are like; give at least {inputs:,}"
        )
    return chosen


def widest(kernels: Matrices) -> int:
    """The most inputs that one of these has."""
    return max(kernel.shape[-2] for kernel in kernels.values())


def weighty(chosen: Iterable[Batch]) -> int:
    """How many tokens count, padding aside."""
    return int(sum(np.count_nonzero(batch.weights) for batch in chosen))


def input_squares(model: Model, corpus: Corpus, tokens: int) -> Matrices:
    """`calibrate` over some `tokens` tokens of the training split."""
    kernels = body_matrices(model.params, head=True)
    chosen = calibration_batches(model.config, corpus, tokens, widest(kernels))
    return calibrate(model.decoder, model.params, track(chosen, description="calibration"))


def calibrate(
    decoder: nn.Module, params: Any, chosen: Iterable[Batch], *, grams: bool = False
) -> Matrices:
    """Sums over the tokens of these batches, by the paths of the kernels that the inputs x meet.

    Of x^2, (*layers, d_in), or with `grams` of x x^T, (*layers, d_in, d_in). Padding is left out,
    and so are, for the layers of a block with a router, the tokens that it does not take. The head
    is among the layers, its kernel its own or not; embeddings and routers are not.
    """
    return added_up(lambda batch: sums(decoder, params, batch, grams), chosen)


def added_up(of: Callable[[Batch], Any], chosen: Iterable[Batch]) -> Any:
    """What `of` makes of each batch, arrays all of the same shapes, added up."""
    return reduce(partial(jax.tree.map, jnp.add), map(of, chosen))


@partial(jax.jit, static_argnums=(0, 3))
def sums(decoder: nn.Module, params: Any, batch: Batch, grams: bool) -> Matrices:
    """Those of `calibrate` over one batch."""

    def of(x: jax.Array, weights: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        rows, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1)
        return (rows * weights[:, None]).T @ rows if grams else weights @ jnp.square(rows)

    with observed(of, (jnp.asarray(batch.weights) > 0).astype(jnp.float32)) as weights:
        features, seen = decoder.apply(
            {"params": params}, batch.inputs, method="features", mutable=["intermediates"]
        )
    found = {
        (*path[: path.index(SOWN)], tree.KERNEL): value[0]
        for path, value in tree.leaves(seen["intermediates"]).items()
        if SOWN in path
    }
    # The head is a product of another kind, which no module's call makes.
    return found | {tree.HEAD: of(features, weights)}


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
