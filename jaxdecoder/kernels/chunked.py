"""Attention in plain XLA, block by block: memory linear in the length, and empty blocks skipped.

The forward pass is an online softmax (`online.py`; FlashAttention, arXiv 2205.14135). The backward
pass recomputes each block's weights from the logarithm of the sum of exponentials, once for all
gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from jaxdecoder.kernels import online, scores
from jaxdecoder.kernels.masks import BlockLists
from jaxdecoder.kernels.mesh import devices_of_an_array
from jaxdecoder.kernels.padding import padded, round_up
from jaxdecoder.kernels.problem import (
    Gradients,
    Implementation,
    Known,
    LogSumExp,
    Operands,
    Problem,
    field,
)
from jaxdecoder.kernels.segments import lists_of
from jaxdecoder.kernels.typing import AnyArray, Carry
from jaxdecoder.typing import Index

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

    def of_part(part: tuple[jax.Array, Operands, *tuple[jax.Array, ...]]) -> Gradients:
        entries, operands, *results = part
        # Inside the loop: outside of it, XLA leaves out roundings to half precision.
        return _backward(problem, entries, operands, Known.of(*results))

    found = jax.lax.map(of_part, (parts.indices(), parts.operands(operands), *results))
    return Gradients(
        q=parts.join(found.q),
        k=parts.join(found.k),
        v=parts.join(found.v),
        score=[jnp.sum(x, axis=0) for x in found.score],
    )


_OverColumns = tuple[jax.Array, Sequence[AnyArray]]
"""The gradients of the queries and of the score, to which every column adds."""


def _block(time: int) -> int:
    return min(time, BLOCK if time < LONG else LONG_BLOCK)


class _Parts:
    """The batch cut into parts with few enough heads for a core's cache.

    A batch that is sharded over the devices (evenly, in order) stays so: every part has equally
    many entries of each device, and no part has to be gathered.
    """

    def __init__(self, operands: Operands):
        self.batch, q_time, heads, _ = operands.q.shape
        self.devices = math.gcd(self.batch, devices_of_an_array())
        entry = heads * _block(q_time) * _block(operands.k.shape[1])
        share = self.batch // self.devices
        fitting = [n for n in range(1, share + 1) if share % n == 0 and n * entry <= TILE]
        self.n_parts = share // max(fitting, default=1)

    def indices(self) -> jax.Array:
        """Return the numbers of the batch entries of each part."""
        return self.cut(jnp.arange(self.batch, dtype=jnp.int32))

    def operands(self, operands: Operands) -> Operands:
        """Return the operands of all parts, along a new first axis."""

        def of_parts(path: KeyPath, x: AnyArray) -> jax.Array:
            name = field(path)
            if name in ("score", "dropout", "head_index") or (
                name.endswith("_segments") and x.shape[0] == 1
            ):
                return jnp.broadcast_to(x, (self.n_parts, *x.shape))  # one for all
            return self.cut(x)

        found: Operands = jax.tree_util.tree_map_with_path(of_parts, operands)
        return found

    def cut(self, x: AnyArray) -> jax.Array:
        """Turn (batch, ...) into (parts, batch of a part, ...)."""
        x = jnp.reshape(x, (self.devices, self.n_parts, -1, *x.shape[1:])).swapaxes(0, 1)
        return x.reshape(self.n_parts, -1, *x.shape[3:])

    def join(self, x: jax.Array) -> jax.Array:
        """Undo `cut`."""
        x = x.reshape(self.n_parts, self.devices, -1, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(self.batch, *x.shape[3:])


def _forward(
    problem: Problem, entries: jax.Array, operands: Operands
) -> tuple[jax.Array, LogSumExp]:
    blocks = _Blocks(problem, operands, entries)
    lists = blocks.lists()
    q, k, v = blocks.rows(operands.q), blocks.columns(operands.k), blocks.columns(operands.v)

    def row(_: None, i: Index) -> tuple[None, tuple[jax.Array, jax.Array]]:
        def column(check: bool, j: Index, carry: online.Running) -> online.Running:
            sums, mixed = carry
            s = blocks.new_score(i, j, blocks.products(q[i], k[j]), *operands.score)
            s = jnp.where(blocks.allowed(i, j), s, -jnp.inf) if check else s
            may_be_empty = check or problem.score is not None
            sums, weights, shrink = online.add(sums, s, may_be_empty=may_be_empty)
            weights = blocks.dropped(i, j, weights).astype(operands.v.dtype)
            more = einsum("bhgqk,bhkw->bhgqw", weights, v[j])
            return sums, mixed * online.spread(shrink, mixed.shape) + more

        empty = blocks.like(q[i][..., 0], -jnp.inf)
        carry = online.Sums(empty, blocks.like(empty, 0.0)), blocks.like(q[i], 0.0)
        sums, mixed = _walk(lists, i, column, carry)
        divisor, logsumexp = online.finish(sums)
        return None, ((mixed / divisor[..., None]).astype(operands.q.dtype), logsumexp)

    _, (out, logsumexp) = jax.lax.scan(row, None, jnp.arange(len(lists.counts)))
    return blocks.from_rows(out), blocks.from_rows_of_numbers(logsumexp)


def _backward(problem: Problem, entries: jax.Array, operands: Operands, known: Known) -> Gradients:
    blocks = _Blocks(problem, operands, entries)
    lists = blocks.lists(by_keys=True)
    q, k, v = blocks.rows(operands.q), blocks.columns(operands.k), blocks.columns(operands.v)
    delta = blocks.rows_of_numbers(known.delta, 0.0)
    # Weights of padded queries are 0, like those of queries without keys.
    logsumexp = blocks.rows_of_numbers(known.logsumexp, jnp.inf)
    dout = blocks.rows(known.dout)

    def column(carry: _OverColumns, j: Index) -> tuple[_OverColumns, tuple[jax.Array, jax.Array]]:
        def row(check: bool, i: Index, carry: Gradients) -> Gradients:
            dq, dk, dv, dscore = carry.q, carry.k, carry.v, carry.score
            s, pull = blocks.products(q[i], k[j]), None
            if problem.score is not None:
                new_score = functools.partial(blocks.new_score, i, j)
                s, pull = scores.gradient(new_score, s, operands.score, problem.learned)
            s = s if not check else jnp.where(blocks.allowed(i, j), s, -jnp.inf)
            weights = jnp.exp(s - logsumexp[i][..., None])
            dweights = einsum("bhgqw,bhkw->bhgqk", dout[i], v[j])
            dropped = blocks.dropped(i, j, weights).astype(operands.q.dtype)
            dv = dv + einsum("bhgqk,bhgqw->bhkw", dropped, dout[i])
            ds = weights * (blocks.dropped(i, j, dweights) - delta[i][..., None])
            if pull is not None:
                ds, more = pull(ds)
                dscore = [total + part for total, part in zip(dscore, more, strict=True)]
            ds = (ds * problem.scale).astype(operands.q.dtype)
            dk = dk + einsum("bhgqk,bhgqw->bhkw", ds, q[i])
            dq = dq.at[i].add(einsum("bhgqk,bhkw->bhgqw", ds, k[j]))
            return Gradients(q=dq, k=dk, v=dv, score=dscore)

        dq, dscore = carry
        zeros = blocks.like(k[j], 0.0)
        found = _walk(lists, j, row, Gradients(q=dq, k=zeros, v=zeros, score=dscore))
        return (found.q, found.score), (found.k.astype(k.dtype), found.v.astype(v.dtype))

    learned = scores.chosen(operands.score, problem.learned)
    carry: _OverColumns = blocks.like(q, 0.0), [blocks.like(x, 0.0) for x in learned]
    (dq, dscore), (dk, dv) = jax.lax.scan(column, carry, jnp.arange(len(lists.counts)))
    dq = blocks.from_rows(dq).astype(operands.q.dtype)
    dk, dv = blocks.from_columns(dk), blocks.from_columns(dv)
    return Gradients(q=dq, k=dk, v=dv, score=dscore)


def _walk(
    lists: BlockLists, row: Index, body: Callable[[bool, Index, Carry], Carry], carry: Carry
) -> Carry:
    """Run body(check, column, carry) over the blocks of a row; `check` is False for FULL ones."""
    counts, full_counts, indices = (jnp.asarray(x) for x in lists)

    def loop(check: bool, start: Index, end: Index, carry: Carry) -> Carry:
        def step(n: Index, carry: Carry) -> Carry:
            return body(check, indices[row, n], carry)

        return jax.lax.fori_loop(start, end, step, carry)

    if not isinstance(lists.counts, np.ndarray):  # none is FULL
        return loop(True, 0, counts[row], carry)
    if lists.full_counts.any():
        carry = loop(False, 0, full_counts[row], carry)
    if (lists.counts > lists.full_counts).any():
        carry = loop(True, full_counts[row], counts[row], carry)
    return carry


class _Blocks:
    """One call cut into blocks. Rows are blocks of queries, columns are blocks of keys."""

    def __init__(self, problem: Problem, operands: Operands, entries: jax.Array):
        self.problem, self.operands, self.entries = problem, operands, entries
        self.batch, self.q_time, self.heads, self.width = operands.q.shape
        self.k_time, self.kv_heads = operands.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.block_q, self.block_k = _block(self.q_time), _block(self.k_time)
        self.ragged = self.k_time % self.block_k != 0
        self.q_segments = self.k_segments = None
        if operands.q_segments is not None and operands.k_segments is not None:
            self.q_segments = _split(operands.q_segments, 1, self.block_q)
            self.k_segments = _split(operands.k_segments, 1, self.block_k)

    def lists(self, by_keys: bool = False) -> BlockLists:
        blocks = self.block_q, self.block_k
        return lists_of(self.problem, self.operands, *blocks, by_keys=by_keys, together=True)

    def rows(self, x: jax.Array) -> jax.Array:
        """Turn (batch, q_time, heads, width) into (rows, batch, kv_heads, group, block, width)."""
        x = _split(x, 1, self.block_q)
        x = x.reshape(*x.shape[:3], self.kv_heads, self.group, self.width)
        return x.transpose(0, 1, 3, 4, 2, 5)

    def from_rows(self, x: jax.Array) -> jax.Array:
        """Undo `rows`."""
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.batch, -1, self.heads, self.width)[:, : self.q_time]

    def rows_of_numbers(self, x: jax.Array, filling: float) -> jax.Array:
        """Turn (batch, heads, q_time) into (rows, batch, kv_heads, group, block)."""
        x = _split(x, 2, self.block_q, filling)
        return x.reshape(-1, self.batch, self.kv_heads, self.group, self.block_q)

    def from_rows_of_numbers(self, x: jax.Array) -> jax.Array:
        """Undo `rows_of_numbers`."""
        x = x.reshape(-1, self.batch, self.heads, self.block_q).transpose(1, 2, 0, 3)
        return x.reshape(self.batch, self.heads, -1)[..., : self.q_time]

    def columns(self, x: jax.Array) -> jax.Array:
        """Turn (batch, k_time, kv_heads, width) into (columns, batch, kv_heads, block, width)."""
        return _split(x, 1, self.block_k).transpose(0, 1, 3, 2, 4)

    def from_columns(self, x: jax.Array) -> jax.Array:
        """Undo `columns`."""
        x = x.transpose(1, 0, 3, 2, 4)
        return x.reshape(self.batch, -1, self.kv_heads, self.width)[:, : self.k_time]

    def like(self, x: AnyArray, value: float) -> jax.Array:
        """Return float32 numbers of the shape of x that vary over the same mesh axes."""
        return jnp.full_like(x, value, jnp.float32)

    def index(self, i: Index, j: Index) -> tuple[AnyArray, ...]:
        """Return batch, head, query and key of the scores of a block, each along its axes."""
        batch, head = self.entries, self.places_of_heads()
        if self.operands.batch_index is not None and self.operands.head_index is not None:
            batch, head = self.operands.batch_index, self.operands.head_index[head]
        q = i * self.block_q + np.arange(self.block_q, dtype=np.int32)[:, None]
        k = j * self.block_k + np.arange(self.block_k, dtype=np.int32)
        return batch.reshape(-1, 1, 1, 1, 1), head, q, k

    def places_of_heads(self) -> jax.Array:
        heads = np.arange(self.heads, dtype=np.int32)
        return jnp.asarray(heads.reshape(self.kv_heads, self.group, 1, 1))

    def products(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return einsum("bhgqw,bhkw->bhgqk", q, k) * self.problem.scale

    def new_score(self, i: Index, j: Index, s: jax.Array, *score: scores.Operand) -> jax.Array:
        place = self.places_of_heads()
        return self.problem.new_score(score, place, s, *self.index(i, j))

    def allowed(self, i: Index, j: Index) -> AnyArray:
        _, _, q, k = self.index(i, j)
        k_time = self.k_time if self.ragged else None
        if self.q_segments is None or self.k_segments is None:
            return self.problem.allowed(q, k, k_time=k_time)
        q_segment = self.q_segments[i][:, None, None, :, None]
        k_segment = self.k_segments[j][:, None, None, None]
        return self.problem.allowed(q, k, q_segment, k_segment, k_time)

    def dropped(self, i: Index, j: Index, weights: jax.Array) -> jax.Array:
        """Drop weights, or their gradients: always the same ones."""
        if self.operands.dropout is None:
            return weights
        kept = self.problem.kept(*self.operands.dropout, *self.index(i, j))
        return jnp.where(kept, weights, 0.0)


def _split(x: jax.Array, axis: int, block: int, filling: float = 0) -> jax.Array:
    """Cut an axis into blocks along a new first axis; the last block is padded."""
    x = padded(x, axis, round_up(x.shape[axis], block), filling)
    shape = (*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


IMPLEMENTATION = Implementation(forward, backward)
