"""Divergences of a student's predictions from its teacher's: pure functions, nats, float32.

A distribution is given by its log-probabilities over all outcomes, none of them -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbabilities = Float[Array, "*rows outcomes"]
Divergence = Callable[[LogProbabilities, LogProbabilities, float], Float[Array, "*rows"]]
"""(student, teacher, beta) -> nats. beta is the teacher's share of the mixture, if there is one."""

MOST_LOGITS = {"cpu": 2**22}
"""Most logits of one model in memory at once, 4 bytes each, by platform; else `MOST_ELSEWHERE`."""
MOST_ELSEWHERE = 2**26


def forward_kl(
    student: LogProbabilities, teacher: LogProbabilities, beta: float = 0.5
) -> Float[Array, "*rows"]:
    """KL(teacher || student): likely for the teacher must be likely for the student.

    It is the cross-entropy with the teacher's probabilities, minus a term that no student can
    change (Hinton, arXiv 1503.02531).
    """
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def reverse_kl(
    student: LogProbabilities, teacher: LogProbabilities, beta: float = 0.5
) -> Float[Array, "*rows"]:
    """KL(student || teacher): never likely where the teacher is not (arXiv 2306.08543)."""
    return forward_kl(teacher, student)


def jensen_shannon(
    student: LogProbabilities, teacher: LogProbabilities, beta: float = 0.5
) -> Float[Array, "*rows"]:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    This is the generalised Jensen-Shannon divergence (arXiv 2306.13649), which is bounded; beta 0.5
    gives the usual one. Divided by beta, it tends to the forward KL as beta goes to 0. Divided by
    1 - beta, it tends to the reverse KL as beta goes to 1.
    """
    mixture = jnp.logaddexp(jnp.log(beta) + teacher, jnp.log1p(-beta) + student)
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def soften(
    logits: Float[Array, "*rows outcomes"], temperature: float
) -> Float[Array, "*rows outcomes"]:
    """Return the log-probabilities of logits divided by a temperature, float32.

    The gradients of a divergence shrink with the square of the temperature. So a loss multiplies
    the divergence by the square, to keep its size relative to other terms (arXiv 1503.02531).
    """
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def at_once(rows: int, vocab_size: int, platform: str) -> int:
    """Return how many time steps of `rows` rows of logits fit into memory together; at least 1."""
    return max(1, MOST_LOGITS.get(platform, MOST_ELSEWHERE) // (rows * vocab_size))


def over_time(function: Callable[[Any], Any], arrays: Any, chunk: int) -> Any:
    """Apply `function` to arrays (batch, time, ...), `chunk` time steps after another.

    Its result has these two axes too. The backward pass computes each chunk again instead of
    keeping it. So the logits over a large vocabulary never exist for all tokens at once. Chunks
    divide the time and not the batch, because the batch may be sharded over devices.
    """
    rows, time = jax.tree.leaves(arrays)[0].shape[:2]
    if chunk >= time:
        return function(arrays)
    count = -(-time // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(rows, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(rows, count * chunk, *x.shape[3:])[:, :time]

    parts = jax.lax.map(jax.checkpoint(function), jax.tree.map(split, arrays))
    return jax.tree.map(join, parts)
