"""Divergences of next tokens, against 64-bit NumPy and SciPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax

from jaxdecoder.compression.divergences import DIVERGENCES, at_once, over_time, soften

DRAW = np.random.default_rng(0)
STUDENT, TEACHER = map(jnp.asarray, DRAW.normal(size=(2, 3, 5, 17), scale=3.0).astype(np.float32))


def expected(name, student, teacher, temperature, beta):
    """From SciPy's relative entropies of 64-bit probabilities."""
    q, p = (softmax(np.asarray(x, np.float64) / temperature, axis=-1) for x in (student, teacher))
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": rel_entr(p, q).sum(-1),
        "reverse_kl": rel_entr(q, p).sum(-1),
        "jensen_shannon": beta * rel_entr(p, mixture).sum(-1)
        + (1 - beta) * rel_entr(q, mixture).sum(-1),
    }[name]


@partial(jax.jit, static_argnums=(0, 3, 4))
def apart(name, student, teacher, temperature=1.0, beta=0.5):
    return DIVERGENCES[name](soften(student, temperature), soften(teacher, temperature), beta)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.0, 0.1), (0.5, 0.9)])
def test_each_is_what_scipy_says(name, temperature, beta):
    found = apart(name, STUDENT, TEACHER, temperature, beta)
    assert found.dtype == jnp.float32
    assert found.shape == STUDENT.shape[:-1]
    np.testing.assert_allclose(
        found, expected(name, STUDENT, TEACHER, temperature, beta), rtol=2e-5, atol=1e-6
    )


def test_the_even_jensen_shannon_is_the_square_of_scipys_distance():
    q, p = (
        softmax(np.asarray(STUDENT, np.float64), -1),
        softmax(np.asarray(TEACHER, np.float64), -1),
    )
    distance = jensenshannon(p, q, axis=-1)
    np.testing.assert_allclose(apart("jensen_shannon", STUDENT, TEACHER), distance**2, rtol=2e-5)


def test_at_its_ends_jensen_shannon_tends_to_the_two_kls():
    near = 1e-5
    forward = apart("jensen_shannon", STUDENT, TEACHER, 1.0, near) / near
    reverse = apart("jensen_shannon", STUDENT, TEACHER, 1.0, 1 - near) / near
    np.testing.assert_allclose(forward, apart("forward_kl", STUDENT, TEACHER), rtol=0.1)
    np.testing.assert_allclose(reverse, apart("reverse_kl", STUDENT, TEACHER), rtol=0.1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_are_not_apart_and_others_are(name):
    shifted = STUDENT + 7.0  # the same probabilities
    np.testing.assert_allclose(apart(name, STUDENT, shifted), 0.0, atol=1e-5)
    assert (apart(name, STUDENT, TEACHER) > 1e-3).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_finite_where_probabilities_are_none(name):
    student = jnp.asarray([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    teacher = jnp.asarray([[-1e4, 0.0, 1e4], [1e4, -1e4, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: apart(name, x, teacher).sum())(student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_the_gradient_of_the_forward_kl_is_the_difference_of_probabilities():
    temperature = 3.0
    gradient = jax.grad(lambda x: apart("forward_kl", x, TEACHER, temperature).sum())(STUDENT)
    q, p = (softmax(np.asarray(x, np.float64) / temperature, -1) for x in (STUDENT, TEACHER))
    np.testing.assert_allclose(gradient, (q - p) / temperature, atol=1e-6)


def test_softened_logits_are_log_probabilities():
    np.testing.assert_allclose(
        soften(STUDENT, 2.0), log_softmax(np.asarray(STUDENT, np.float64) / 2, -1), rtol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
def test_chunks_of_the_time_change_neither_values_nor_gradients(chunk):
    kernel = DRAW.normal(size=(17, 4)).astype(np.float32)

    @partial(jax.jit, static_argnums=1)
    def loss_and_gradient(kernel, chunk):
        def loss(kernel):
            def part(arrays):
                student, teacher = (x @ kernel for x in arrays)
                return apart("forward_kl", student, teacher)

            losses = over_time(part, (STUDENT, TEACHER), chunk)
            return losses.sum(), losses

        return jax.grad(loss, has_aux=True)(kernel)

    (gradient, losses), (expected, whole) = (loss_and_gradient(kernel, n) for n in (chunk, 100))
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_large_vocabulary_is_taken_in_pieces():
    assert at_once(8, 110_000, "cpu") == 4
    assert at_once(512, 110_000, "cpu") == 1
    assert at_once(8, 1024, "cpu") >= 256
    shapes = [jax.ShapeDtypeStruct((8, 64, width), jnp.float32) for width in (16, 32)]

    def loss(kernel, arrays):
        def part(arrays):
            student, teacher = arrays
            return apart("forward_kl", student @ kernel, teacher @ jnp.ones((32, 110_000)))

        return over_time(part, arrays, at_once(8, 110_000, "cpu")).sum()

    kernel = jax.ShapeDtypeStruct((16, 110_000), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(kernel, tuple(shapes)).compile()
    whole = 8 * 64 * 110_000 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
