"""Measure the inputs of linear layers while a model reads its training text.

The layers themselves do not know of this. An interceptor before each layer sows sums over its
input. The sums come out stacked over the layers, as the parameters are.
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
from jaxdecoder.layers.linear import Linear
from jaxdecoder.layers.tree import Matrices, body_matrices
from jaxdecoder.training.evaluation import predicted
from jaxdecoder.training.runs import Model
from jaxdecoder.typing import Params

SOWN = "of_inputs"


def calibration_batches(
    config: Config, corpus: Corpus, tokens: int, inputs: int = 1
) -> list[Batch]:
    """Return whole batches of the training split with about this many tokens.

    The rows are spread evenly over the split, and are the same for the same config.

    Raises:
        UserError: if the split has fewer tokens, or if they are fewer than the `inputs` of the
            widest layer, which is too few to measure these.
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
    """Return the greatest number of inputs of these kernels."""
    return max(kernel.shape[-2] for kernel in kernels.values())


def weighty(chosen: Iterable[Batch]) -> int:
    """Return the number of tokens without padding."""
    return int(sum(np.count_nonzero(batch.weights) for batch in chosen))


def input_squares(model: Model, corpus: Corpus, tokens: int) -> Matrices:
    """Run `calibrate` on about `tokens` tokens of the training split."""
    kernels = body_matrices(model.params, head=True)
    chosen = calibration_batches(model.config, corpus, tokens, widest(kernels))
    return calibrate(model.decoder, model.params, track(chosen, description="calibration"))


def calibrate(
    decoder: nn.Module, params: Params, chosen: Iterable[Batch], *, grams: bool = False
) -> Matrices:
    """Sum over the tokens of these batches, for the inputs x of each kernel, by the kernel's path.

    The sums are of x^2, (*layers, d_in), or with `grams` of x x^T, (*layers, d_in, d_in). They
    leave out padding, and for the layers of a block with a router the tokens that the block does
    not take. The layers include the head, tied or not, but no embeddings or routers.
    """
    return added_up(lambda batch: sums(decoder, params, batch, grams), chosen)


def added_up(of: Callable[[Batch], Any], chosen: Iterable[Batch]) -> Any:
    """Apply `of` to each batch and add up the results, which all have the same shapes."""
    return reduce(partial(jax.tree.map, jnp.add), map(of, chosen))


@partial(jax.jit, static_argnums=(0, 3))
def sums(decoder: nn.Module, params: Params, batch: Batch, grams: bool) -> Matrices:
    """Return the sums of `calibrate` for one batch."""

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
    # The head is another kind of product, which is not the call of a module.
    return found | {tree.HEAD: of(features, weights)}


@contextlib.contextmanager
def observed(
    of: Callable[[jax.Array, jax.Array], Any], weights: Float[Array, "batch time"]
) -> Iterator[Float[Array, "batch time"]]:
    """Make linear layers sow the result of `of` on their input and the weights of its tokens."""
    in_force = [weights]  # the last are those of the innermost routed block

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, Routed):
            # The block inside computes every token, but some results are not used.
            router = module.variables["params"]["router"]
            score = args[0].astype(jnp.float32) @ router["kernel"] + router["bias"]
            in_force.append(in_force[-1] * (score[..., 0] > 0))
            try:
                return call(*args, **kwargs)
            finally:
                in_force.pop()
        if isinstance(module, Linear):
            module.sow("intermediates", SOWN, of(args[0], in_force[-1]))
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield weights
