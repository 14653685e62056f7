"""A score function is its formula, with its gradients, in plain JAX and inside a kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from jaxdecoder.errors import UserError
from jaxdecoder.kernels import scores

BATCH, HEADS, Q_TIME, K_TIME = 2, 3, 7, 9
RANDOM = np.random.default_rng(0)
SCORES = RANDOM.normal(size=(BATCH, HEADS, Q_TIME, K_TIME)) * 4
SLOPES = np.array([0.5, 0.25, 0.1])
TABLE = RANDOM.normal(size=(HEADS, 6))
Q_OFFSET = 11

# Where the naive formulas are written out: (score, batch, head, q, k) -> score, in float64.
CASES = {
    "alibi": (
        scores.alibi(SLOPES.astype(np.float32)),
        lambda s, b, h, q, k: s - SLOPES[h] * abs(q - k),
    ),
    "soft_cap": (scores.soft_cap(3.0), lambda s, b, h, q, k: 3.0 * math.tanh(s / 3.0)),
    "clipped_distance": (
        scores.relative_bias(TABLE.astype(np.float32)),
        lambda s, b, h, q, k: s + TABLE[h, min(max(q - k, 0), 5)],
    ),
    "t5_buckets": (
        scores.relative_bias(TABLE.astype(np.float32), max_distance=10),
        lambda s, b, h, q, k: s + TABLE[h, published_bucket(k - q, 6, 10)],
    ),
    "alibi_then_soft_cap": (
        scores.compose(scores.alibi(SLOPES.astype(np.float32)), scores.soft_cap(2.0)),
        lambda s, b, h, q, k: 2.0 * math.tanh((s - SLOPES[h] * abs(q - k)) / 2.0),
    ),
    "a_function": (
        scores.from_function(lambda s, b, h, q, k: jnp.where(q == k, s * h, s + b)),
        lambda s, b, h, q, k: s * h if q == k else s + b,
    ),
    "a_function_with_operands": (
        scores.from_function(
            lambda s, b, h, q, k, slope, row: s * slope + row[0] * row[5],
            SLOPES.astype(np.float32),
            TABLE.astype(np.float32),
            learned=(False, True),
        ),
        lambda s, b, h, q, k: s * SLOPES[h] + TABLE[h, 0] * TABLE[h, 5],
    ),
}
every_case = pytest.mark.parametrize(("score", "formula"), CASES.values(), ids=CASES.keys())


def published_bucket(relative_position, n_buckets, max_distance):
    """The causal rule of arXiv 1910.10683, one position at a time."""
    distance = max(-relative_position, 0)
    exact = n_buckets // 2
    if distance < exact:
        return distance
    growth = math.log(distance / exact) / math.log(max_distance / exact)
    # The tolerance stands for rounding where the logarithms' ratio is a whole number.
    return min(exact + int(growth * (n_buckets - exact) + 1e-9), n_buckets - 1)


def everywhere(score, operands, array):
    batch, head, q, k = (
        jax.lax.broadcasted_iota(jnp.int32, array.shape, axis) for axis in range(4)
    )
    return score.apply(operands, array, batch[:, :1, :1, :1], head[:1, :, :1, :1], q + Q_OFFSET, k)


@every_case
def test_is_its_formula(score, formula):
    out = jax.jit(everywhere)(score, score.operands, np.float32(SCORES))
    expected = np.empty_like(SCORES)
    for b, h, q, k in np.ndindex(*SCORES.shape):
        expected[b, h, q, k] = formula(SCORES[b, h, q, k], b, h, q + Q_OFFSET, k)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)


def in_a_kernel(score, array, cotangent):
    """The score and its gradients, tile by tile, with the operands as inputs of the kernel."""
    operands = score.operands
    tile = pl.BlockSpec((None, None, Q_TIME, K_TIME), lambda b, h: (b, h, 0, 0))
    rows = [pl.BlockSpec((1, 1, max(1, *x.shape[1:], 1)), lambda b, h: (b, h, 0)) for x in operands]

    def kernel(s, ct, *refs):
        inputs, (out, ds, *grads) = refs[: len(operands)], refs[len(operands) :]
        batch, head = pl.program_id(0), pl.program_id(1)
        q, k = (jax.lax.broadcasted_iota(jnp.int32, (Q_TIME, K_TIME), axis) for axis in (0, 1))
        parameters = score.parameters(inputs, head)
        value, pull = jax.vjp(
            lambda s, *p: score.function(s, batch, head, q + Q_OFFSET, k, *p), s[...], *parameters
        )
        out[...] = value
        ds[...], *numbers = pull(ct[...])
        for grad, number in zip(grads, numbers, strict=True):
            for i, x in enumerate(number if isinstance(number, tuple) else (number,)):
                grad[0, 0, i] = x

    whole = [
        pl.BlockSpec(x.shape, functools.partial(lambda n, b, h: (0,) * n, x.ndim)) for x in operands
    ]
    shapes = [jax.ShapeDtypeStruct(array.shape, jnp.float32)] * 2 + [
        jax.ShapeDtypeStruct((BATCH, HEADS, spec.block_shape[-1]), jnp.float32) for spec in rows
    ]
    out, ds, *partial = pl.pallas_call(
        kernel,
        grid=(BATCH, HEADS),
        in_specs=[tile, tile, *whole],
        out_specs=[tile, tile, *rows],
        out_shape=shapes,
        interpret=True,
    )(array, cotangent, *operands)
    grads = tuple(x.sum(0).reshape(o.shape) for x, o in zip(partial, operands, strict=True))
    return out, ds, grads


@every_case
def test_agrees_with_itself_inside_a_kernel_gradients_too(score, formula):
    array, cotangent = np.float32(SCORES), np.float32(RANDOM.normal(size=SCORES.shape))

    @jax.jit
    def both():
        out, pull = jax.vjp(functools.partial(everywhere, score), score.operands, array)
        return in_a_kernel(score, array, cotangent), (out, *pull(cotangent))

    (out, ds, grads), (expected, expected_grads, expected_ds) = both()
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ds, expected_ds, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_distance", [None, 10])
def test_the_tables_gradient_is_that_of_a_lookup(max_distance):
    table, weights = jnp.float32(TABLE), jnp.float32(RANDOM.normal(size=SCORES.shape))
    q, k = np.arange(Q_TIME)[:, None] + Q_OFFSET, np.arange(K_TIME)
    column = (
        np.clip(q - k, 0, 5)
        if max_distance is None
        else np.vectorize(lambda d: published_bucket(d, 6, max_distance))(k - q)
    )

    def ours(table):
        score = scores.relative_bias(table, max_distance)
        return jnp.sum(weights * jnp.tanh(everywhere(score, score.operands, jnp.float32(SCORES))))

    def lookup(table):
        return jnp.sum(weights * jnp.tanh(jnp.float32(SCORES) + table[:, column][None]))

    found, wanted = jax.jit(lambda table: (jax.grad(ours)(table), jax.grad(lookup)(table)))(table)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_gradient_passes_through_a_score_as_a_pytree():
    score = scores.compose(
        scores.relative_bias(jnp.float32(TABLE)), scores.alibi(jnp.float32(SLOPES), learned=True)
    )
    grads = jax.jit(jax.grad(lambda s: jnp.sum(s(1.0, 0, 1, jnp.arange(9), 3))))(score)
    assert isinstance(grads, scores.Score)
    assert grads.operands[0][1].sum() == 9  # one for each query, all in the row of head 1
    assert grads.operands[1].tolist() == [0, -sum(abs(q - 3) for q in range(9)), 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 64), st.integers(1, 300), st.integers(-400, 400))
def test_t5_buckets_follow_the_published_rule(n_buckets, beyond, relative_position):
    max_distance = n_buckets // 2 + beyond
    bucket = scores.t5_bucket(relative_position, n_buckets, max_distance)
    assert int(bucket) == published_bucket(relative_position, n_buckets, max_distance)


def test_the_usual_t5_buckets():
    relative_position = -np.array([-5, 0, 1, 15, 16, 18, 19, 20, 21, 112, 113, 127, 128, 10_000])
    expected = [0, 0, 1, 15, 16, 16, 17, 17, 18, 30, 31, 31, 31, 31]
    assert scores.t5_bucket(relative_position).tolist() == expected


@pytest.mark.parametrize(
    ("n_heads", "published"),
    [
        (1, [2**-8]),
        (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (
            12,
            [*(2.0**-n for n in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
        ),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_alibi_slopes_are_the_published_ones(n_heads, published):
    np.testing.assert_allclose(scores.alibi_slopes(n_heads), published, rtol=1e-7)


def test_scores_without_operands_are_values():
    assert scores.soft_cap(30) == scores.soft_cap(30.0)
    assert hash(scores.soft_cap(30)) == hash(scores.soft_cap(30.0))
    assert scores.soft_cap(30) != scores.soft_cap(20)
    twice = scores.compose(scores.soft_cap(30), scores.soft_cap(20))
    assert twice == scores.compose(scores.soft_cap(30), scores.soft_cap(20))
    assert twice != scores.compose(scores.soft_cap(20), scores.soft_cap(30))


def test_equal_scores_compile_once():
    traces = []

    @jax.jit
    def apply(score, x):
        traces.append(score)
        return score(x, 0, 1, 4, 2)

    for slopes in (SLOPES, 2 * SLOPES):
        score = scores.compose(scores.alibi(np.float32(slopes)), scores.soft_cap(5.0))
        expected = 5 * np.tanh((1 - slopes[1] * 2) / 5)
        np.testing.assert_allclose(apply(score, 1.0), expected, rtol=1e-6)
    assert len(traces) == 1


def test_a_score_says_which_operands_are_learned():
    alibi = scores.alibi(scores.alibi_slopes(4))
    assert alibi.learned == (False,)
    assert scores.compose(alibi, scores.relative_bias(TABLE)).learned == (False, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scores.soft_cap(0), "cap must be greater than 0"),
        (lambda: scores.alibi_slopes(0), "n_heads must be at least 1"),
        (
            lambda: scores.from_function(lambda s, *_: s, np.ones((3, 2, 2))),
            r"must be an array \(heads,\) or \(heads, n\), not of shape \(3, 2, 2\)",
        ),
        (lambda: scores.relative_bias(TABLE, max_distance=3), "max_distance greater than half"),
        (lambda: scores.from_function(lambda s, b, h, q: s), "raised TypeError"),
        (lambda: scores.from_function(lambda s, b, h, q, k: s.sum()), "for scores"),
        (lambda: scores.from_function(lambda s, b, h, q, k: s > 0), "keeps the shape"),
        (
            lambda: scores.from_function(lambda s, *_: s, SLOPES, learned=(True, False)),
            "learned has 2 entries for 1 operands",
        ),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
