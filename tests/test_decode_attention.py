"""The attention of decoding: a few queries, a cache with its own positions, split over keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compile import H200

from jaxdecoder.errors import UserError
from jaxdecoder.kernels import decode, decode_kernel, masks, reference, scores

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend")

SLOPES = np.float32([0.5, 0.25, 0.1, 0.05, 0.2, 0.3])
TABLE = np.float32(np.random.default_rng(1).normal(size=(6, 7)))
ON_DEVICE = jnp.asarray(TABLE[0])
SCORES = {
    "none": (None, lambda s, h, q, k: s),
    "alibi_and_cap": (
        scores.compose(scores.alibi(SLOPES), scores.soft_cap(2.0)),
        lambda s, h, q, k: 2 * np.tanh((s - SLOPES[h] * np.abs(q - k)) / 2),
    ),
    "bias": (
        scores.relative_bias(TABLE),
        lambda s, h, q, k: s + TABLE[h][np.clip(q - k, 0, 6)],
    ),
}
MASK = masks.causal() & (masks.sliding_window(90) | masks.first(2))


def a_cache(q_time, slots, heads=6, kv_heads=2, width=16, dtype=jnp.float32):
    """A ring that has turned: row 0 is full, row 1 began late, row 2 holds nothing yet."""
    random = np.random.default_rng(q_time + slots)
    q = jnp.asarray(random.normal(size=(3, q_time, heads, width)), dtype)
    k, v = (jnp.asarray(random.normal(size=(3, slots, kv_heads, width)), dtype) for _ in range(2))
    turned = np.roll(np.arange(slots), 5) + 40
    held = np.stack([turned, np.where(turned < 60, -1, turned - 60), np.full(slots, -1)])
    at = held.max(axis=1)[:, None] - np.arange(q_time)[::-1]
    held, at = (x.astype(np.int32) for x in (held, at))
    allowed = np.asarray(MASK(at[:, :, None], held[:, None, :])) & (held >= 0)[:, None]
    return q, k, v, jnp.asarray(allowed[:, None]), jnp.asarray(at), jnp.asarray(held)


def expected(q, k, v, allowed, at, held, scale, formula):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        seen = np.flatnonzero(np.asarray(allowed)[b, 0, t])
        if seen.size:
            s = formula(
                scale * k[b, seen, g] @ q[b, t, h], h, int(at[b, t]), np.asarray(held)[b, seen]
            )
            weights = np.exp(s - s.max())
            out[b, t, h] = weights @ v[b, seen, g] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("q_time", "slots", "score"),
    [(1, 300, "none"), (3, 200, "bias"), (1, 40, "alibi_and_cap")],
)
@pytest.mark.parametrize("implementation", decode.IMPLEMENTATIONS)
def test_is_the_formula(implementation, q_time, slots, score, monkeypatch):
    monkeypatch.setattr(
        decode_kernel, "PROGRAMS", 18
    )  # three parts of a batch of 3 with 2 key heads
    q, k, v, allowed, at, held = a_cache(q_time, slots)
    ours, formula = SCORES[score]
    found = jax.jit(
        lambda *arrays: decode.decode_attention(
            *arrays,
            scale=0.3,
            score=ours,
            q_index=at,
            k_index=held,
            implementation=implementation,
        )
    )(q, k, v, allowed)
    wanted = expected(q, k, v, allowed, at, held, 0.3, formula)
    assert np.any(wanted[:2])
    assert not np.any(found[2])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("filled", [1, 30, 31, 90, 120])
def test_reads_no_more_parts_than_hold_keys(score, filled):
    q, k, v, allowed, at, held = a_cache(1, 120)
    allowed = allowed & (jnp.arange(120) < filled)
    ours, formula = SCORES[score]

    def parts(x, count):
        # What nobody reads may be anything.
        x = x.swapaxes(1, 2).at[:, :, -(-filled // 30) * 30 :].set(jnp.nan)
        return jnp.split(x, count, axis=2)

    def attended(q, k, v, allowed, filled, count):
        return reference.attention(
            q,
            parts(k, count),
            parts(v, count),
            allowed,
            present=[filled > 30 * number for number in range(count)],
            scale=0.3,
            score=ours,
            q_index=at,
            k_index=held,
        )

    found = jax.jit(attended, static_argnums=5)(q, k, v, allowed, jnp.int32(filled), 4)
    wanted = expected(q, k, v, allowed, at, held, 0.3, formula)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_positions_default_to_the_order():
    q, k, v, allowed, *_ = a_cache(2, 70)
    score = SCORES["bias"][0]

    def attended(implementation):
        return jax.jit(
            lambda *arrays: decode.decode_attention(
                *arrays, scale=1.0, score=score, implementation=implementation
            )
        )(q, k, v, allowed)

    np.testing.assert_allclose(attended("kernel"), attended("reference"), atol=1e-5)


def test_a_cpu_keeps_the_plain_form(monkeypatch):
    q, k, v, allowed, *_ = a_cache(1, 40)
    monkeypatch.setattr(decode_kernel, "_parts", None)
    found = decode.decode_attention(q, k, v, allowed, scale=1.0)
    np.testing.assert_array_equal(found, reference.attention(q, k, v, allowed, scale=1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "quick"}, "no 'quick'; there are auto, reference, kernel"),
        ({"q": jnp.zeros((3, 1, 6, 24)), "k": (k := jnp.zeros((3, 40, 2, 24))), "v": k}, "not 24"),
        ({"q": jnp.zeros((3, 1, 6, 16), jnp.bfloat16)}, "one floating type"),
        (
            {"score": scores.from_function(lambda s, b, h, q, k: s + ON_DEVICE[k % 7])},
            "closes over",
        ),
    ],
)
def test_refuses_clearly(change, message):
    q, k, v, allowed, *_ = a_cache(1, 40)
    arguments = {"q": q, "k": k, "v": v, "allowed": allowed, "scale": 1.0}
    with pytest.raises(UserError, match=message):
        decode.decode_attention(**(arguments | {"implementation": "kernel"} | change))


def from_cache(q, k, v, allowed, at, held):
    """Keys and values as a cache holds them, heads before slots."""
    return decode.decode_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        allowed,
        scale=0.1,
        score=SCORES["alibi_and_cap"][0],
        q_index=at,
        k_index=held,
    )


def test_a_gpu_takes_the_kernel():
    q, k, v, *rest = a_cache(1, 300, dtype=jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(from_cache).trace(q, k.swapaxes(1, 2), v.swapaxes(1, 2), *rest)
        assert "@__gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
