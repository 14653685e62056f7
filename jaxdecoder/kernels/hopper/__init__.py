"""Attention as Pallas Mosaic GPU kernels for Hopper cards: TMA, `wgmma`, specialised warpgroups."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecoder.kernels.hopper import backward as backward_kernels
from jaxdecoder.kernels.hopper import forward as forward_kernel
from jaxdecoder.kernels.hopper.launch import Launch, Sizes
from jaxdecoder.kernels.problem import Gradients, LogSumExp, Operands, Problem, result


def forward(
    problem: Problem, operands: Operands, interpret: Any = None
) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`."""
    launch = Launch(forward_kernel.KERNEL, problem, operands, Sizes(128, 2), interpret)
    arrays = launch.arrays(operands)
    sums = (launch.batch, launch.heads, launch.q_whole)
    out, logsumexp = launch(
        arrays, [launch.like(arrays.q), result(sums, jnp.float32, operands.q)]
    )
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
    of_queries = jnp.stack([logsumexp, delta], axis=2)

    launch = Launch(backward_kernels.QUERIES, problem, operands, Sizes(64, 2), interpret)
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

    launch = Launch(backward_kernels.KEYS, problem, operands, Sizes(64, 2), interpret)
    arrays = launch.arrays(operands, dout, of_queries)
    dk, dv = launch(arrays, [launch.like(arrays.k), launch.like(arrays.v)])
    times = launch.q_time, launch.k_time
    return Gradients(dq[:, : times[0]], dk[:, : times[1]], dv[:, : times[1]], tuple(score))
