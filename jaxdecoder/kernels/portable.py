"""Attention as Pallas kernels for any NVIDIA GPU, through Triton; on a CPU they are interpreted.

The blocks of queries that a mask leaves work for are known before the launch, so every program
walks a list of them (see `masks.BlockLists`): first those that need no mask, then the others.
The mask and the score function are traced into the kernels; the score's derivative is JAX's own,
taken inside the backward kernels. The algorithm is FlashAttention-2's (arXiv 2307.08691).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxdecoder.kernels import masks, scores, tuning
from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.dropout import keep
from jaxdecoder.kernels.partitioning import over_devices
from jaxdecoder.kernels.portable_launch import Inputs, Sizes, Tiling, triton
from jaxdecoder.kernels.problem import (
    Gradients,
    Implementation,
    LogSumExp,
    Operands,
    Problem,
    captures_arrays,
)

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
LARGEST_WIDTH = 256


# By width, for widths up to it: the largest blocks that leave room in the registers and the shared
# memory of a Hopper card, by the compilers' own report.
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
    """Of each kernel: those measured on this card, or else the defaults."""
    tuned = tuning.table().get(tuning.key("portable", problem, operands))
    if tuned is not None:
        return {kernel: Sizes(*tuned[kernel]) for kernel in KERNELS}
    by_width = SINGLE if operands.q.dtype == jnp.float32 else HALF
    chosen = next(row for width, row in by_width.items() if operands.q.shape[-1] <= width)
    return dict(zip(KERNELS, chosen, strict=True))


def forward(
    problem: Problem, operands: Operands, chosen: Sizes | None = None
) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`; `chosen` is for measurements, as it is below."""
    tiling = Tiling(problem, operands, chosen or sizes(problem, operands)["forward"])
    out, logsumexp = tiling.call(
        functools.partial(_forward_kernel, tiling),
        tiling.lists(operands),
        tiling.inputs(operands),
        [tiling.by_query(operands.q), tiling.by_row(operands.q)],
        tiling.heads,
    )
    return tiling.cut(out, tiling.q_time), logsumexp[:, :, : tiling.q_time]


def backward(
    problem: Problem, operands: Operands, out: jax.Array, logsumexp: jax.Array, dout: jax.Array
) -> Gradients:
    """See `problem.Implementation`."""
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    # Without keys every weight is exp(-inf - inf) = 0.
    logsumexp = jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp)
    dq, dscore = gradient_of_queries(problem, operands, dout, logsumexp, delta)
    dk, dv = gradient_of_keys(problem, operands, dout, logsumexp, delta)
    return Gradients(dq, dk, dv, dscore)


def gradient_of_queries(
    problem: Problem,
    operands: Operands,
    dout: jax.Array,
    logsumexp: jax.Array,
    delta: jax.Array,
    chosen: Sizes | None = None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """The gradients of the queries and of the score's operands.

    `delta` (batch, heads, q_time) sums the products of the output and its gradient.
    """
    tiling = Tiling(problem, operands, chosen or sizes(problem, operands)["queries"])
    learned = [x for x, flag in zip(operands.score, problem.learned, strict=True) if flag]
    dq, *dscore = tiling.call(
        functools.partial(_queries_kernel, tiling),
        tiling.lists(operands),
        tiling.inputs(operands, dout, logsumexp, delta),
        [tiling.by_query(operands.q), *map(tiling.by_row_of, learned)],
        tiling.heads,
    )
    sums = iter([jnp.sum(x, axis=(0, 2)) for x in dscore])
    score = tuple(
        next(sums).reshape(x.shape) if flag else None
        for x, flag in zip(operands.score, problem.learned, strict=True)
    )
    return tiling.cut(dq, tiling.q_time), score


def gradient_of_keys(
    problem: Problem,
    operands: Operands,
    dout: jax.Array,
    logsumexp: jax.Array,
    delta: jax.Array,
    chosen: Sizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values."""
    tiling = Tiling(problem, operands, chosen or sizes(problem, operands)["keys"])
    dk, dv = tiling.call(
        functools.partial(_keys_kernel, tiling),
        tiling.lists(operands, by_keys=True),
        tiling.inputs(operands, dout, logsumexp, delta),
        [tiling.by_key(operands.k), tiling.by_key(operands.v)],
        tiling.kv_heads,
    )
    return tiling.cut(dk, tiling.k_time), tiling.cut(dv, tiling.k_time)


# --- The kernels -------------------------------------------------------------------------------


def _forward_kernel(tiling: Tiling, lists: Any, refs: Inputs, out: Any, logsumexp: Any) -> None:
    i, head, batch = (pl.program_id(axis) for axis in range(3))
    place = _Place(tiling, refs, batch, head)
    q = place.queries(refs.q, i)

    def step(check: bool, n: Any, carry: Any) -> Any:
        largest, total, mixed = carry
        j = lists.indices[i, n]
        products = place.products(q, place.keys(refs.k, j))
        s = place.new_score(i, j, products * tiling.problem.scale)
        if check:
            s = jnp.where(place.allowed(i, j), s, -jnp.inf)
        higher = jnp.maximum(largest, jnp.max(s, axis=1))
        # A row without keys so far has no largest score to subtract.
        some_without = check or tiling.problem.score is not None
        base = jnp.where(higher == -jnp.inf, 0.0, higher) if some_without else higher
        weights, shrink = jnp.exp(s - base[:, None]), jnp.exp(largest - base)
        total = total * shrink + jnp.sum(weights, axis=1)
        v = place.keys(refs.v, j)
        weights = place.dropped(i, j, weights).astype(v.dtype)
        return higher, total, mixed * shrink[:, None] + tiling.dot(weights, v)

    rows = jnp.zeros((tiling.block_q,), jnp.float32)
    mixed = jnp.zeros((tiling.block_q, tiling.padded_width), jnp.float32)
    largest, total, mixed = _walk(lists, i, step, (rows - jnp.inf, rows, mixed))
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    out[...] = (mixed / divisor[:, None]).astype(out.dtype)
    logsumexp[...] = jnp.where(some, largest + jnp.log(divisor), -jnp.inf)


def _queries_kernel(tiling: Tiling, lists: Any, refs: Inputs, dq: Any, *dscore: Any) -> None:
    i, head, batch = (pl.program_id(axis) for axis in range(3))
    place = _Place(tiling, refs, batch, head)
    q, dout = place.queries(refs.q, i), place.queries(refs.dout, i)
    logsumexp, delta = place.numbers(refs.logsumexp, i), place.numbers(refs.delta, i)

    def step(check: bool, n: Any, carry: Any) -> Any:
        total, totals = carry
        j = lists.indices[i, n]
        k, v = place.keys(refs.k, j), place.keys(refs.v, j)
        _, ds, parts = place.gradient(check, i, j, q, k, v, dout, logsumexp, delta)
        totals = [a + b.astype(jnp.float32) for a, b in zip(totals, parts, strict=True)]
        return total + tiling.dot(ds.astype(k.dtype), k), totals

    none = [jnp.float32(0)] * sum(ref.shape[0] for ref in dscore)
    zeros = jnp.zeros((tiling.block_q, tiling.padded_width), jnp.float32)
    total, totals = _walk(lists, i, step, (zeros, none))
    dq[...] = (total * tiling.problem.scale).astype(dq.dtype)
    numbers = iter(totals)
    for ref in dscore:
        for column in range(ref.shape[0]):
            ref[column] = next(numbers)


def _keys_kernel(tiling: Tiling, lists: Any, refs: Inputs, dk: Any, dv: Any) -> None:
    j, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    shared = _Place(tiling, refs, batch, kv_head * tiling.group, keys_first=True)
    k, v = shared.keys(refs.k, j), shared.keys(refs.v, j)

    def of_head(g: Any, carry: Any) -> Any:
        place = _Place(tiling, refs, batch, kv_head * tiling.group + g, keys_first=True)

        def step(check: bool, n: Any, carry: Any) -> Any:
            dk, dv = carry
            i = lists.indices[j, n]
            q, dout = place.queries(refs.q, i), place.queries(refs.dout, i)
            logsumexp, delta = place.numbers(refs.logsumexp, i), place.numbers(refs.delta, i)
            weights, ds, _ = place.gradient(
                check, i, j, q, k, v, dout, logsumexp, delta, learned=False
            )
            dv = dv + tiling.dot(place.dropped(i, j, weights).astype(dout.dtype), dout)
            return dk + tiling.dot(ds.astype(q.dtype), q), dv

        return _walk(lists, j, step, carry)

    zeros = jnp.zeros((tiling.block_k, tiling.padded_width), jnp.float32)
    total_dk, total_dv = jax.lax.fori_loop(0, tiling.group, of_head, (zeros, zeros))
    dk[...] = (total_dk * tiling.problem.scale).astype(dk.dtype)
    dv[...] = total_dv.astype(dv.dtype)


def _walk(lists: Any, row: Any, step: Callable[..., Any], carry: Any) -> Any:
    full, end = lists.full_counts[row], lists.counts[row]
    carry = jax.lax.fori_loop(0, full, functools.partial(step, False), carry)
    return jax.lax.fori_loop(full, end, functools.partial(step, True), carry)


class _Place:
    """One head's blocks inside a kernel: what they hold, and what becomes of their scores.

    Scores are (queries, keys), or (keys, queries) where the products with them sum over queries:
    transposing them instead costs registers, and more than there are in float32.
    """

    def __init__(
        self, tiling: Tiling, refs: Inputs, batch: Any, head: Any, keys_first: bool = False
    ):
        self.tiling, self.refs, self.batch, self.head = tiling, refs, batch, head
        self.member = jax.lax.rem(head, tiling.group)
        self.keys_first = keys_first

    def numbers_of_head(self) -> tuple[Any, Any]:
        """Which batch entry and head this is, among those of all devices."""
        if self.refs.batch_index is None:
            return self.batch, self.head
        return self.refs.batch_index[self.batch], self.refs.head_index[self.head]

    def parameters(self, function: Callable[..., Any]) -> tuple[Any, ...]:
        return scores.Score(function).parameters(self.refs.score, self.head)

    def products(self, of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
        a, b = (of_keys, of_queries) if self.keys_first else (of_queries, of_keys)
        return self.tiling.dot(a, b, transpose_b=True)

    def along_queries(self, numbers: jax.Array) -> jax.Array:
        return numbers[None, :] if self.keys_first else numbers[:, None]

    def along_keys(self, numbers: jax.Array) -> jax.Array:
        return numbers[:, None] if self.keys_first else numbers[None, :]

    def queries(self, ref: Any, i: Any) -> jax.Array:
        return ref[pl.ds(i * self.tiling.block_q, self.tiling.block_q), self.member, :]

    def keys(self, ref: Any, j: Any) -> jax.Array:
        return ref[pl.ds(j * self.tiling.block_k, self.tiling.block_k), :]

    def numbers(self, ref: Any, i: Any) -> jax.Array:
        return ref[self.member, pl.ds(i * self.tiling.block_q, self.tiling.block_q)]

    def index(self, i: Any, j: Any) -> tuple[jax.Array, jax.Array]:
        block_q, block_k = self.tiling.block_q, self.tiling.block_k
        shape = (block_k, block_q) if self.keys_first else (block_q, block_k)
        first, second = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        q, k = (second, first) if self.keys_first else (first, second)
        return i * block_q + q, j * block_k + k

    def new_score(self, i: Any, j: Any, s: jax.Array) -> jax.Array:
        function = self.tiling.problem.score
        if function is None:
            return s
        return function(s, *self.numbers_of_head(), *self.index(i, j), *self.parameters(function))

    def allowed(self, i: Any, j: Any) -> jax.Array:
        tiling, refs = self.tiling, self.refs
        k_time = tiling.k_time if tiling.ragged else None
        q, k = self.index(i, j)
        if refs.q_segments is None:
            return tiling.problem.allowed(q, k, k_time=k_time)
        q_segment = refs.q_segments[pl.ds(i * tiling.block_q, tiling.block_q)]
        k_segment = refs.k_segments[pl.ds(j * tiling.block_k, tiling.block_k)]
        segments = self.along_queries(q_segment), self.along_keys(k_segment)
        return tiling.problem.allowed(q, k, *segments, k_time)

    def dropped(self, i: Any, j: Any, weights: jax.Array) -> jax.Array:
        if not self.tiling.problem.dropout:
            return weights
        seed, threshold = self.refs.dropout[0], self.refs.dropout[1]
        kept = keep(seed, threshold, *self.numbers_of_head(), *self.index(i, j))
        return jnp.where(kept, weights, 0.0)

    def gradient(
        self,
        check: bool,
        i: Any,
        j: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        dout: jax.Array,
        logsumexp: jax.Array,
        delta: jax.Array,
        learned: bool = True,
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """The attention weights, the gradient of the scores, and those of the score's numbers."""
        problem = self.tiling.problem
        s = self.products(q, k) * problem.scale
        pull = None
        if problem.score is not None:
            function, parameters = problem.score, self.parameters(problem.score)
            index = (*self.numbers_of_head(), *self.index(i, j))
            wanted = [flag and learned for flag in problem.learned]
            chosen = [p for p, flag in zip(parameters, wanted, strict=True) if flag]

            def new_score(s: jax.Array, chosen: list[Any]) -> jax.Array:
                rest = iter(chosen)
                pairs = zip(parameters, wanted, strict=True)
                all_ = [next(rest) if flag else p for p, flag in pairs]
                return function(s, *index, *all_)

            s, pull = jax.vjp(new_score, s, chosen)
        if check:
            s = jnp.where(self.allowed(i, j), s, -jnp.inf)
        weights = jnp.exp(s - self.along_queries(logsumexp))
        dweights = self.dropped(i, j, self.products(dout, v))
        ds = weights * (dweights - self.along_queries(delta))
        if pull is None:
            return weights, ds, []
        pulled, parts = pull(ds)
        # Where nothing is to be pulled, not even an infinite slope does.
        return weights, jnp.where(ds == 0, 0.0, pulled), jax.tree.leaves(parts)


def _refuses(problem: Problem, operands: Operands, device: Device) -> str | None:
    width, dtype = operands.q.shape[-1], operands.q.dtype
    captured = captures_arrays(problem, operands)
    if device.platform == "gpu" and triton is None:
        return f"jax {jax.__version__} no longer compiles Pallas kernels with Triton"
    if device.platform not in ("cpu", "gpu"):
        return f"its kernels are for NVIDIA GPUs, and on a CPU for tests, not for a {device.kind}"
    if dtype not in DTYPES:
        return f"it computes in {', '.join(jnp.dtype(d).name for d in DTYPES)}, not in {dtype}"
    if width > LARGEST_WIDTH:
        return f"its heads may be {LARGEST_WIDTH} wide, not {width}"
    if not masks.is_positional(problem.positional_mask):
        return "a kernel has no array to look documents up in, unless they are joined by & alone"
    if captured is not None:
        return f"{captured} reads an array, which a kernel has no place for"
    return None


IMPLEMENTATION = Implementation(*over_devices(forward, backward), _refuses)
