"""The online softmax is the softmax, however the scores are cut; sizes round up to whole blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecoder.kernels import online
from jaxdecoder.kernels.padding import padded, round_up

SCORES = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32) * 9
VALUES = np.random.default_rng(1).standard_normal((12, 5)).astype(np.float32)


def attended(scores, cuts, **options):
    """Weighted values and the logarithm of the sum, from scores in pieces."""
    rows = jnp.zeros(len(scores))
    sums, mixed = online.Sums(rows - jnp.inf, rows), jnp.zeros((len(scores), 5))
    for piece, values in zip(np.split(scores, cuts, 1), np.split(VALUES, cuts), strict=True):
        sums, weights, shrink = online.add(sums, jnp.asarray(piece), **options)
        mixed = mixed * online.spread(shrink, mixed.shape) + weights @ values
    divisor, logsumexp = online.finish(sums, options.get("base", online.E))
    return mixed / divisor[:, None], logsumexp


@pytest.mark.parametrize("cuts", [[], [1], [4, 8], list(range(1, 12))], ids=len)
@pytest.mark.parametrize("may_be_empty", [False, True])
def test_pieces_of_any_size_give_the_softmax(cuts, may_be_empty):
    out, logsumexp = attended(SCORES, cuts, may_be_empty=may_be_empty)
    np.testing.assert_allclose(out, jax.nn.softmax(SCORES) @ VALUES, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logsumexp, jax.nn.logsumexp(SCORES, axis=1), rtol=1e-6)


def test_rows_and_pieces_without_scores_are_no_nan():
    scores = SCORES.copy()
    scores[0] = scores[1, :4] = scores[2, 8:] = -np.inf
    out, logsumexp = attended(scores, [4, 8])
    np.testing.assert_array_equal(out[0], np.zeros(5))
    assert logsumexp[0] == -np.inf
    np.testing.assert_allclose(out[1:], jax.nn.softmax(scores[1:]) @ VALUES, rtol=1e-5, atol=1e-6)


def test_scores_to_base_two_are_those_times_a_factor():
    out, logsumexp = attended(SCORES, [4], base=online.TWO, factor=float(np.log2(np.e)))
    np.testing.assert_allclose(out, jax.nn.softmax(SCORES) @ VALUES, rtol=1e-5, atol=1e-6)
    natural = jax.nn.logsumexp(SCORES, axis=1)
    np.testing.assert_allclose(logsumexp * np.log(2), natural, rtol=1e-6)


@pytest.mark.parametrize(("n", "multiple", "whole"), [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16)])
def test_a_size_is_rounded_up_to_whole_blocks(n, multiple, whole):
    assert round_up(n, multiple) == whole


def test_an_axis_is_padded_at_its_end():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(padded(x, 1, 4, 7), [[1, 1, 1, 7]] * 2)
    np.testing.assert_array_equal(padded(x, -2, 3), [[1] * 3, [1] * 3, [0] * 3])
    assert padded(x, 0, 2) is x
