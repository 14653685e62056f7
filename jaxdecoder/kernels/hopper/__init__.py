"""Attention as Pallas Mosaic GPU kernels for Hopper cards: TMA, `wgmma`, specialised warpgroups."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdecoder.kernels.hopper import backward as backward_kernels
from jaxdecoder.kernels.hopper import forward as forward_kernel
from jaxdecoder.kernels.hopper.launch import Launch, Sizes
from jaxdecoder.kernels.problem import Gradients, LogSumExp, Operands, Problem, result

class KernelSizes(NamedTuple):
    """Of the forward kernel, of the one for the gradient of queries, and of those for the
    gradients of keys and values, by which of them a kernel computes."""

    forward: Sizes
    queries: Sizes
    keys: dict[str, Sizes]


# For widths up to the key: the largest blocks and rings that fit into the registers, without
# spills, and the shared memory of a block. Plain problems have no score, dropout or segments.
PLAIN = {
    64: KernelSizes(Sizes(128, 3), Sizes(64, 3), {"kv": Sizes(64, 3)}),
    128: KernelSizes(Sizes(128, 2), Sizes(64, 2), {"kv": Sizes(64, 2)}),
    192: KernelSizes(Sizes(64, 2), Sizes(64, 2), {"k": Sizes(64, 2), "v": Sizes(64, 2)}),
    256: KernelSizes(Sizes(64, 2), Sizes(64, 1), {"k": Sizes(64, 1), "v": Sizes(64, 1)}),
}
OTHERS = {
    64: KernelSizes(Sizes(64, 4), Sizes(64, 3), {"k": Sizes(64, 3), "v": Sizes(64, 3)}),
    128: KernelSizes(Sizes(64, 3), Sizes(64, 2), {"k": Sizes(64, 2), "v": Sizes(64, 2)}),
    192: PLAIN[192],
    256: PLAIN[256],
}


def sizes(problem: Problem, operands: Operands) -> KernelSizes:
    plain = problem.score is None and problem.dropout_rate == 0 and operands.q_segments is None
    table, width = PLAIN if plain else OTHERS, operands.q.shape[-1]
    return next(chosen for largest, chosen in table.items() if width <= largest)


def forward(
    problem: Problem, operands: Operands, interpret: Any = None
) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`."""
    chosen = sizes(problem, operands).forward
    launch = Launch(forward_kernel.KERNEL, problem, operands, chosen, interpret)
    arrays = launch.arrays(operands)
    sums = (launch.batch, launch.heads, launch.q_whole)
    out, logsumexp = launch(arrays, [launch.like(arrays.q), result(sums, jnp.float32, operands.q)])
    return out[:, : launch.q_time], logsumexp[:, :, : launch.q_time] * math.log(2)


def backward(
    problem: Problem,
    operands: Operands,
    out: jax.Array,
    logsumexp: jax.Array,
    dout: jax.Array,
    interpret: Any = None,
) -> Gradients:
    """See `problem.Implementation`."""
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    # Without keys every weight is 2^(-inf - inf) = 0.
    logsumexp = jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp / math.log(2))
    of_queries = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (logsumexp, delta)]
    if operands.q_segments is not None:
        segments = operands.q_segments[:, None].astype(jnp.int32)
        of_queries.append(jnp.broadcast_to(segments, delta.shape))
    of_queries = jnp.stack(of_queries, axis=2)
    chosen = sizes(problem, operands)

    launch = Launch(backward_kernels.QUERIES, problem, operands, chosen.queries, interpret)
    arrays = launch.arrays(operands, dout, of_queries)
    results = [launch.like(arrays.q)]
    n = backward_kernels.learned_numbers(launch, arrays)
    if n:
        shape = (launch.batch, launch.heads, n, launch.q_whole)
        results.append(result(shape, jnp.float32, operands.q))
    dq, *dscore = launch(arrays, results)
    sums = jnp.sum(dscore[0], axis=(0, 3)) if n else None
    score, start = [], 0
    for x, learned in zip(operands.score, problem.learned, strict=True):
        end = start + (x.size // launch.heads if learned else 0)
        score.append(sums[:, start:end].reshape(x.shape) if learned else None)
        start = end

    found = {}
    for wanted, key_sizes in chosen.keys.items():
        kernel = backward_kernels.KEYS[wanted]
        launch = Launch(kernel, problem, operands, key_sizes, interpret)
        arrays = launch.arrays(operands, dout, of_queries)
        gradients = launch(arrays, [launch.like(arrays.k)] * len(wanted))
        found |= dict(zip(wanted, gradients, strict=True))
    dk, dv = found["k"][:, : launch.k_time], found["v"][:, : launch.k_time]
    return Gradients(dq[:, : launch.q_time], dk, dv, tuple(score))
