"""Match a student's layers to a teacher's, by measures that need no projection between widths.

Each measure compares tokens with tokens inside one model, then compares the results of the two
models. So widths, numbers of heads and depths may differ. Losses are per token. Masks are causal,
so that a match at a token uses only what a decoder knows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdecoder.compression.divergences import forward_kl
from jaxdecoder.config import Architecture, Config, ConfigError
from jaxdecoder.config.sections import Teaching
from jaxdecoder.decoder import Decoder
from jaxdecoder.layers import tree
from jaxdecoder.typing import Params

MASKED = -1e30
"""A finite score that softmax turns into 0, so that no difference of scores is infinite."""


class Outputs(NamedTuple):
    """The outputs of one layer (of parallel stacks: of one stack); queries and keys not rotated."""

    stream: Float[Array, "batch time width"]
    """The residual stream after it."""
    q: Float[Array, "batch time heads head_width"]
    k: Float[Array, "batch time kv_heads head_width"]
    v: Float[Array, "batch time kv_heads head_width"]


PerToken = Float[Array, "batch time"]
Layers = Sequence[Outputs]
Matching = Callable[[Layers, Layers, PerToken, Teaching], PerToken]
"""(student's layers, teacher's layers, weights of tokens, settings) -> a loss for each token."""


# --- Looking into a decoder -----------------------------------------------------------------------


def sow_heads(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Sow the heads that every attention mechanism gets; for `nn.intercept_methods`."""
    if context.module.name == "mixing" and context.method_name == "__call__":
        heads = args[0]
        context.module.sow("intermediates", "heads", (heads.q, heads.k, heads.v))
    return call(*args, **kwargs)


def looking(
    decoder: Decoder, params: Params, *args: Any, **kwargs: Any
) -> tuple[Any, list[Outputs]]:
    """Return the result of `decoder.apply`, and the outputs of the layers."""
    with nn.intercept_methods(sow_heads):
        out, seen = decoder.apply({"params": params}, *args, mutable=["intermediates"], **kwargs)
    config = decoder.architecture
    return out, LAYERS[config.layout](config, seen["intermediates"][tree.BODY])


def serial_layers(config: Architecture, body: Params) -> list[Outputs]:
    """Return the outputs of the blocks, from the first to the last."""
    found = []
    for block, stream in zip(tree.blocks(body), tree.streams(body), strict=True):
        (heads,) = block.get("block", block)["attention"]["mixing"]["heads"]
        found.append(Outputs(stream, *heads))
    return found


def stack_layers(config: Architecture, body: Params) -> list[Outputs]:
    """Return the outputs of the stacks, from the first to the last; heads of a stack in one row."""

    def beside(x: Float[Array, "turns batch time heads width"]) -> jax.Array:
        _, batch, time, _, width = x.shape
        return jnp.moveaxis(x, 0, 2).reshape(batch, time, -1, width)

    found = []
    for number in range(config.n_stacks):
        blocks = body[tree.stack(number)][tree.BLOCKS]
        each = [
            blocks[tree.block(i)]["attention"]["mixing"]["heads"][0]
            for i in range(len(config.attention_pattern))
        ]
        kinds = (
            jnp.concatenate([beside(x) for x in kind], axis=2) for kind in zip(*each, strict=True)
        )
        found.append(Outputs(body[tree.after(tree.stack(number))][0], *kinds))
    return found


LAYERS: dict[str, Callable[[Architecture, Params], list[Outputs]]] = {
    "serial": serial_layers,
    "parallel_stacks": stack_layers,
}


# --- Measures -------------------------------------------------------------------------------------


def relations(student: Layers, teacher: Layers, weights: PerToken, settings: Teaching) -> PerToken:
    """Match self-attention relations of the last layer (MiniLMv2, arXiv 2012.15828; 2002.10957).

    A relation is the softmax of the scaled products of queries with queries, keys with keys, or
    values with values. The loss is the KL divergence of the student's relations from the teacher's.
    The heads are joined and divided again into relation heads. Here a token is related only to
    itself and earlier tokens.
    """
    theirs = teacher[settings.teacher_layer - 1]
    mine = student[-1]
    heads = settings.relation_heads or math.gcd(
        *(kind.shape[2] for layer in (mine, theirs) for kind in (layer.q, layer.k, layer.v))
    )
    kinds = [
        jnp.mean(forward_kl(relation(ours, heads), relation(told, heads)), axis=1)
        for ours, told in ((mine.q, theirs.q), (mine.k, theirs.k), (mine.v, theirs.v))
    ]
    return sum(kinds[1:], kinds[0]) / len(kinds)


def relation(
    x: Float[Array, "batch time heads width"], relation_heads: int
) -> Float[Array, "batch relation_heads time time"]:
    """Relate each token to itself and all earlier tokens, as log-probabilities over these."""
    batch, time = x.shape[:2]
    x = x.astype(jnp.float32).reshape(batch, time, relation_heads, -1)
    scores = jnp.einsum("bqhw,bkhw->bhqk", x, x) * x.shape[-1] ** -0.5
    return jax.nn.log_softmax(jnp.where(_causal(time), scores, MASKED), axis=-1)


def similarity(student: Layers, teacher: Layers, weights: PerToken, settings: Teaching) -> PerToken:
    """Compare cosines between tokens in the residual streams (arXiv 1907.09682).

    The loss is the squared difference of the cosines. Layers are paired evenly, last with last. The
    paper compares the samples of a batch; here each token is compared with itself and earlier
    tokens.
    """

    def cosines(x: jax.Array) -> Float[Array, "batch time time"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
        return jnp.einsum("bqw,bkw->bqk", x, x)

    def loss(ours: Outputs, told: Outputs) -> PerToken:
        time = ours.stream.shape[1]
        squares = jnp.square(cosines(ours.stream) - cosines(told.stream))
        return jnp.sum(jnp.where(_causal(time), squares, 0.0), axis=-1) / jnp.arange(1, time + 1)

    return _mean_over_pairs(loss, student, teacher)


def cka(student: Layers, teacher: Layers, weights: PerToken, settings: Teaching) -> PerToken:
    """Return 1 - linear centred kernel alignment of the residual streams (arXiv 1905.00414).

    It is computed over the real tokens of a row; each of them gets the row's loss. Layers are
    paired evenly.
    """
    shares = (weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0))[..., None]

    def centred(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = (x - jnp.sum(shares * x, axis=1, keepdims=True)) * jnp.sqrt(shares)
        # Normalised, so that no product of small numbers underflows.
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True) + 1e-12)

    def common(x: jax.Array, y: jax.Array) -> Float[Array, " batch"]:
        return jnp.sum(jnp.square(jnp.einsum("btx,bty->bxy", x, y)), axis=(1, 2))

    def loss(ours: Outputs, told: Outputs) -> PerToken:
        x, y = centred(ours.stream), centred(told.stream)
        aligned = common(x, y) * jax.lax.rsqrt(common(x, x) * common(y, y) + 1e-12)
        return jnp.broadcast_to(1.0 - aligned[:, None], weights.shape)

    return _mean_over_pairs(loss, student, teacher)


MATCHINGS: dict[str, Matching] = {
    "relations": relations,
    "similarity": similarity,
    "cka": cka,
}


def paired(n_student: int, n_teacher: int) -> list[int]:
    """Return the teacher's layer for each layer of the student, from 0: evenly, last with last."""
    return [-(-(i + 1) * n_teacher // n_student) - 1 for i in range(n_student)]


def check(config: Config, teacher: Architecture) -> None:
    """Refuse a matching that is impossible with these two models.

    Raises:
        ConfigError: for heads that do not divide the widths, layers that do not exist, and
            relations of a student whose routers give its blocks only some of the tokens.
    """
    settings, student = config.distillation, config.architecture
    if settings.matching != "relations":
        return
    if student.depth == "mixture_of_depths":
        raise ConfigError(
            "distillation.matching",
            settings.matching,
            "the routers of a mixture_of_depths give blocks some of the tokens only, and no other "
            'has relations to match; "similarity" or "cka" would do',
        )
    depth = teacher.n_stacks if teacher.layout == "parallel_stacks" else teacher.n_layers
    if settings.teacher_layer > depth:
        raise ConfigError(
            "distillation.teacher_layer", settings.teacher_layer, f"the teacher has {depth}"
        )
    widths = [
        c.layers_side_by_side * width  # of all queries of a layer together, and of all keys
        for c in (student, teacher)
        for width in (c.query_width, c.kv_width)
    ]
    heads = settings.relation_heads
    if heads and any(width % heads for width in widths):
        most = math.gcd(*widths)
        fits = [n for n in range(1, most + 1) if most % n == 0]
        raise ConfigError(
            "distillation.relation_heads",
            heads,
            f"must divide the widths of queries and keys in both models, {widths}: one of {fits}",
        )


def _causal(time: int) -> jax.Array:
    return jnp.tril(jnp.ones((time, time), bool))


def _mean_over_pairs(
    loss: Callable[[Outputs, Outputs], PerToken], student: Layers, teacher: Layers
) -> PerToken:
    pairs = zip(student, paired(len(student), len(teacher)), strict=True)
    losses = [loss(ours, teacher[number]) for ours, number in pairs]
    return sum(losses[1:], losses[0]) / len(losses)
