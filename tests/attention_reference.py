"""Attention and its gradients in float64 NumPy, from the formulas, one head at a time.

It shares no code with the package. Masks and scores are plain functions of positions; the
gradients are written out by hand.
"""

from typing import Any, NamedTuple

import numpy as np


class Score(NamedTuple):
    """A score function, with its derivatives by the old score and by the operands' rows."""

    value: Any
    """(score, batch, head, q, k, *operands) -> score"""
    slope: Any
    """The same arguments -> d value / d score"""
    gradients: Any
    """(upstream, score, batch, head, q, k, *operands) -> one row for each operand"""


def distance(q, k):
    return np.abs(q - k).astype(float)


def column(q, k, n):
    return np.clip(q - k, 0, n - 1)


def summed_by_column(upstream, q, k, n):
    return np.bincount(
        np.broadcast_to(column(q, k, n), upstream.shape).ravel(), upstream.ravel(), n
    )


NO_SCORE = Score(lambda s, b, h, q, k: s, lambda s, *_: np.ones_like(s), lambda *_: [])
ALIBI = Score(
    lambda s, b, h, q, k, slopes: s - slopes[h] * distance(q, k),
    lambda s, *_: np.ones_like(s),
    lambda g, s, b, h, q, k, slopes: [-np.sum(g * distance(q, k))],
)
BIAS = Score(
    lambda s, b, h, q, k, table: s + table[h][column(q, k, table.shape[1])],
    lambda s, *_: np.ones_like(s),
    lambda g, s, b, h, q, k, table: [summed_by_column(g, q, k, table.shape[1])],
)
WITH_BATCH = Score(
    lambda s, b, h, q, k, factors: s * factors[h] + b,
    lambda s, b, h, q, k, factors: np.full_like(s, factors[h]),
    lambda g, s, b, h, q, k, factors: [np.sum(g * s)],
)


def capped(inner, cap):
    def squashed(*arguments):
        return np.tanh(inner.value(*arguments) / cap)

    return Score(
        lambda *arguments: cap * squashed(*arguments),
        lambda *arguments: (1 - squashed(*arguments) ** 2) * inner.slope(*arguments),
        lambda g, *arguments: inner.gradients(g * (1 - squashed(*arguments) ** 2), *arguments),
    )


def mixed_bits(x):
    x = x.astype(np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def kept(seed, rate, batch, head, q, k):
    word = np.uint64(seed)
    for index in (batch, head, q, k):
        step = (np.uint64(0x9E3779B9) * np.asarray(index, np.uint64)) & np.uint64(0xFFFFFFFF)
        word = mixed_bits(word ^ step)
    return word >= int(np.float32(rate * 2.0**32))


def attention(
    q, k, v, allowed, *, scale, score=NO_SCORE, operands=(), rate=0.0, seed=0, segments=None, dout
):
    """The output (batch, q_time, heads, width), and the gradients of sum(out * dout) by name.

    `allowed` is bool (q_time, k_time), `segments` a pair of arrays (batch, time).
    """
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    operands = [np.asarray(x, np.float64) for x in operands]
    batch, q_time, heads, _ = q.shape
    group = heads // k.shape[2]
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    doperands = [np.zeros_like(x) for x in operands]
    at_q, at_k = np.arange(q_time)[:, None], np.arange(k.shape[1])[None, :]
    for b in range(batch):
        for h in range(heads):
            g = h // group
            index = (b, h, at_q, at_k, *operands)
            old = scale * q[b, :, h] @ k[b, :, g].T
            seen = allowed
            if segments is not None:
                seen = seen & (segments[0][b][:, None] == segments[1][b][None, :])
            s = np.where(seen, score.value(old, *index), -np.inf)
            top = np.max(s, axis=1, keepdims=True)
            weights = np.exp(s - np.where(np.isfinite(top), top, 0))
            total = weights.sum(1, keepdims=True)
            weights = weights / np.where(total > 0, total, 1)
            keep = kept(seed, rate, b, h, at_q, at_k) / (1 - rate) if rate else 1.0
            out[b, :, h] = (weights * keep) @ v[b, :, g]
            dv[b, :, g] += (weights * keep).T @ dout[b, :, h]
            dweights = keep * (dout[b, :, h] @ v[b, :, g].T)
            ds = weights * (dweights - np.sum(weights * dweights, 1, keepdims=True))
            for doperand, part in zip(doperands, score.gradients(ds, old, *index), strict=True):
                doperand[h] += part
            ds = ds * score.slope(old, *index) * scale
            dq[b, :, h] = ds @ k[b, :, g]
            dk[b, :, g] += ds.T @ q[b, :, h]
    return out, {"q": dq, "k": dk, "v": dv, "score": doperands}
