"""The output head and its loss, computed without the logits of all tokens at once.

A batch of 2 x 2048 tokens has 1.8 GB of float32 logits over a vocabulary of 110,000, and as many
gradients of them. Here the vocabulary is cut into chunks. The forward pass keeps an online softmax
(`online.py`) and the target's logit; the backward pass computes a chunk's logits again for its
share of the gradients. The vocabulary is cut rather than the tokens, so that a chunk's gradient of
the kernel is written once, and tokens that are sharded over devices stay where they are.

A GPU's tensor cores need whole tiles: there the vocabulary is filled up with columns of zeros,
whose logits are -inf. A GPU also has room for more logits at a time. If it has room for all of
them, they are kept, and the backward pass need not compute them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxdecoder import devices
from jaxdecoder.kernels import mesh, online
from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.packing import Packed
from jaxdecoder.kernels.padding import padded, round_up
from jaxdecoder.kernels.product import dot
from jaxdecoder.kernels.quantized import packed_product
from jaxdecoder.kernels.typing import Carry
from jaxdecoder.typing import Index


class Limits(NamedTuple):
    """How many logits, of 4 bytes each, may exist at a time."""

    whole: int
    """Up to this many are computed in one piece, which spares the backward pass a product."""
    chunk: int
    """The size of a chunk otherwise: on a CPU it should fit the caches."""


CPU, ACCELERATOR = Limits(2**21, 2**20), Limits(2**26, 2**24)

NARROWEST = 512
"""Entries of the vocabulary in a chunk, at least: narrower products waste a device."""

TILE = 128
"""The columns of a GPU's products are a multiple of this."""

USUAL_MEMORY = 60_000_000_000
"""Bytes that JAX takes of an H100's 80 GB, for a card that is neither here nor known."""


def device_tile() -> int:
    """Return what the columns of a product should be a multiple of, on the current device."""
    return TILE if current_device().platform == "gpu" else 1


def device_limits() -> Limits:
    """Return the limits of the current device; a GPU's go by the memory that JAX may use of it.

    Kept logits and their gradients, 6 bytes each, take a tenth of it at most.
    """
    platform = current_device().platform
    if platform != "gpu":
        return CPU if platform == "cpu" else ACCELERATOR
    device = jax.local_devices()[0]
    stats = (device.memory_stats() or {}) if device.platform == "gpu" else {}
    known = devices.of_kind(current_device().kind)
    memory = stats.get("bytes_limit", known.usable if known else USUAL_MEMORY)
    return Limits(memory // 64, memory // 512)


def head_logits(
    features: Float[Array, "*batch width"],
    kernel: Float[Array, "width vocab"] | Packed,
    bias: Float[Array, " vocab"] | None,
    *,
    logit_softcap: float | None = None,
) -> Float[Array, "*batch vocab"]:
    """Compute features @ kernel + bias: factors in the type of the features, sums in float32.

    `logit_softcap` bounds them to (-c, c) by c tanh(logits / c) (arXiv 2408.00118).
    """
    dtype, vocab = features.dtype, kernel.shape[1]
    many = math.prod(features.shape[:-1]) >= TILE
    if many and vocab % TILE and device_tile() > 1 and not isinstance(kernel, Packed):
        # Few rows, as in decoding, are not worth a copy of the kernel.
        wide = padded(kernel.astype(dtype), -1, round_up(vocab, TILE))
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
    """Compute -log softmax(`head_logits`)[target] for each token, in nats, float32.

    `chunk`: entries of the vocabulary whose logits exist at a time; left out, all of them where
    they are few enough. `tile`: what the columns of every product are a multiple of; left out,
    `TILE` on a GPU, and any number elsewhere. Gradients of the kernel and the bias have their own
    types, float32 at best.
    """
    tile = tile or device_tile()
    run = partial(_cross_entropy, logit_softcap=logit_softcap, chunk=chunk, tile=tile)
    found = mesh.current()
    if found is None:
        return run(features, kernel, bias, targets)
    # Each device has the losses of its own tokens, and for them all of the kernel.
    own = mesh.spec(("batch", "tokens of the loss"), targets.shape, found.shape)
    whole = PartitionSpec()
    # The gradient's own rule says nothing of what varies, and jax 0.11 refuses that.
    run = jax.shard_map(run, in_specs=(own, whole, whole, own), out_specs=own, check_vma=False)
    return run(features, kernel, bias, targets)


def _cross_entropy(
    features: Float[Array, "batch time width"],
    kernel: Float[Array, "width vocab"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, "batch time"],
    *,
    logit_softcap: float | None,
    chunk: int | None,
    tile: int,
) -> Float[Array, "batch time"]:
    tokens, vocab = targets.size, kernel.shape[1]
    if chunk is None:
        limits = device_limits()
        whole = tokens * vocab <= limits.whole
        chunk = vocab if whole else max(NARROWEST, limits.chunk // tokens)
    if chunk >= vocab and tile == 1:
        logits = head_logits(features, kernel, bias, logit_softcap=logit_softcap)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    columns = vocab
    if tile > 1:
        # Equal chunks, so that little of the last one is filled up.
        count = -(-vocab // chunk)
        chunk = round_up(-(-vocab // count), tile)
        columns = round_up(vocab, chunk)
    rows, cut = features.reshape(-1, features.shape[-1]), _Cut(logit_softcap, chunk, columns)
    losses = _chunked(_Head(rows, kernel, bias), targets.reshape(-1), cut)
    return losses.reshape(targets.shape)


class _Head(NamedTuple):
    """The arrays that logits are computed from, or their gradients."""

    features: Float[Array, "tokens width"]
    kernel: Float[Array, "width vocab"]
    bias: Float[Array, " vocab"] | None


class _Cut(NamedTuple):
    """How logits are computed, and in which chunks: the static part."""

    logit_softcap: float | None
    chunk: int
    """Columns at a time."""
    columns: int
    """Columns of the kernel once it is filled up with zeros."""

    def logits(self, head: _Head, start: Index, size: int) -> jax.Array:
        """Compute the logits of `size` columns, from `start` on."""
        bias = None if head.bias is None else _columns(head.bias, start, size, axis=0)
        kernel = _columns(head.kernel, start, size, axis=1)
        return head_logits(head.features, kernel, bias, logit_softcap=self.logit_softcap)

    def filled_up(self, head: _Head) -> _Head:
        """Fill the vocabulary up; the kernel is converted before it is copied."""
        if self.columns == head.kernel.shape[1]:
            return head
        kernel = padded(head.kernel.astype(head.features.dtype), -1, self.columns)
        bias = None if head.bias is None else padded(head.bias, -1, self.columns)
        return _Head(head.features, kernel, bias)

    def within(self, x: jax.Array, start: Index, vocab: int, else_: float) -> jax.Array:
        """Return x of the columns from `start` on, with `else_` beyond the vocabulary."""
        if self.columns == vocab:
            return x
        return jnp.where(start + jnp.arange(x.shape[-1]) < vocab, x, else_)

    def over_chunks(self, add: Callable[[Carry, Index, int], Carry], carry: Carry) -> Carry:
        """Run add(carry, start, size) over the vocabulary; the last chunk has what is left."""
        full, rest = divmod(self.columns, self.chunk)
        carry = jax.lax.fori_loop(
            0, full, lambda i, carry: add(carry, i * self.chunk, self.chunk), carry
        )
        return add(carry, full * self.chunk, rest) if rest else carry


class _Kept(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    head: _Head
    targets: jax.Array
    logsumexp: jax.Array
    whole: jax.Array | None
    """All logits, if they are computed in one piece."""


_Sums = tuple[online.Sums, jax.Array]
"""The softmax of each token, and its target's logit."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _chunked(head: _Head, targets: Int[Array, " tokens"], cut: _Cut) -> Float[Array, " tokens"]:
    return _forward(head, targets, cut)[0]


def _forward(
    given: _Head, targets: Int[Array, " tokens"], cut: _Cut
) -> tuple[Float[Array, " tokens"], _Kept]:
    vocab, head = given.kernel.shape[1], cut.filled_up(given)

    def add(carry: _Sums, start: Index, size: int, logits: jax.Array | None = None) -> _Sums:
        sums, chosen = carry
        if logits is None:
            logits = cut.logits(head, start, size)
        real = cut.within(logits, start, vocab, -jnp.inf)
        sums = online.add(sums, real, may_be_empty=False).sums
        place = targets - start
        own = jnp.take_along_axis(logits, jnp.clip(place, 0, size - 1)[:, None], axis=-1)[:, 0]
        return sums, jnp.where((place >= 0) & (place < size), own, chosen)

    zeros = jnp.zeros_like(head.features[:, 0], jnp.float32)
    empty, whole = (online.Sums(zeros - jnp.inf, zeros), zeros), None
    if cut.chunk >= cut.columns:
        whole = cut.logits(head, 0, cut.columns)
        sums, chosen = add(empty, 0, cut.columns, whole)
    else:
        sums, chosen = cut.over_chunks(add, empty)
    # Not `online.finish`: no row is empty, and NaN in logits must give NaN.
    logsumexp = sums.largest + jnp.log(sums.total)
    return logsumexp - chosen, _Kept(given, targets, logsumexp, whole)


def _backward(cut: _Cut, kept: _Kept, g: jax.Array) -> tuple[_Head, None]:
    features, kernel, bias = kept.head
    dtype, vocab, logit_softcap = features.dtype, kernel.shape[1], cut.logit_softcap
    head = cut.filled_up(kept.head)

    def of(start: Index, size: int, logits: jax.Array) -> _Head:
        """Return the gradients that the logits of some columns give."""
        chosen = (kept.targets - start)[:, None] == jnp.arange(size)
        odds = jnp.exp(logits - kept.logsumexp[:, None])
        odds = cut.within(odds, start, vocab, 0.0)
        d_logits = (odds - chosen) * g[:, None]
        if logit_softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / logit_softcap))
        factor = d_logits.astype(dtype)
        d_bias = None if bias is None else jnp.sum(d_logits, axis=0).astype(bias.dtype)
        d_kernel = dot(features, factor, (0, 0)).astype(kernel.dtype)
        part = _columns(head.kernel, start, size, axis=1).astype(dtype)
        return _Head(dot(factor, part, (1, 1)), d_kernel, d_bias)

    def add(carry: _Head, start: Index, size: int) -> _Head:
        d_features, d_kernel, d_bias = of(start, size, cut.logits(head, start, size))
        whole = jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=-1),
            (carry.kernel, carry.bias),
            (d_kernel, d_bias),
        )
        return _Head(carry.features + d_features, *whole)

    if kept.whole is not None:
        found = of(0, cut.columns, kept.whole)
    else:
        empty = jax.tree.map(
            lambda x: jnp.zeros((*x.shape[:-1], cut.columns), x.dtype), (kernel, bias)
        )
        found = cut.over_chunks(add, _Head(jnp.zeros_like(features, jnp.float32), *empty))
    rest = found.kernel, found.bias
    if cut.columns > vocab:
        rest = jax.tree.map(lambda x: x[..., :vocab], rest)
    return _Head(found.features.astype(dtype), *rest), None


_chunked.defvjp(_forward, _backward)


def _columns(x: jax.Array, start: Index, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
