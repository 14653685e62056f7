"""Attention in plain XLA, block by block: memory linear in the length, and empty blocks skipped.

The forward pass is an online softmax (arXiv 1805.02867, 2205.14135); the backward pass recomputes
each block's weights from the logarithm of the sum of exponentials, once, for all three gradients.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.dropout import keep
from jaxdecoder.kernels.masks import BlockLists, block_lists
from jaxdecoder.kernels.problem import (
    Gradients,
    Implementation,
    LogSumExp,
    Operands,
    Problem,
)
from jaxdecoder.kernels.segments import narrowed

# The scores of one step should fit a core's cache, and yet be worth a step. Long sequences have
# larger blocks, because the lists of blocks grow with the square of their number.
BLOCK, LONG_BLOCK, LONG = 128, 256, 8192
TILE = 2**18

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def forward(problem: Problem, operands: Operands) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`."""
    parts = _Parts(operands)
    out, logsumexp = jax.lax.map(
        lambda part: _forward(problem, *part), (parts.indices(), parts.operands(operands))
    )
    return parts.join(out), parts.join(logsumexp)


def backward(
    problem: Problem, operands: Operands, out: jax.Array, logsumexp: jax.Array, dout: jax.Array
) -> Gradients:
    """See `problem.Implementation`."""
    parts = _Parts(operands)
    results = map(parts.cut, (out, logsumexp, dout))
    gradients = jax.lax.map(
        lambda part: _backward(problem, *part),
        (parts.indices(), parts.operands(operands), *results),
    )
    q, k, v, score = gradients
    score = tuple(jnp.sum(x, axis=0) for x in score)
    return Gradients(parts.join(q), parts.join(k), parts.join(v), score)


def _block(time: int) -> int:
    return min(time, BLOCK if time < LONG else LONG_BLOCK)


class _Parts:
    """The batch cut into parts of few enough heads.

    A batch that is sharded over the devices (evenly, in order) stays so: every part has as many
    entries of each device, and no part has to be gathered.
    """

    def __init__(self, operands: Operands):
        self.batch, q_time, heads, _ = operands.q.shape
        self.devices = math.gcd(self.batch, jax.device_count())
        scores = heads * _block(q_time) * _block(operands.k.shape[1])
        share = self.batch // self.devices
        fitting = [n for n in range(1, share + 1) if share % n == 0 and n * scores <= TILE]
        self.n_parts = share // max(fitting, default=1)

    def indices(self) -> jax.Array:
        return self.cut(jnp.arange(self.batch, dtype=jnp.int32))

    def operands(self, operands: Operands) -> Operands:
        q, k, v, score, q_segments, k_segments, dropout = operands[:7]

        def segments(x: Any) -> jax.Array | None:
            return None if x is None else self.shared(x) if x.shape[0] == 1 else self.cut(x)

        return Operands(
            self.cut(q),
            self.cut(k),
            self.cut(v),
            tuple(map(self.shared, score)),
            segments(q_segments),
            segments(k_segments),
            None if dropout is None else self.shared(dropout),
        )

    # Constants may be arrays of other kinds than jax.Array, under remat for one.
    def cut(self, x: Any) -> jax.Array:
        """(batch, ...) as (parts, batch of a part, ...)."""
        x = jnp.reshape(x, (self.devices, self.n_parts, -1, *x.shape[1:])).swapaxes(0, 1)
        return x.reshape(self.n_parts, -1, *x.shape[3:])

    def shared(self, x: Any) -> jax.Array:
        return jnp.broadcast_to(x, (self.n_parts, *x.shape))

    def join(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.n_parts, self.devices, -1, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(self.batch, *x.shape[3:])


def _forward(problem: Problem, entries: Any, operands: Operands) -> tuple[jax.Array, LogSumExp]:
    blocks = _Blocks(problem, operands, entries)
    lists = blocks.lists()
    q, k, v = blocks.rows(operands.q), blocks.columns(operands.k), blocks.columns(operands.v)

    def row(_: None, i: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        def column(check: bool, j: Any, carry: Any) -> Any:
            largest, total, mixed = carry
            s, allowed = blocks.scores(check, i, j, q[i], k[j], operands.score)
            s = s if allowed is None else jnp.where(allowed, s, -jnp.inf)
            higher = jnp.maximum(largest, jnp.max(s, axis=-1))
            # A row without keys so far has no largest score to subtract.
            some_without = allowed is not None or problem.score is not None
            base = jnp.where(higher == -jnp.inf, 0.0, higher) if some_without else higher
            weights, shrink = jnp.exp(s - base[..., None]), jnp.exp(largest - base)
            total = total * shrink + jnp.sum(weights, axis=-1)
            weights = blocks.dropped(i, j, weights).astype(operands.v.dtype)
            more = jnp.einsum(
                "bhgqk,bhkw->bhgqw", weights, v[j], preferred_element_type=jnp.float32
            )
            return higher, total, mixed * shrink[..., None] + more

        empty = blocks.like(q[i][..., 0], -jnp.inf)
        carry = (empty, blocks.like(empty, 0.0), blocks.like(q[i], 0.0))
        largest, total, mixed = _walk(lists, i, column, carry)
        some = total > 0
        divisor = jnp.where(some, total, 1.0)
        logsumexp = jnp.where(some, largest + jnp.log(divisor), -jnp.inf)
        return None, ((mixed / divisor[..., None]).astype(operands.q.dtype), logsumexp)

    _, (out, logsumexp) = jax.lax.scan(row, None, jnp.arange(len(lists.counts)))
    return blocks.from_rows(out), blocks.from_rows_of_numbers(logsumexp)


def _backward(
    problem: Problem,
    entries: Any,
    operands: Operands,
    out: jax.Array,
    logsumexp: jax.Array,
    dout: jax.Array,
) -> Gradients:
    blocks = _Blocks(problem, operands, entries)
    lists = blocks.lists(by_keys=True)
    q, k, v = blocks.rows(operands.q), blocks.columns(operands.k), blocks.columns(operands.v)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    delta = blocks.rows_of_numbers(delta.swapaxes(1, 2), 0.0)
    # Without keys every weight is exp(-inf - inf) = 0, and so it is for padded queries.
    logsumexp = jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp)
    logsumexp = blocks.rows_of_numbers(logsumexp, jnp.inf)
    dout = blocks.rows(dout)

    def column(carry: Any, j: Any) -> Any:
        def row(check: bool, i: Any, carry: Any) -> Any:
            dq, dk, dv, dscore = carry

            def new_score(score: tuple[Any, ...], s: jax.Array) -> jax.Array:
                return blocks.new_score(i, j, s, score)

            s = blocks.products(q[i], k[j])
            s, pull = jax.vjp(new_score, operands.score, s)
            s = s if not check else jnp.where(blocks.allowed(i, j), s, -jnp.inf)
            weights = jnp.exp(s - logsumexp[i][..., None])
            dweights = einsum("bhgqw,bhkw->bhgqk", dout[i], v[j])
            dropped = blocks.dropped(i, j, weights).astype(operands.q.dtype)
            dv = dv + einsum("bhgqk,bhgqw->bhkw", dropped, dout[i])
            ds = weights * (blocks.dropped(i, j, dweights) - delta[i][..., None])
            more, pulled = pull(ds)
            # Where nothing is to be pulled, not even an infinite slope does.
            ds = ds if problem.score is None else jnp.where(ds == 0, 0.0, pulled)
            dscore = tuple(
                total + part if learned else total
                for total, part, learned in zip(dscore, more, problem.learned, strict=True)
            )
            ds = (ds * problem.scale).astype(operands.q.dtype)
            dk = dk + einsum("bhgqk,bhgqw->bhkw", ds, q[i])
            dq = dq.at[i].add(einsum("bhgqk,bhkw->bhgqw", ds, k[j]))
            return dq, dk, dv, dscore

        dq, dscore = carry
        zeros = blocks.like(k[j], 0.0)
        dq, dk, dv, dscore = _walk(lists, j, row, (dq, zeros, zeros, dscore))
        return (dq, dscore), (dk.astype(k.dtype), dv.astype(v.dtype))

    dscore = tuple(blocks.like(x, 0.0) for x in operands.score)
    carry = (blocks.like(q, 0.0), dscore)
    (dq, dscore), (dk, dv) = jax.lax.scan(column, carry, jnp.arange(len(lists.counts)))
    dq = blocks.from_rows(dq).astype(operands.q.dtype)
    return Gradients(dq, blocks.from_columns(dk), blocks.from_columns(dv), dscore)


def _walk(lists: BlockLists, row: Any, body: Any, carry: Any) -> Any:
    """Runs body(check, column, carry) over the blocks of a row; the FULL ones go unchecked."""
    counts, full_counts, indices = (jnp.asarray(x) for x in lists)

    def step(check: bool, n: Any, carry: Any) -> Any:
        return body(check, indices[row, n], carry)

    if not isinstance(lists.counts, np.ndarray):  # none is FULL
        return jax.lax.fori_loop(0, counts[row], functools.partial(step, True), carry)
    if lists.full_counts.any():
        carry = jax.lax.fori_loop(0, full_counts[row], functools.partial(step, False), carry)
    if (lists.counts > lists.full_counts).any():
        return jax.lax.fori_loop(
            full_counts[row], counts[row], functools.partial(step, True), carry
        )
    return carry


class _Blocks:
    """The tiling of one call. Rows are blocks of queries, (batch, kv_heads, group, block, ...)."""

    def __init__(self, problem: Problem, operands: Operands, entries: Any):
        self.problem, self.operands, self.entries = problem, operands, entries
        self.batch, self.q_time, self.heads, self.width = operands.q.shape
        self.k_time, self.kv_heads = operands.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.block_q, self.block_k = _block(self.q_time), _block(self.k_time)
        self.states = problem.states(self.q_time, self.k_time, self.block_q, self.block_k)
        self.ragged = self.k_time % self.block_k != 0
        self.segments: Any = None
        if operands.q_segments is not None:
            self.segments = (
                _split(operands.q_segments, 1, self.block_q),
                _split(operands.k_segments, 1, self.block_k),
            )

    def lists(self, by_keys: bool = False) -> BlockLists:
        lists = block_lists(self.states.T if by_keys else self.states)
        if not self.problem.segments_vary:
            return lists
        queries = self.operands.q_segments, self.block_q
        keys = self.operands.k_segments, self.block_k
        return narrowed(lists, *(keys + queries if by_keys else queries + keys), together=True)

    def rows(self, x: jax.Array) -> jax.Array:
        """(batch, q_time, heads, width) as (rows, batch, kv_heads, group, block, width)."""
        x = _split(x, 1, self.block_q)
        x = x.reshape(*x.shape[:3], self.kv_heads, self.group, self.width)
        return x.transpose(0, 1, 3, 4, 2, 5)

    def from_rows(self, x: jax.Array) -> jax.Array:
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.batch, -1, self.heads, self.width)[:, : self.q_time]

    def rows_of_numbers(self, x: jax.Array, filling: float) -> jax.Array:
        """(batch, heads, q_time) as (rows, batch, kv_heads, group, block)."""
        x = _split(x, 2, self.block_q, filling)
        return x.reshape(-1, self.batch, self.kv_heads, self.group, self.block_q)

    def from_rows_of_numbers(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, self.batch, self.heads, self.block_q).transpose(1, 2, 0, 3)
        return x.reshape(self.batch, self.heads, -1)[..., : self.q_time]

    def columns(self, x: jax.Array) -> jax.Array:
        """(batch, k_time, kv_heads, width) as (columns, batch, kv_heads, block, width)."""
        return _split(x, 1, self.block_k).transpose(0, 1, 3, 2, 4)

    def from_columns(self, x: jax.Array) -> jax.Array:
        x = x.transpose(1, 0, 3, 2, 4)
        return x.reshape(self.batch, -1, self.kv_heads, self.width)[:, : self.k_time]

    def like(self, x: jax.Array, value: float) -> jax.Array:
        """float32 of the shape of x, and varying over the same mesh axes."""
        return jnp.full_like(x, value, jnp.float32)

    def index(self, i: Any, j: Any) -> tuple[Any, Any, Any, Any]:
        """Batch, head, query and key of the scores of a block, along their axes."""
        head = np.arange(self.heads, dtype=np.int32).reshape(self.kv_heads, self.group, 1, 1)
        batch = self.entries.reshape(-1, 1, 1, 1, 1)
        q = i * self.block_q + np.arange(self.block_q, dtype=np.int32)[:, None]
        k = j * self.block_k + np.arange(self.block_k, dtype=np.int32)
        return batch, jnp.asarray(head), q, k

    def products(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return einsum("bhgqw,bhkw->bhgqk", q, k) * self.problem.scale

    def new_score(self, i: Any, j: Any, s: jax.Array, score: tuple[Any, ...]) -> jax.Array:
        return self.problem.new_score(score, s, *self.index(i, j))

    def allowed(self, i: Any, j: Any) -> jax.Array:
        _, _, q, k = self.index(i, j)
        k_time = self.k_time if self.ragged else None
        if self.segments is None:
            return self.problem.allowed(q, k, k_time=k_time)
        q_segment, k_segment = self.segments[0][i], self.segments[1][j]
        q_segment = q_segment[:, None, None, :, None]
        return self.problem.allowed(q, k, q_segment, k_segment[:, None, None, None], k_time)

    def scores(
        self, check: bool, i: Any, j: Any, q: jax.Array, k: jax.Array, score: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array | None]:
        s = self.new_score(i, j, self.products(q, k), score)
        return s, self.allowed(i, j) if check else None

    def dropped(self, i: Any, j: Any, weights: jax.Array) -> jax.Array:
        if not self.problem.dropout:
            return weights
        return jnp.where(keep(*self.operands.dropout, *self.index(i, j)), weights, 0.0)


def _split(x: jax.Array, axis: int, block: int, filling: float = 0) -> jax.Array:
    """Cuts an axis into blocks, the last one padded, along a new first axis."""
    ragged = -x.shape[axis] % block
    if ragged:
        widths = [(0, ragged if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=filling)
    shape = (*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _refuses(problem: Problem, operands: Operands, device: Device) -> str | None:
    return None


IMPLEMENTATION = Implementation(forward, backward, _refuses)
