"""Attention as Pallas kernels for any NVIDIA GPU, through Triton; on a CPU they are interpreted.

The blocks of queries that a mask leaves work for are known before the launch, so every program
walks a list of them (see `masks.BlockLists`): first those that need no mask, then the others.
The mask and the score function are traced into the kernels; the score's derivative is JAX's own,
taken inside the backward kernels. The algorithm is FlashAttention-2's (arXiv 2307.08691).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxdecoder.kernels import masks, online, scores, tuning
from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.dropout import keep
from jaxdecoder.kernels.partitioning import over_devices
from jaxdecoder.kernels.portable_launch import Inputs, Sizes, Tiling, triton
from jaxdecoder.kernels.problem import (
    Gradients,
    Implementation,
    Known,
    LogSumExp,
    Operands,
    Problem,
    reads_arrays,
)
from jaxdecoder.kernels.typing import AnyArray, Carry, Ref
from jaxdecoder.typing import Index

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
LARGEST_WIDTH = 256


# For widths up to the key, the sizes of the three `KERNELS`: the largest blocks that fit into the
# registers and the shared memory of a Hopper card, by the compilers' report.
HALF = {
    64: (Sizes(128, 64, 8, 3), Sizes(64, 64, 4, 2), Sizes(64, 64, 4, 2)),
    128: (Sizes(128, 64, 8, 2), Sizes(64, 64, 8, 2), Sizes(64, 64, 8, 2)),
    256: (Sizes(64, 32, 8, 2), Sizes(32, 32, 4, 1), Sizes(32, 32, 4, 1)),
}
SINGLE = {
    64: (Sizes(64, 32, 8, 1), Sizes(32, 32, 4, 1), Sizes(32, 32, 4, 1)),
    128: (Sizes(32, 16, 8, 1), Sizes(32, 16, 8, 1), Sizes(32, 16, 8, 1)),
    256: (Sizes(16, 16, 4, 1), Sizes(16, 16, 4, 1), Sizes(16, 16, 4, 1)),
}
KERNELS = ("forward", "queries", "keys")


def sizes(problem: Problem, operands: Operands) -> dict[str, Sizes]:
    """Return the sizes of each kernel: those measured on this card, or else the defaults."""
    tuned = tuning.table().get(tuning.key("portable", problem, operands))
    if tuned is not None:
        return {kernel: Sizes(*tuned[kernel]) for kernel in KERNELS}
    by_width = SINGLE if operands.q.dtype == jnp.float32 else HALF
    chosen = next(row for width, row in by_width.items() if operands.q.shape[-1] <= width)
    return dict(zip(KERNELS, chosen, strict=True))


def forward(
    problem: Problem, operands: Operands, chosen: Sizes | None = None
) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`; `chosen`, here and below, is for measurements."""
    tiling = Tiling(problem, operands, chosen or sizes(problem, operands)["forward"])
    out, logsumexp = tiling.call(
        functools.partial(_forward_kernel, tiling),
        tiling.lists(operands),
        tiling.inputs(operands),
        [tiling.rows(operands.q, tiling.block_q), tiling.by_row(operands.q)],
        tiling.heads,
    )
    return tiling.cut(out, tiling.q_time), logsumexp[:, :, : tiling.q_time]


def backward(
    problem: Problem, operands: Operands, out: jax.Array, logsumexp: jax.Array, dout: jax.Array
) -> Gradients:
    """See `problem.Implementation`."""
    known = Known.of(out, logsumexp, dout)
    dq, dscore = gradient_of_queries(problem, operands, known)
    dk, dv = gradient_of_keys(problem, operands, known)
    return Gradients(q=dq, k=dk, v=dv, score=dscore)


def gradient_of_queries(
    problem: Problem, operands: Operands, known: Known, chosen: Sizes | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the gradients of the queries and of the score's learned operands."""
    tiling = Tiling(problem, operands, chosen or sizes(problem, operands)["queries"])
    learned = scores.chosen(operands.score, problem.learned)
    dq, *dscore = tiling.call(
        functools.partial(_queries_kernel, tiling),
        tiling.lists(operands),
        tiling.inputs(operands, known),
        [tiling.rows(operands.q, tiling.block_q), *map(tiling.by_row_of, learned)],
        tiling.heads,
    )
    pairs = zip(dscore, learned, strict=True)
    score = [jnp.sum(x, axis=(0, 2)).reshape(operand.shape) for x, operand in pairs]
    return tiling.cut(dq, tiling.q_time), score


def gradient_of_keys(
    problem: Problem, operands: Operands, known: Known, chosen: Sizes | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of keys and values."""
    tiling = Tiling(problem, operands, chosen or sizes(problem, operands)["keys"])
    dk, dv = tiling.call(
        functools.partial(_keys_kernel, tiling),
        tiling.lists(operands, by_keys=True),
        tiling.inputs(operands, known),
        [tiling.rows(x, tiling.block_k) for x in (operands.k, operands.v)],
        tiling.kv_heads,
    )
    return tiling.cut(dk, tiling.k_time), tiling.cut(dv, tiling.k_time)


# --- The kernels -------------------------------------------------------------------------------


def _forward_kernel(
    tiling: Tiling, lists: masks.BlockLists, refs: Inputs, out: Ref, logsumexp: Ref
) -> None:
    i, head, batch = (pl.program_id(axis) for axis in range(3))
    place = _Place(tiling, refs, batch, head)
    q = place.queries(refs.operands.q, i)

    def step(check: bool, n: Index, carry: online.Running) -> online.Running:
        sums, mixed = carry
        j = lists.indices[i, n]
        products = place.products(q, place.keys(refs.operands.k, j))
        s = place.new_score(i, j, products * tiling.problem.scale)
        if check:
            s = jnp.where(place.allowed(i, j), s, -jnp.inf)
        may_be_empty = check or tiling.problem.score is not None
        sums, weights, shrink = online.add(sums, s, may_be_empty=may_be_empty)
        v = place.keys(refs.operands.v, j)
        weights = place.dropped(i, j, weights).astype(v.dtype)
        return sums, mixed * online.spread(shrink, mixed.shape) + tiling.dot(weights, v)

    rows = jnp.zeros((tiling.block_q,), jnp.float32)
    mixed = jnp.zeros((tiling.block_q, tiling.padded_width), jnp.float32)
    sums, mixed = _walk(lists, i, step, (online.Sums(rows - jnp.inf, rows), mixed))
    divisor, logsumexp[...] = online.finish(sums)
    out[...] = (mixed / divisor[:, None]).astype(out.dtype)


def _queries_kernel(
    tiling: Tiling, lists: masks.BlockLists, refs: Inputs, dq: Ref, *dscore: Ref
) -> None:
    i, head, batch = (pl.program_id(axis) for axis in range(3))
    place = _Place(tiling, refs, batch, head)
    queries = place.of_queries(i)

    def step(
        check: bool, n: Index, carry: tuple[jax.Array, list[jax.Array]]
    ) -> tuple[jax.Array, list[jax.Array]]:
        total, totals = carry
        j = lists.indices[i, n]
        keys = place.of_keys(j)
        _, ds, parts = place.gradient(check, i, j, queries, keys)
        totals = [a + b.astype(jnp.float32) for a, b in zip(totals, parts, strict=True)]
        ds = ds.astype(keys.k.dtype)
        return total + tiling.dot(ds, keys.k), totals

    none = [jnp.float32(0)] * sum(ref.shape[0] for ref in dscore)
    zeros = jnp.zeros((tiling.block_q, tiling.padded_width), jnp.float32)
    total, totals = _walk(lists, i, step, (zeros, none))
    dq[...] = (total * tiling.problem.scale).astype(dq.dtype)
    numbers = iter(totals)
    for ref in dscore:
        for column in range(ref.shape[0]):
            ref[column] = next(numbers)


def _keys_kernel(tiling: Tiling, lists: masks.BlockLists, refs: Inputs, dk: Ref, dv: Ref) -> None:
    j, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    shared = _Place(tiling, refs, batch, kv_head * tiling.group, keys_first=True)
    keys = shared.of_keys(j)

    def of_head(g: Index, carry: _Keys) -> _Keys:
        place = _Place(tiling, refs, batch, kv_head * tiling.group + g, keys_first=True)

        def step(check: bool, n: Index, carry: _Keys) -> _Keys:
            i = lists.indices[j, n]
            queries = place.of_queries(i)
            weights, ds, _ = place.gradient(check, i, j, queries, keys, learned=False)
            dropped = place.dropped(i, j, weights).astype(queries.dout.dtype)
            dv = carry.v + tiling.dot(dropped, queries.dout)
            ds = ds.astype(queries.q.dtype)
            return _Keys(carry.k + tiling.dot(ds, queries.q), dv)

        return _walk(lists, j, step, carry)

    zeros = jnp.zeros((tiling.block_k, tiling.padded_width), jnp.float32)
    total = jax.lax.fori_loop(0, tiling.group, of_head, _Keys(zeros, zeros))
    dk[...] = (total.k * tiling.problem.scale).astype(dk.dtype)
    dv[...] = total.v.astype(dv.dtype)


def _walk(
    lists: masks.BlockLists, row: Index, step: Callable[[bool, Index, Carry], Carry], carry: Carry
) -> Carry:
    """Run step(check, n, carry) for every column of a row; `check` is False for FULL blocks."""
    full, end = lists.full_counts[row], lists.counts[row]
    carry = jax.lax.fori_loop(0, full, functools.partial(step, False), carry)
    return jax.lax.fori_loop(full, end, functools.partial(step, True), carry)


class _Queries(NamedTuple):
    """A block of queries of one head, and what is known of them."""

    q: jax.Array
    dout: jax.Array
    logsumexp: jax.Array
    delta: jax.Array


class _Keys(NamedTuple):
    """A block of keys and values of one head, or of their gradients."""

    k: jax.Array
    v: jax.Array


class _Place:
    """One head's blocks inside a kernel: what they hold, and what becomes of their scores.

    Scores are (queries, keys), or (keys, queries) where the products with them sum over queries:
    transposing them instead costs registers, in float32 more than there are.
    """

    def __init__(
        self,
        tiling: Tiling,
        refs: Inputs,
        batch: jax.Array,
        head: jax.Array,
        keys_first: bool = False,
    ):
        self.tiling, self.operands, self.known = tiling, refs.operands, refs.known
        self.batch, self.head = batch, head
        self.member = jax.lax.rem(head, tiling.group)
        self.keys_first = keys_first

    def numbers_of_head(self) -> tuple[jax.Array, jax.Array]:
        """Return which batch entry and head this is, among those of all devices."""
        batch_index, head_index = self.operands.batch_index, self.operands.head_index
        if batch_index is None or head_index is None:
            return self.batch, self.head
        return batch_index[self.batch], head_index[self.head]

    def products(self, of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
        """Return the products of all pairs of rows, as scores lie."""
        a, b = (of_keys, of_queries) if self.keys_first else (of_queries, of_keys)
        return self.tiling.dot(a, b, (1, 1))

    def along_queries(self, numbers: jax.Array) -> jax.Array:
        return numbers[None, :] if self.keys_first else numbers[:, None]

    def along_keys(self, numbers: jax.Array) -> jax.Array:
        return numbers[:, None] if self.keys_first else numbers[None, :]

    def queries(self, ref: Ref, i: Index) -> jax.Array:
        """Load the rows (block_q, width) of a block of queries."""
        return ref[pl.ds(i * self.tiling.block_q, self.tiling.block_q), self.member, :]

    def keys(self, ref: Ref, j: Index) -> jax.Array:
        """Load the rows (block_k, width) of a block of keys."""
        return ref[pl.ds(j * self.tiling.block_k, self.tiling.block_k), :]

    def numbers(self, ref: Ref, i: Index) -> jax.Array:
        """Load a number for every query of a block."""
        return ref[self.member, pl.ds(i * self.tiling.block_q, self.tiling.block_q)]

    def of_queries(self, i: Index) -> _Queries:
        known = self.known
        assert known is not None
        return _Queries(
            q=self.queries(self.operands.q, i),
            dout=self.queries(known.dout, i),
            logsumexp=self.numbers(known.logsumexp, i),
            delta=self.numbers(known.delta, i),
        )

    def of_keys(self, j: Index) -> _Keys:
        return _Keys(k=self.keys(self.operands.k, j), v=self.keys(self.operands.v, j))

    def index(self, i: Index, j: Index) -> tuple[jax.Array, jax.Array]:
        """Return the positions of the queries and of the keys of a block's scores."""
        block_q, block_k = self.tiling.block_q, self.tiling.block_k
        shape = (block_k, block_q) if self.keys_first else (block_q, block_k)
        first, second = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        q, k = (second, first) if self.keys_first else (first, second)
        return i * block_q + q, j * block_k + k

    def numbers_of_scores(self, i: Index, j: Index) -> tuple[jax.Array, ...]:
        """Return batch entry, head and positions of a block's scores."""
        q, k = self.index(i, j)
        return *self.numbers_of_head(), self.tiling.problem.position(q), k

    def new_score(self, i: Index, j: Index, s: jax.Array) -> jax.Array:
        function = self.tiling.problem.score
        if function is None:
            return s
        return function(
            s,
            *self.numbers_of_scores(i, j),
            *scores.Score.parameters(self.operands.score, self.head),
        )

    def allowed(self, i: Index, j: Index) -> AnyArray:
        tiling, operands = self.tiling, self.operands
        k_time = tiling.k_time if tiling.ragged else None
        q, k = self.index(i, j)
        if operands.q_segments is None or operands.k_segments is None:
            return tiling.problem.allowed(q, k, k_time=k_time)
        q_segment = operands.q_segments[pl.ds(i * tiling.block_q, tiling.block_q)]
        k_segment = operands.k_segments[pl.ds(j * tiling.block_k, tiling.block_k)]
        segments = self.along_queries(q_segment), self.along_keys(k_segment)
        return tiling.problem.allowed(q, k, *segments, k_time)

    def dropped(self, i: Index, j: Index, weights: jax.Array) -> jax.Array:
        """Drop weights, or their gradients: always the same ones."""
        dropout = self.operands.dropout
        if dropout is None:
            return weights
        kept = keep(dropout[0], dropout[1], *self.numbers_of_scores(i, j))
        return jnp.where(kept, weights, 0.0)

    def gradient(
        self, check: bool, i: Index, j: Index, queries: _Queries, keys: _Keys, learned: bool = True
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """Return the weights, the gradient of the scores, and those of the learned numbers."""
        problem, pull = self.tiling.problem, None
        s = self.products(queries.q, keys.k) * problem.scale
        if problem.score is not None:
            function, index = problem.score, self.numbers_of_scores(i, j)
            parameters = scores.Score.parameters(self.operands.score, self.head)
            wanted = [flag and learned for flag in problem.learned]

            def new_score(s: jax.Array, *parameters: scores.Parameter) -> jax.Array:
                return function(s, *index, *parameters)

            s, pull = scores.gradient(new_score, s, parameters, wanted)
        if check:
            s = jnp.where(self.allowed(i, j), s, -jnp.inf)
        weights = jnp.exp(s - self.along_queries(queries.logsumexp))
        dweights = self.dropped(i, j, self.products(queries.dout, keys.v))
        ds = weights * (dweights - self.along_queries(queries.delta))
        return (weights, ds, []) if pull is None else (weights, *pull(ds))


def _refuses(problem: Problem, operands: Operands, device: Device) -> str | None:
    width, dtype = operands.q.shape[-1], operands.q.dtype
    if device.platform == "gpu" and triton is None:
        return f"jax {jax.__version__} no longer compiles Pallas kernels with Triton"
    if device.platform not in ("cpu", "gpu"):
        return f"its kernels are for NVIDIA GPUs, and on a CPU for tests, not for a {device.kind}"
    if dtype not in DTYPES:
        return f"it computes in {', '.join(jnp.dtype(d).name for d in DTYPES)}, not in {dtype}"
    if width > LARGEST_WIDTH:
        return f"its heads may be {LARGEST_WIDTH} wide, not {width}"
    return reads_arrays(problem, operands)


IMPLEMENTATION = Implementation(*over_devices(forward, backward), _refuses)
