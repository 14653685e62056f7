"""Linear attention: the past as a sum of fixed size."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdecoder.config import Architecture
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.kernels.mesh import split
from jaxdecoder.layers.cache import Cursor
from jaxdecoder.layers.costs import FLOAT32
from jaxdecoder.layers.mechanism import AttentionCosts, Heads, Mechanism, of_pairs


class State(NamedTuple):
    """Sums over all tokens so far; float32, because what is added to a long sum is small by it."""

    kv: Float[Array, "batch kv_heads width width"]
    """Of phi(k) v^T, phi(k) turned by its position."""
    k: Float[Array, "batch kv_heads width"]
    """Of phi(k)."""


def empty_state(config: Architecture, batch: int, dtype: DTypeLike = jnp.float32) -> State:
    """Return the state of a layer that has seen nothing, float32 whatever the dtype asked for."""
    shape = (batch, config.n_kv_heads, config.d_head)
    return State(jnp.zeros((*shape, config.d_head), jnp.float32), jnp.zeros(shape, jnp.float32))


def feature_map(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Return phi(x) = elu(x) + 1, which is positive; float32."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0


class LinearMixing(nn.Module):
    """Linear attention with the feature map elu(x) + 1 (arXiv 2006.16236).

    phi(q_i) (sum_j phi(k_j) v_j^T) / phi(q_i) (sum_j phi(k_j)) over j <= i. The sums are a state of
    fixed size, so a token costs the same wherever it stands, and nothing is forgotten, not even
    past the context. A pass over many tokens goes in chunks of attention_block: each is quadratic
    inside, and what came before it is a state, so time and memory are linear in the length.

    Rotary positions turn phi(q) and phi(k) above the line only (RoFormer, arXiv 2104.09864, section
    3.3), which keeps the divisor positive. There are no attention weights, so none are dropped;
    dropout acts on the output of the layer as everywhere.
    """

    config: Architecture

    @nn.compact
    def __call__(
        self, heads: Heads, cache: State | None, cursor: Cursor | None, dropout: Rate | None
    ) -> tuple[Float[Array, "batch time heads width"], State | None]:
        """See `Mechanism`."""
        before = empty_state(self.config, heads.q.shape[0]) if cache is None else cache
        # Over a mesh: a chunk needs the state before it, so none is left to another device.
        kv_heads = ("batch", None, "kv_heads", None)
        heads = heads._replace(
            q=split(heads.q, "batch", None, "heads", None),
            k=split(heads.k, *kv_heads),
            v=split(heads.v, *kv_heads),
        )
        q, k = feature_map(heads.q), feature_map(heads.k)
        there = heads.positions >= 0
        if heads.seen is not None:
            there = there & heads.seen(heads.positions)
        k = jnp.where(there[:, :, None, None], k, 0.0)
        divisor, k_sum = _divisors(q, k, before.k)
        chunk = min(self.config.attention_block, q.shape[1])
        v = heads.v.astype(jnp.float32)
        mixed, kv_sum = _dividends(heads.rotate(q), heads.rotate(k), v, before.kv, chunk)
        # Padding before the first token has nothing to divide, and nothing to divide by.
        mixed = mixed / jnp.where(divisor > 0, divisor, 1.0)
        return mixed.astype(heads.v.dtype), None if cache is None else State(kv_sum, k_sum)


def _divisors(
    q: Float[Array, "batch time heads width"],
    k: Float[Array, "batch time kv_heads width"],
    before: Float[Array, "batch kv_heads width"],
) -> tuple[Float[Array, "batch time heads 1"], Float[Array, "batch kv_heads width"]]:
    """Return phi(q_i) sum_j phi(k_j) of every token, and the sum after the last."""
    sums = before[:, None] + jnp.cumsum(k, axis=1)
    grouped = q.reshape(*k.shape[:3], -1, q.shape[3])
    divisors = jnp.sum(grouped * sums[:, :, :, None], axis=-1)
    return divisors.reshape(*q.shape[:3], 1), sums[:, -1]


def _dividends(
    q: Float[Array, "batch time heads width"],
    k: Float[Array, "batch time kv_heads width"],
    v: Float[Array, "batch time kv_heads width"],
    before: Float[Array, "batch kv_heads width width"],
    chunk: int,
) -> tuple[Float[Array, "batch time heads width"], Float[Array, "batch kv_heads width width"]]:
    """Return phi(q_i) sum_j phi(k_j) v_j^T of every token, and the sum after the last."""
    batch, time, n_heads, width = q.shape
    kv_heads = k.shape[2]
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def chunks(x: jax.Array) -> jax.Array:
        """Return (chunks, batch, kv_heads, heads that share one, chunk, width), padded by zeros."""
        x = jnp.pad(x, ((0, 0), (0, -time % chunk), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, chunk, kv_heads, x.shape[2] // kv_heads, width)
        return x.transpose(1, 0, 3, 4, 2, 5)

    def step(state: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v = parts[0], parts[1][:, :, 0], parts[2][:, :, 0]
        inside = jnp.where(causal, jnp.einsum("bhgqw,bhkw->bhgqk", q, k), 0.0)
        mixed = jnp.einsum("bhgqk,bhkw->bhgqw", inside, v)
        mixed = mixed + jnp.einsum("bhgqw,bhwe->bhgqe", q, state)
        return state + jnp.einsum("bhkw,bhke->bhwe", k, v), mixed

    after, mixed = jax.lax.scan(step, before, (chunks(q), chunks(k), chunks(v)))
    mixed = mixed.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, n_heads, width)
    return mixed[:, :time], after


def mixing_cost(c: Architecture, queries: int, start: int) -> int:
    """Count the multiply-adds of the recurrence: a state is written and read."""
    return queries * c.d_head * (c.query_width + c.kv_width)


def dense_cost(c: Architecture, queries: int, start: int) -> int:
    """Count them in chunks, whose pairs are all computed."""
    chunk = 1 if start else min(c.attention_block, queries)
    padded = -(-queries // chunk) * chunk
    return mixing_cost(c, padded, start) + of_pairs(c, padded * chunk)


COSTS = AttentionCosts(
    mixing_cost,
    dense_cost,
    drawn=lambda c, tokens, n: mixing_cost(c, n, 0),
    cache=lambda c, number: FLOAT32 * c.kv_width * (c.d_head + 1),
)

LINEAR = Mechanism(LinearMixing, empty_state, COSTS)
