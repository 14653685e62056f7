"""Attention as Pallas Mosaic GPU kernels for Hopper cards: TMA, `wgmma`, specialised warpgroups."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecoder.kernels.hopper import forward as forward_kernel
from jaxdecoder.kernels.hopper.launch import Launch, Sizes, padded
from jaxdecoder.kernels.hopper.tiles import CONSUMERS, ROWS, Arrays
from jaxdecoder.kernels.problem import LogSumExp, Operands, Problem, result

def forward(
    problem: Problem, operands: Operands, interpret: Any = None
) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`."""
    launch = Launch(problem, operands, Sizes(128, 2), interpret)
    rows, columns = CONSUMERS * ROWS, launch.sizes.columns
    q_blocks = launch.whole(launch.q_time, rows)
    k_blocks = launch.whole(launch.k_time, columns)
    seed = operands.dropout_seed
    arrays = Arrays(
        padded(operands.q, 1, launch.aligned_q),
        padded(operands.k, 1, launch.aligned_k),
        padded(operands.v, 1, launch.aligned_k),
        q_segments=padded(operands.q_segments, 1, q_blocks),
        k_segments=padded(operands.k_segments, 1, k_blocks),
        score=operands.score,
        seed=None if seed is None else seed.reshape(1),
    )
    out, logsumexp = launch.call(
        "attention_forward",
        problem.states(launch.q_time, launch.k_time, rows, columns),
        launch.heads,
        arrays,
        forward_kernel.memory(launch),
        forward_kernel.load,
        forward_kernel.attend,
        [
            result(arrays.q.shape, launch.dtype, operands.q),
            result((launch.batch, launch.heads, q_blocks), jnp.float32, operands.q),
        ],
    )
    return out[:, : launch.q_time], logsumexp[:, :, : launch.q_time] * math.log(2)
