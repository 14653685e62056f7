"""The output head and its loss, which needs no logits of all tokens at once.

A batch of 2 x 2048 tokens has 1.8 GB of float32 logits over a vocabulary of 110,000, and as many
gradients of them. Here the vocabulary passes by in chunks: the forward pass keeps a running
logarithm of the sum of exponentials (arXiv 1805.02867) and the target's logit, and the backward
pass computes a chunk's logits again for its share of the gradients. Chunks are of the vocabulary
rather than of the tokens, so that a chunk's gradient of the kernel is written once, and tokens
that are sharded over devices stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxdecoder.kernels.flash import current_device
from jaxdecoder.kernels.packing import Packed
from jaxdecoder.kernels.quantized import packed_product


class Limits(NamedTuple):
    """Numbers of logits, 4 bytes each."""

    whole: int
    """Up to so many are quickest in one piece, which spares the backward pass a product."""
    chunk: int
    """As many are in a chunk: on a CPU they should fit its caches."""


CPU, ACCELERATOR = Limits(2**21, 2**20), Limits(2**26, 2**24)

NARROWEST = 512
"""Entries of the vocabulary in a chunk, at least: narrower products waste a device."""


def head_logits(
    features: Float[Array, "*batch width"],
    kernel: Float[Array, "width vocab"] | Packed,
    bias: Float[Array, " vocab"] | None,
    *,
    logit_softcap: float | None = None,
) -> Float[Array, "*batch vocab"]:
    """features @ kernel + bias, factors in the type of the features and sums in float32.

    `logit_softcap` bounds them to (-c, c) by c tanh(logits / c) (arXiv 2408.00118).
    """
    dtype = features.dtype
    logits = packed_product(features, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    return logits


def cross_entropy(
    features: Float[Array, "batch time width"],
    kernel: Float[Array, "width vocab"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, "batch time"],
    *,
    logit_softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "batch time"]:
    """-log softmax(`head_logits`)[target] for each token, in nats, float32.

    `chunk`: entries of the vocabulary whose logits exist at a time; left out, all of them where
    they are few enough. Gradients of the kernel and the bias have their own types, float32 at best.
    """
    tokens, vocab = targets.size, kernel.shape[1]
    if chunk is None:
        limits = CPU if current_device().platform == "cpu" else ACCELERATOR
        whole = tokens * vocab <= limits.whole
        chunk = vocab if whole else max(NARROWEST, limits.chunk // tokens)
    if chunk >= vocab:
        logits = head_logits(features, kernel, bias, logit_softcap=logit_softcap)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    rows = features.reshape(-1, features.shape[-1])
    losses = _chunked(rows, kernel, bias, targets.reshape(-1), logit_softcap, chunk)
    return losses.reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(
    features: Float[Array, "tokens width"],
    kernel: Float[Array, "width vocab"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, " tokens"],
    logit_softcap: float | None,
    chunk: int,
) -> Float[Array, " tokens"]:
    return _forward(features, kernel, bias, targets, logit_softcap, chunk)[0]


def _forward(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    logit_softcap: float | None,
    chunk: int,
) -> tuple[jax.Array, Any]:
    def add(carry: Any, start: Any, size: int) -> Any:
        largest, total, chosen = carry
        logits = _logits_of(features, kernel, bias, logit_softcap, start, size)
        higher = jnp.maximum(largest, jnp.max(logits, axis=-1))
        total = total * jnp.exp(largest - higher)
        total = total + jnp.sum(jnp.exp(logits - higher[:, None]), axis=-1)
        place = targets - start
        own = jnp.take_along_axis(logits, jnp.clip(place, 0, size - 1)[:, None], axis=-1)[:, 0]
        return higher, total, jnp.where((place >= 0) & (place < size), own, chosen)

    zeros = jnp.zeros_like(features[:, 0], jnp.float32)
    largest, total, chosen = _over_chunks(
        add, (zeros - jnp.inf, zeros, zeros), kernel.shape[1], chunk
    )
    logsumexp = largest + jnp.log(total)
    return logsumexp - chosen, (features, kernel, bias, targets, logsumexp)


def _backward(logit_softcap: float | None, chunk: int, kept: Any, g: jax.Array) -> Any:
    features, kernel, bias, targets, logsumexp = kept
    dtype, vocab = features.dtype, kernel.shape[1]

    def add(carry: Any, start: Any, size: int) -> Any:
        d_features, d_kernel, d_bias = carry
        logits = _logits_of(features, kernel, bias, logit_softcap, start, size)
        chosen = (targets - start)[:, None] == jnp.arange(size)
        d_logits = (jnp.exp(logits - logsumexp[:, None]) - chosen) * g[:, None]
        if logit_softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / logit_softcap))
        if bias is not None:
            part = jnp.sum(d_logits, axis=0).astype(bias.dtype)
            d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, part, start, axis=0)
        factor = d_logits.astype(dtype)
        part = _dot(features, factor, (0, 0)).astype(kernel.dtype)
        d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, part, start, axis=1)
        columns = _columns(kernel, start, size, axis=1).astype(dtype)
        return d_features + _dot(factor, columns, (1, 1)), d_kernel, d_bias

    empty = jnp.zeros_like(features, jnp.float32), *jax.tree.map(jnp.zeros_like, (kernel, bias))
    d_features, d_kernel, d_bias = _over_chunks(add, empty, vocab, chunk)
    return d_features.astype(dtype), d_kernel, d_bias, None


_chunked.defvjp(_forward, _backward)


def _logits_of(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    logit_softcap: float | None,
    start: Any,
    size: int,
) -> jax.Array:
    """The logits of `size` entries of the vocabulary, from `start` on."""
    part = None if bias is None else _columns(bias, start, size, axis=0)
    columns = _columns(kernel, start, size, axis=1)
    return head_logits(features, columns, part, logit_softcap=logit_softcap)


def _over_chunks(add: Callable[[Any, Any, int], Any], carry: Any, vocab: int, chunk: int) -> Any:
    """`add`(carry, start, size) over the vocabulary; the last chunk has what is left."""
    full, rest = divmod(vocab, chunk)
    carry = jax.lax.fori_loop(0, full, lambda i, carry: add(carry, i * chunk, chunk), carry)
    return add(carry, full * chunk, rest) if rest else carry


def _columns(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product over one axis of each, summed in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
