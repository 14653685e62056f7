"""The output head and its loss, which needs no logits of all tokens at once.

A batch of 2 x 2048 tokens has 1.8 GB of float32 logits over a vocabulary of 110,000, and as many
gradients of them. Here the vocabulary passes by in chunks: the forward pass keeps a running
logarithm of the sum of exponentials (arXiv 1805.02867) and the target's logit, and the backward
pass computes a chunk's logits again for its share of the gradients. Chunks are of the vocabulary
rather than of the tokens, so that a chunk's gradient of the kernel is written once, and tokens
that are sharded over devices stay where they are.

A GPU's tensor cores want whole tiles: there the vocabulary is filled up with columns of zeros,
whose logits are -inf. It also has room for more logits at a time, and where it has for all of them
they are kept for the backward pass, which is spared their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.packing import Packed
from jaxdecoder.kernels.quantized import packed_product
from jaxdecoder.typing import Index


class Limits(NamedTuple):
    """Numbers of logits, 4 bytes each."""

    whole: int
    """Up to so many are quickest in one piece, which spares the backward pass a product."""
    chunk: int
    """As many are in a chunk: on a CPU they should fit its caches."""


CPU, ACCELERATOR = Limits(2**21, 2**20), Limits(2**26, 2**24)

NARROWEST = 512
"""Entries of the vocabulary in a chunk, at least: narrower products waste a device."""

TILE = 128
"""Columns of a GPU's products are a multiple of it."""

USUAL_MEMORY = 60_000_000_000
"""Bytes that JAX takes of an H100's 80 GB: for programs that are compiled for a card elsewhere."""


def device_tile() -> int:
    """What the columns of a product should be a multiple of, on the device that is traced for."""
    return TILE if current_device().platform == "gpu" else 1


def device_limits() -> Limits:
    """Those of the device that is traced for; a GPU's by the memory that JAX may use of it.

    Kept logits and their gradients, 6 bytes each, are a tenth of it at most.
    """
    platform = current_device().platform
    if platform != "gpu":
        return CPU if platform == "cpu" else ACCELERATOR
    device = jax.local_devices()[0]
    stats = (device.memory_stats() or {}) if device.platform == "gpu" else {}
    memory = stats.get("bytes_limit", USUAL_MEMORY)
    return Limits(memory // 64, memory // 512)


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
    dtype, vocab = features.dtype, kernel.shape[1]
    many = math.prod(features.shape[:-1]) >= TILE
    if many and vocab % TILE and device_tile() > 1 and not isinstance(kernel, Packed):
        # Few rows, as in decoding, are not worth a copy of the kernel.
        wide = _widened(kernel.astype(dtype), _up(vocab, TILE))
        logits = packed_product(features, wide, preferred_element_type=jnp.float32)[..., :vocab]
    else:
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
    tile: int | None = None,
) -> Float[Array, "batch time"]:
    """-log softmax(`head_logits`)[target] for each token, in nats, float32.

    `chunk`: entries of the vocabulary whose logits exist at a time; left out, all of them where
    they are few enough. `tile`: what the columns of every product are a multiple of; left out,
    `TILE` on a GPU, and any number elsewhere. Gradients of the kernel and the bias have their own
    types, float32 at best.
    """
    tokens, vocab = targets.size, kernel.shape[1]
    tile = tile or device_tile()
    if chunk is None:
        limits = device_limits()
        whole = tokens * vocab <= limits.whole
        chunk = vocab if whole else max(NARROWEST, limits.chunk // tokens)
    if chunk >= vocab and tile == 1:
        logits = head_logits(features, kernel, bias, logit_softcap=logit_softcap)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    columns = vocab
    if tile > 1:
        # Equal chunks, so that the last one is no waste.
        count = -(-vocab // chunk)
        chunk = _up(-(-vocab // count), tile)
        columns = _up(vocab, chunk)
    rows = features.reshape(-1, features.shape[-1])
    losses = _chunked(rows, kernel, bias, targets.reshape(-1), logit_softcap, chunk, columns)
    return losses.reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(
    features: Float[Array, "tokens width"],
    kernel: Float[Array, "width vocab"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, " tokens"],
    logit_softcap: float | None,
    chunk: int,
    columns: int,
) -> Float[Array, " tokens"]:
    """`columns`: those of the kernel once it is filled up with zeros."""
    return _forward(features, kernel, bias, targets, logit_softcap, chunk, columns)[0]


_Carry = TypeVar("_Carry")
_Kept = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array, Any]
"""For the backward pass; the last is all logits, where they are kept."""

_Sums = tuple[jax.Array, jax.Array, jax.Array]
"""Of each token the largest logit, the sum of exponentials and the target's logit."""

_Gradients = tuple[jax.Array, jax.Array, Any]
"""Of features, kernel and bias, which may be None."""


def _forward(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    logit_softcap: float | None,
    chunk: int,
    columns: int,
) -> tuple[jax.Array, _Kept]:
    vocab = kernel.shape[1]
    head = _filled_up(features, kernel, bias, columns)

    def add(carry: _Sums, start: Index, size: int, logits: jax.Array | None = None) -> _Sums:
        largest, total, chosen = carry
        if logits is None:
            logits = _logits_of(*head, logit_softcap, start, size)
        real = _within(logits, start, vocab, columns, -jnp.inf)
        higher = jnp.maximum(largest, jnp.max(real, axis=-1))
        total = total * jnp.exp(largest - higher)
        total = total + jnp.sum(jnp.exp(real - higher[:, None]), axis=-1)
        place = targets - start
        own = jnp.take_along_axis(logits, jnp.clip(place, 0, size - 1)[:, None], axis=-1)[:, 0]
        return higher, total, jnp.where((place >= 0) & (place < size), own, chosen)

    zeros = jnp.zeros_like(features[:, 0], jnp.float32)
    empty, whole = (zeros - jnp.inf, zeros, zeros), None
    if chunk >= columns:
        whole = _logits_of(*head, logit_softcap, 0, columns)
        largest, total, chosen = add(empty, 0, columns, whole)
    else:
        largest, total, chosen = _over_chunks(add, empty, columns, chunk)
    logsumexp = largest + jnp.log(total)
    return logsumexp - chosen, (features, kernel, bias, targets, logsumexp, whole)


def _backward(
    logit_softcap: float | None, chunk: int, columns: int, kept: _Kept, g: jax.Array
) -> tuple[jax.Array | None, ...]:
    features, kernel, bias, targets, logsumexp, whole = kept
    dtype, vocab = features.dtype, kernel.shape[1]
    head = _filled_up(features, kernel, bias, columns)

    def of(start: Index, size: int, logits: jax.Array) -> _Gradients:
        """The gradients that these logits give: of features, kernel and bias."""
        chosen = (targets - start)[:, None] == jnp.arange(size)
        odds = _within(jnp.exp(logits - logsumexp[:, None]), start, vocab, columns, 0.0)
        d_logits = (odds - chosen) * g[:, None]
        if logit_softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / logit_softcap))
        factor = d_logits.astype(dtype)
        d_bias = None if bias is None else jnp.sum(d_logits, axis=0).astype(bias.dtype)
        d_kernel = _dot(features, factor, (0, 0)).astype(kernel.dtype)
        part = _columns(head[1], start, size, axis=1).astype(dtype)
        return _dot(factor, part, (1, 1)), d_kernel, d_bias

    def add(carry: _Gradients, start: Index, size: int) -> _Gradients:
        d_features, d_kernel, d_bias = carry
        parts = of(start, size, _logits_of(*head, logit_softcap, start, size))
        d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, parts[1], start, axis=1)
        if bias is not None:
            d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, parts[2], start, axis=0)
        return d_features + parts[0], d_kernel, d_bias

    if chunk >= columns:
        d_features, d_kernel, d_bias = of(0, columns, whole)
    else:
        empty = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], columns), x.dtype), (kernel, bias))
        sums = jnp.zeros_like(features, jnp.float32), *empty
        d_features, d_kernel, d_bias = _over_chunks(add, sums, columns, chunk)
    if columns > vocab:
        d_kernel, d_bias = jax.tree.map(lambda x: x[..., :vocab], (d_kernel, d_bias))
    return d_features.astype(dtype), d_kernel, d_bias, None


_chunked.defvjp(_forward, _backward)


def _filled_up(
    features: jax.Array, kernel: jax.Array, bias: jax.Array | None, columns: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The head with so many columns; converted before it is copied."""
    if columns == kernel.shape[1]:
        return features, kernel, bias
    wide = _widened(kernel.astype(features.dtype), columns)
    return features, wide, None if bias is None else _widened(bias, columns)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _widened(x: jax.Array, columns: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])


def _logits_of(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    logit_softcap: float | None,
    start: Index,
    size: int,
) -> jax.Array:
    """The logits of `size` columns of the head, from `start` on."""
    part = None if bias is None else _columns(bias, start, size, axis=0)
    columns = _columns(kernel, start, size, axis=1)
    return head_logits(features, columns, part, logit_softcap=logit_softcap)


def _within(x: jax.Array, start: Index, vocab: int, columns: int, else_: float) -> jax.Array:
    """x of the columns from `start` on, but for those that fill the vocabulary up."""
    if columns == vocab:
        return x
    return jnp.where(start + jnp.arange(x.shape[-1]) < vocab, x, else_)


def _over_chunks(
    add: Callable[[_Carry, Index, int], _Carry], carry: _Carry, vocab: int, chunk: int
) -> _Carry:
    """`add`(carry, start, size) over the vocabulary; the last chunk has what is left."""
    full, rest = divmod(vocab, chunk)
    carry = jax.lax.fori_loop(0, full, lambda i, carry: add(carry, i * chunk, chunk), carry)
    return add(carry, full * chunk, rest) if rest else carry


def _columns(x: jax.Array, start: Index, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product over one axis of each, summed in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
