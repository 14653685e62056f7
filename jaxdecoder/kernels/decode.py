"""Attention of a few queries to a long cache: decoding, where reading the cache is all the work.

There are too few queries to keep a GPU busy, so the keys are split over its processors: each part
gives its own softmax and the logarithm of its sum, and those join exactly (Flash-Decoding, arXiv
2311.01282). The queries of all heads that share a key head read it once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from jaxdecoder.errors import UserError
from jaxdecoder.kernels import portable, portable_launch, reference
from jaxdecoder.kernels.problem import Device, current_device
from jaxdecoder.kernels.scores import Score
from jaxdecoder.typing import Index

BLOCK, WARPS, STAGES = 64, 4, 3
# Parts of the cache, so that there are some programs for each of a large card's processors.
PROGRAMS = 512
MOST_ROWS = 64
IMPLEMENTATIONS = ("reference", "kernel")


def decode_attention(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"],
    v: Float[Array, "batch k_time kv_heads width"],
    allowed: Bool[Array, "#batch #heads q_time k_time"],
    *,
    scale: float,
    score: Score | None = None,
    q_index: Int[Array, "#batch q_time"] | None = None,
    k_index: Int[Array, "#batch k_time"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_time heads width"]:
    """softmax(score(scale q k^T)) v over the allowed keys; a query with none gives zeros.

    As `reference.attention`, which it is everywhere but on NVIDIA GPUs. There a kernel reads keys
    and values as they lie in a cache (batch, kv_heads, k_time, width), where `k` and `v` are its
    `swapaxes(1, 2)`. It has no gradient.

    Raises:
        UserError: for an unknown `implementation`, or "kernel" where it cannot do this.
    """
    device = current_device()
    why_not = _refuses(q, k, score, device)
    if implementation == "auto":
        implementation = "kernel" if device.platform == "gpu" and why_not is None else "reference"
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(("auto", *IMPLEMENTATIONS))
        raise UserError(f"decode_attention: there is no {implementation!r}; there are {names}")
    if implementation == "reference":
        return reference.attention(
            q, k, v, allowed, scale=scale, score=score, q_index=q_index, k_index=k_index
        )
    if why_not is not None:
        raise UserError(f"decode_attention: the kernel cannot do this, because {why_not}")
    batch, q_time, heads, width = q.shape
    k_time, kv_heads = k.shape[1:3]
    if q_index is None:
        q_index = jnp.arange(q_time, dtype=jnp.int32)[None]
    if k_index is None:
        k_index = jnp.arange(k_time, dtype=jnp.int32)[None]
    plan = _plan(batch, q_time, heads, kv_heads, width, k_time, scale)
    grouped = q.reshape(batch, q_time, kv_heads, plan.group, width).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, width)
    filling = plan.rows - rows.shape[2]
    out, logsumexp = _parts(
        plan,
        score,
        _Inputs(
            jnp.pad(rows, ((0, 0), (0, 0), (0, filling), (0, 0))),
            _at_least_a_block(k.swapaxes(1, 2), 2),
            _at_least_a_block(v.swapaxes(1, 2), 2),
            _at_least_a_block(allowed.astype(jnp.int8), 3),
            q_index,
            _at_least_a_block(k_index, 1),
            () if score is None else tuple(map(jnp.asarray, score.operands)),
        ),
    )
    mixed = join(out, logsumexp)[:, :, : rows.shape[2]]
    mixed = mixed.reshape(grouped.shape).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(q.shape).astype(q.dtype)


def join(
    out: Float[Array, "parts *rows width"], logsumexp: Float[Array, "parts *rows"]
) -> Float[Array, "*rows width"]:
    """The softmax over all keys, from those over parts of them."""
    largest = jnp.max(logsumexp, axis=0)
    weights = jnp.exp(logsumexp - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = jnp.sum(weights, axis=0)
    mixed = jnp.sum(weights[..., None] * out, axis=0)
    return mixed / jnp.where(total > 0, total, 1.0)[..., None]


class _Plan(NamedTuple):
    """The static part of a launch."""

    q_time: int
    group: int
    rows: int
    """Queries of a key head, those of all its query heads, padded to a tile."""
    width: int
    k_time: int
    n_blocks: int
    blocks_per_part: int
    scale: float


class _Inputs(NamedTuple):
    """The arrays of a launch, and inside the kernel their parts for a batch entry and key head."""

    q: Any
    k: Any
    v: Any
    allowed: Any
    q_index: Any
    k_index: Any
    score: tuple[Any, ...]


def _plan(
    batch: int, q_time: int, heads: int, kv_heads: int, width: int, k_time: int, scale: float
) -> _Plan:
    group = heads // kv_heads
    rows = max(16, 1 << (q_time * group - 1).bit_length())
    n_blocks = math.ceil(k_time / BLOCK)
    parts = min(n_blocks, math.ceil(PROGRAMS / (batch * kv_heads)))
    return _Plan(
        q_time, group, rows, width, max(k_time, BLOCK), n_blocks, math.ceil(n_blocks / parts), scale
    )


def _at_least_a_block(x: jax.Array, axis: int) -> jax.Array:
    """Pads the keys of a cache shorter than a block; longer ones are read as they are."""
    missing = max(0, BLOCK - x.shape[axis])
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def _parts(plan: _Plan, score: Score | None, inputs: _Inputs) -> Sequence[jax.Array]:
    batch, kv_heads = inputs.q.shape[:2]
    n_parts = math.ceil(plan.n_blocks / plan.blocks_per_part)

    def of_head(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, plan.width), lambda n, h, b: (b, h, 0, 0))

    def of_entry(x: jax.Array) -> pl.BlockSpec:
        rest = (0,) * (x.ndim - 1)
        return pl.BlockSpec(
            (None, *x.shape[1:]), lambda n, h, b: (b if x.shape[0] > 1 else 0, *rest)
        )

    def whole(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda n, h, b: (0,) * x.ndim)

    shape = (n_parts, batch, kv_heads, plan.rows)
    launch = functools.partial(
        pl.pallas_call,
        functools.partial(_decode_kernel, plan, score),
        grid=(n_parts, kv_heads, batch),
        in_specs=(
            _Inputs(
                of_head(plan.rows),
                of_head(plan.k_time),
                of_head(plan.k_time),
                of_entry(inputs.allowed),
                of_entry(inputs.q_index),
                of_entry(inputs.k_index),
                tuple(map(whole, inputs.score)),
            ),
        ),
        out_specs=[
            pl.BlockSpec(
                (None, None, None, plan.rows, plan.width), lambda n, h, b: (n, b, h, 0, 0)
            ),
            pl.BlockSpec((None, None, None, plan.rows), lambda n, h, b: (n, b, h, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, plan.width), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        name="decode_kernel",
    )
    chosen = portable_launch.Sizes(plan.rows, BLOCK, WARPS, STAGES)
    return jax.lax.platform_dependent(
        inputs,
        cpu=launch(interpret=True),
        default=launch(compiler_params=portable_launch.compiler_params(chosen)),
    )


_Carry = tuple[jax.Array, jax.Array, jax.Array]


def _decode_kernel(
    plan: _Plan, score: Score | None, refs: _Inputs, out: Any, logsumexp: Any
) -> None:
    part, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    row = jax.lax.broadcasted_iota(jnp.int32, (plan.rows,), 0)
    member = jnp.minimum(row // plan.q_time, plan.group - 1)
    query, head = row % plan.q_time, kv_head * plan.group + member
    q, q_at = refs.q[...], refs.q_index[query]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def dot(a: jax.Array, b: jax.Array, b_axis: int) -> jax.Array:
        axes = (((1,), (b_axis,)), ((), ()))
        return jax.lax.dot_general(
            a, b, axes, precision=precision, preferred_element_type=jnp.float32
        )

    def step(n: Index, carry: _Carry) -> _Carry:
        largest, total, mixed = carry
        # The last block begins early enough to end in time, and leaves out what it has in common
        # with the one before.
        start = jnp.minimum(n * BLOCK, plan.k_time - BLOCK)
        slot = start + jax.lax.broadcasted_iota(jnp.int32, (BLOCK,), 0)
        keys = pl.ds(start, BLOCK)
        s = dot(q, refs.k[keys, :], 1) * plan.scale
        if score is not None:
            index = (batch, head[:, None], q_at[:, None], refs.k_index[keys][None, :])
            s = score.function(s, *index, *score.parameters(refs.score, head[:, None]))
        allowed_head = head[:, None] if refs.allowed.shape[0] > 1 else 0
        allowed = refs.allowed[allowed_head, query[:, None], slot[None, :]]
        s = jnp.where((allowed != 0) & (slot >= n * BLOCK)[None, :], s, -jnp.inf)
        higher = jnp.maximum(largest, jnp.max(s, axis=1))
        base = jnp.where(higher == -jnp.inf, 0.0, higher)
        weights, shrink = jnp.exp(s - base[:, None]), jnp.exp(largest - base)
        total = total * shrink + jnp.sum(weights, axis=1)
        v = refs.v[keys, :]
        return higher, total, mixed * shrink[:, None] + dot(weights.astype(v.dtype), v, 0)

    zeros = jnp.zeros((plan.rows,), jnp.float32)
    mixed = jnp.zeros((plan.rows, plan.width), jnp.float32)
    first = part * plan.blocks_per_part
    end = jnp.minimum(first + plan.blocks_per_part, plan.n_blocks)
    largest, total, mixed = jax.lax.fori_loop(first, end, step, (zeros - jnp.inf, zeros, mixed))
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    out[...] = mixed / divisor[:, None]
    logsumexp[...] = jnp.where(some, largest + jnp.log(divisor), -jnp.inf)


def _refuses(q: jax.Array, k: jax.Array, score: Score | None, device: Device) -> str | None:
    width, rows = q.shape[-1], q.shape[1] * (q.shape[2] // k.shape[2])
    if device.platform == "gpu" and portable_launch.triton is None:
        return f"jax {jax.__version__} no longer compiles Pallas kernels with Triton"
    if device.platform not in ("cpu", "gpu"):
        return f"it is for NVIDIA GPUs, and on a CPU for tests, not for a {device.kind}"
    if q.dtype not in portable.DTYPES or k.dtype != q.dtype:
        return f"queries and keys must be of one floating type, not {q.dtype} and {k.dtype}"
    if width not in (16, 32, 64, 128, 256):
        return f"heads must be a power of two from 16 to 256 wide, not {width}"
    if rows > MOST_ROWS:
        return f"a key head may have at most {MOST_ROWS} queries, not {rows}"
    if score is not None and _captures(score, q.shape[2]):
        return "the score function closes over an array, which a kernel has no place for"
    return None


def _captures(score: Score, heads: int) -> bool:
    index = jax.ShapeDtypeStruct((), jnp.int32)
    s = jax.ShapeDtypeStruct((), jnp.float32)
    jaxpr = jax.make_jaxpr(score.apply)(score.operands, s, index, index, index, index)
    return any(jnp.ndim(const) > 0 for const in jaxpr.consts)
