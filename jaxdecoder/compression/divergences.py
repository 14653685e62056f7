"""How far a student's next token is from its teacher's: pure functions, in nats a token, float32.

A distribution is given by the logarithms of its probabilities over all outcomes, none of them -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbabilities = Float[Array, "*rows outcomes"]
Divergence = Callable[[LogProbabilities, LogProbabilities, float], Float[Array, "*rows"]]
"""(student, teacher, beta) -> nats. beta is the teacher's share of a mixture, if there is one."""

MOST_LOGITS = {"cpu": 2**22}
"""Logits of one model that exist at once, 4 bytes each, by platform; elsewhere `MOST_ELSEWHERE`."""
MOST_ELSEWHERE = 2**26


def forward_kl(
    student: LogProbabilities, teacher: LogProbabilities, beta: float = 0.5
) -> Float[Array, "*rows"]:
    """KL(teacher || student): what the teacher holds possible must be (Hinton, arXiv 1503.02531).

    It is the cross-entropy with the teacher's probabilities, less what no student can change.
    """
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def reverse_kl(
    student: LogProbabilities, teacher: LogProbabilities, beta: float = 0.5
) -> Float[Array, "*rows"]:
    """KL(student || teacher): what the teacher holds impossible must not be (arXiv 2306.08543)."""
    return forward_kl(teacher, student)


def jensen_shannon(
    student: LogProbabilities, teacher: LogProbabilities, beta: float = 0.5
) -> Float[Array, "*rows"]:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    The generalised Jensen-Shannon divergence (arXiv 2306.13649), which is bounded; 0.5 gives the
    usual one. Divided by beta it tends to the forward KL as beta goes to 0, and divided by 1 - beta
    to the reverse one as beta goes to 1.
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
    """The log-probabilities of logits divided by a temperature, float32.

    Gradients of divergences at a temperature shrink with its square, and so does what they are
    multiplied by in a loss: the square keeps their size against another term (arXiv 1503.02531).
    """
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def at_once(rows: int, vocab_size: int, platform: str) -> int:
    """Steps of time that may be taken together for so many rows of logits; 1 at least."""
    return max(1, MOST_LOGITS.get(platform, MOST_ELSEWHERE) // (rows * vocab_size))


def over_time(function: Callable[[Any], Any], arrays: Any, chunk: int) -> Any:
    """`function` of arrays (batch, time, ...), asked for `chunk` steps of time after another.

    Its result has those two axes as well. What a chunk computes is computed again in the backward
    pass rather than kept, so that logits over a large vocabulary are never there for all tokens.
    Chunks are of the time, not of the batch, for that may be sharded over devices.
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
