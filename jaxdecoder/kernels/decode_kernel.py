"""The kernel of `decode_attention`, for NVIDIA GPUs, through Triton; on a CPU it is interpreted.

There are too few queries to keep a GPU busy, so the keys are split over its processors. Each part
gives its own softmax and the logarithm of its sum, and these are joined exactly (Flash-Decoding,
arXiv 2311.01282). All query heads that share a key head read it together, once.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.tree_util import KeyPath
from jaxtyping import Array, Bool, Float, Int

from jaxdecoder.kernels import online, portable, scores
from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.padding import padded
from jaxdecoder.kernels.portable_launch import Result, Sizes, launched, of_entry, triton, whole
from jaxdecoder.kernels.problem import field, holds_arrays
from jaxdecoder.kernels.product import dot
from jaxdecoder.kernels.scores import Score
from jaxdecoder.kernels.typing import Ref
from jaxdecoder.typing import Index

BLOCK, WARPS, STAGES = 64, 4, 3
# The number of programs at least, so that each processor of a large card has some.
PROGRAMS = 512
MOST_ROWS = 64


def attention(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"],
    v: Float[Array, "batch k_time kv_heads width"],
    allowed: Bool[Array, "#batch #heads q_time k_time"],
    scale: float,
    score: Score | None,
    q_index: Int[Array, "#batch q_time"] | None,
    k_index: Int[Array, "#batch k_time"] | None,
) -> Float[Array, "batch q_time heads width"]:
    """See `decode_attention`."""
    batch, q_time, heads, width = q.shape
    k_time, kv_heads = k.shape[1:3]
    if q_index is None:
        q_index = jnp.arange(q_time, dtype=jnp.int32)[None]
    if k_index is None:
        k_index = jnp.arange(k_time, dtype=jnp.int32)[None]
    plan = _plan(batch, q_time, heads, kv_heads, width, k_time, scale)
    grouped = q.reshape(batch, q_time, kv_heads, plan.group, width).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, width)
    out, logsumexp = _parts(
        plan,
        score,
        _Inputs(
            q=padded(rows, 2, plan.rows),
            k=padded(k.swapaxes(1, 2), 2, plan.k_time),
            v=padded(v.swapaxes(1, 2), 2, plan.k_time),
            allowed=padded(allowed.astype(jnp.int8), 3, plan.k_time),
            q_index=q_index,
            k_index=padded(k_index, 1, plan.k_time),
            score=() if score is None else tuple(map(jnp.asarray, score.operands)),
        ),
    )
    mixed = join(out, logsumexp)[:, :, : rows.shape[2]]
    mixed = mixed.reshape(grouped.shape).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(q.shape).astype(q.dtype)


def join(
    out: Float[Array, "parts *rows width"], logsumexp: Float[Array, "parts *rows"]
) -> Float[Array, "*rows width"]:
    """Return the softmax over all keys, from those over parts of them."""
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
    """The queries of all heads that share a key head, padded to a tile."""
    width: int
    k_time: int
    """Keys, at least a block of them."""
    n_blocks: int
    blocks_per_part: int
    scale: float


class _Inputs(NamedTuple):
    """The arrays of a launch, and inside the kernel their parts for a batch entry and key head."""

    q: jax.Array
    """(batch, kv_heads, rows, width)"""
    k: jax.Array
    """(batch, kv_heads, k_time, width)"""
    v: jax.Array
    allowed: jax.Array
    """int8 (batch or 1, heads or 1, q_time, k_time)"""
    q_index: jax.Array
    k_index: jax.Array
    score: tuple[scores.Operand, ...]


def _plan(
    batch: int, q_time: int, heads: int, kv_heads: int, width: int, k_time: int, scale: float
) -> _Plan:
    group = heads // kv_heads
    rows = max(16, 1 << (q_time * group - 1).bit_length())
    n_blocks = math.ceil(k_time / BLOCK)
    parts = min(n_blocks, math.ceil(PROGRAMS / (batch * kv_heads)))
    per_part = math.ceil(n_blocks / parts)
    return _Plan(q_time, group, rows, width, max(k_time, BLOCK), n_blocks, per_part, scale)


def _parts(plan: _Plan, score: Score | None, inputs: _Inputs) -> list[jax.Array]:
    """Return the softmax over each part of the keys, and the logarithm of its sum."""
    batch, kv_heads = inputs.q.shape[:2]
    n_parts = math.ceil(plan.n_blocks / plan.blocks_per_part)

    def of_head(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda n, h, b: (b, h, 0, 0))

    def spec(path: KeyPath, x: jax.Array) -> pl.BlockSpec:
        name = field(path)
        return (of_head if name in "qkv" else whole if name == "score" else of_entry)(x)

    def of_rows(*columns: int) -> Result:
        shape, part = (plan.rows, *columns), (0,) * (1 + len(columns))
        spec = pl.BlockSpec((None, None, None, *shape), lambda n, h, b: (n, b, h, *part))
        return jax.ShapeDtypeStruct((n_parts, batch, kv_heads, *shape), jnp.float32), spec

    return launched(
        functools.partial(_decode_kernel, plan, score),
        Sizes(plan.rows, BLOCK, WARPS, STAGES),
        (n_parts, kv_heads, batch),
        (inputs,),
        (jax.tree_util.tree_map_with_path(spec, inputs),),
        [of_rows(plan.width), of_rows()],
    )


def _decode_kernel(
    plan: _Plan, score: Score | None, refs: _Inputs, out: Ref, logsumexp: Ref
) -> None:
    part, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    row = jax.lax.broadcasted_iota(jnp.int32, (plan.rows,), 0)
    member = jnp.minimum(row // plan.q_time, plan.group - 1)
    query, head = row % plan.q_time, kv_head * plan.group + member
    q, q_at = refs.q[...], refs.q_index[query]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def step(n: Index, carry: online.Running) -> online.Running:
        sums, mixed = carry
        # The last block ends where the keys end, and leaves out those of the block before.
        start = jnp.minimum(n * BLOCK, plan.k_time - BLOCK)
        slot = start + jax.lax.broadcasted_iota(jnp.int32, (BLOCK,), 0)
        keys = pl.ds(start, BLOCK)
        s = dot(q, refs.k[keys, :], (1, 1), precision) * plan.scale
        if score is not None:
            index = (batch, head[:, None], q_at[:, None], refs.k_index[keys][None, :])
            s = score.function(s, *index, *Score.parameters(refs.score, head[:, None]))
        allowed_head = head[:, None] if refs.allowed.shape[0] > 1 else 0
        allowed = refs.allowed[allowed_head, query[:, None], slot[None, :]]
        s = jnp.where((allowed != 0) & (slot >= n * BLOCK)[None, :], s, -jnp.inf)
        sums, weights, shrink = online.add(sums, s)
        v = refs.v[keys, :]
        more = dot(weights.astype(v.dtype), v, (1, 0), precision)
        return sums, mixed * online.spread(shrink, mixed.shape) + more

    zeros = jnp.zeros((plan.rows,), jnp.float32)
    mixed = jnp.zeros((plan.rows, plan.width), jnp.float32)
    first = part * plan.blocks_per_part
    end = jnp.minimum(first + plan.blocks_per_part, plan.n_blocks)
    start = online.Sums(zeros - jnp.inf, zeros), mixed
    sums, mixed = jax.lax.fori_loop(first, end, step, start)
    divisor, logsumexp[...] = online.finish(sums)
    out[...] = mixed / divisor[:, None]


def refuses(q: jax.Array, k: jax.Array, score: Score | None, device: Device) -> str | None:
    """Return why it cannot do this, as the end of a sentence, or None if it can."""
    width, rows = q.shape[-1], q.shape[1] * (q.shape[2] // k.shape[2])
    if device.platform == "gpu" and triton is None:
        return f"jax {jax.__version__} no longer compiles Pallas kernels with Triton"
    if device.platform not in ("cpu", "gpu"):
        return f"it is for NVIDIA GPUs, and on a CPU for tests, not for a {device.kind}"
    if q.dtype not in portable.DTYPES or k.dtype != q.dtype:
        return f"queries and keys must be of one floating type, not {q.dtype} and {k.dtype}"
    if width not in (16, 32, 64, 128, 256):
        return f"heads must be a power of two from 16 to 256 wide, not {width}"
    if rows > MOST_ROWS:
        return f"a key head may have at most {MOST_ROWS} queries, not {rows}"
    s, index = jax.ShapeDtypeStruct((), jnp.float32), [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    if score is not None and holds_arrays(score.apply, score.operands, s, *index):
        return "the score function closes over an array, which a kernel has no place for"
    return None
