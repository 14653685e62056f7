"""The product with packed kernels: one result, whichever way it is computed."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecoder.kernels import packing, quantized
from jaxdecoder.kernels.packing import FORMATS
from jaxdecoder.kernels.quantized import FEW_ROWS, packed_product, rounded
from tests.test_packing import GROUP, SCHEMES, every_scheme, few_of, name_of

INTEGER = [scheme for scheme in SCHEMES if FORMATS[scheme.format].integer]
every_integer_scheme = pytest.mark.parametrize("scheme", few_of(INTEGER), ids=name_of)

D_IN, D_OUT = 8 * GROUP, 20


def problem(scheme, *rows):
    """Inputs of so many rows each, and a packed kernel."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(1, n, D_IN)).astype(np.float32) for n in rows]
    for x in inputs:
        x[..., 0] = 0.0
    return inputs, packing.quantize(scheme, rng.normal(size=(D_IN, D_OUT)).astype(np.float32))


@partial(jax.jit, static_argnames="activations")
def products(inputs, packed, activations="float"):
    """Of all inputs, in one program."""
    return [packed_product(x, packed, activations=activations) for x in inputs]


@every_scheme
def test_it_is_that_of_the_kernel_the_codes_stand_for(scheme):
    inputs, packed = problem(scheme, 1, FEW_ROWS, FEW_ROWS + 1)
    found = products(inputs, packed)
    kernel = np.asarray(packed.dequantized(), np.float64)
    for x, out in zip(inputs, found, strict=True):
        expected = x.astype(np.float64) @ kernel
        assert out.shape == (*x.shape[:2], D_OUT)
        np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


@every_integer_scheme
def test_with_activations_of_8_bits_it_is_that_of_the_rounded_rows(scheme):
    inputs, packed = problem(scheme, 1, FEW_ROWS + 1)
    found = products(inputs, packed, activations="int8")
    kernel = np.asarray(packed.dequantized(), np.float64)
    for x, out in zip(inputs, found, strict=True):
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127
        integers = np.round(x / scale)
        assert set(np.abs(integers).max(axis=-1).ravel()) == {127}
        expected = (scale * integers) @ kernel
        np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())
        # It is not that of the rows as they came.
        assert not np.allclose(out, x @ kernel, atol=1e-4 * np.abs(expected).max())


@every_integer_scheme
def test_sums_of_the_largest_products_do_not_overflow(scheme):
    kernel = np.full((D_IN, D_OUT), -1.0, np.float32)
    kernel[0] = 0.5
    packed = packing.quantize(scheme, kernel)
    x = np.full((1, D_IN), -3.0, np.float32)
    expected = x.astype(np.float64) @ np.asarray(packed.dequantized(), np.float64)
    np.testing.assert_allclose(jax.jit(quantized.by_integers)(x, packed), expected, rtol=1e-5)


def test_rounding_of_activations_is_off_by_half_a_step_and_has_the_gradient_of_none():
    x = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    x[3] = 0.0
    error = np.abs(rounded(jnp.asarray(x)) - x)
    assert (error <= np.abs(x).max(axis=1, keepdims=True) / 254 * (1 + 1e-4)).all()
    gradient = jax.grad(lambda x: jnp.sum(rounded(x) * x.shape[1]))(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, np.full_like(x, 50))


def test_results_have_the_type_of_the_activations_or_the_preferred_one():
    (x,), packed = problem(SCHEMES[0], 1)
    x = jnp.asarray(x, jnp.bfloat16)
    assert packed_product(x, packed).dtype == jnp.bfloat16
    assert packed_product(x, packed, preferred_element_type=jnp.float32).dtype == jnp.float32


@every_scheme
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_loop_of_decoding_holds_no_floats_of_the_kernel(scheme, activations):
    """XLA may move what does not change out of a loop; the unpacked kernel it may not."""
    if activations == "int8" and not FORMATS[scheme.format].integer:
        pytest.skip("whole numbers only")
    width = 48 * GROUP
    kernel = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    packed = packing.quantize(scheme, kernel)

    def steps(x, packed, count):
        def body(i, x):
            return jnp.tanh(packed_product(x, packed, activations=activations))

        return jax.lax.fori_loop(0, count, body, x)

    compiled = jax.jit(steps).lower(jnp.ones((1, width)), packed, 5).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kernel.nbytes / 2
