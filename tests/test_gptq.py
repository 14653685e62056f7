"""GPTQ against the paper's recursion in float64, and against rounding to the nearest."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import covering_configs, name_of, random_params, random_tokens

from jaxdecoder import Decoder
from jaxdecoder.compression.calibration import sums
from jaxdecoder.compression.correction import stages
from jaxdecoder.compression.gptq import BLOCK, DAMPING, gptq, output_error
from jaxdecoder.data.batches import Batch
from jaxdecoder.kernels import packing
from jaxdecoder.kernels.packing import Scheme

HEAD = ("head", "kernel")
SCHEMES = [
    Scheme("int4", "channel"),
    Scheme("int4", "group", 8),
    Scheme("int4", "channel", symmetric=False),
    Scheme("int4", "group", 8, symmetric=False),
    Scheme("int4", "tensor"),
    Scheme("float8_e4m3fn", "channel"),
]


def calibrated(seed, d_in=24, d_out=6, tokens=200):
    """A kernel, and correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, d_in)) @ rng.normal(size=(d_in, d_in))
    kernel = rng.normal(size=(d_in, d_out))
    return jnp.asarray(kernel, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


def naive(scheme, kernel, gram):
    """Optimal brain quantization in order (arXiv 2208.11580): the inverse of what is left."""
    weights, gram = np.asarray(kernel, np.float64), np.asarray(gram, np.float64)
    d_in = len(weights)
    hessian = gram + DAMPING * np.mean(np.diag(gram)) * np.eye(d_in)
    rounded = np.zeros_like(weights)
    for i in range(d_in):
        if i == 0 or (scheme.granularity == "group" and i % scheme.group_size == 0):
            rows = slice(i, i + scheme.group_size) if scheme.granularity == "group" else slice(None)
            step, zero, lowest, largest = steps(scheme, weights[rows])
        levels = np.clip(np.round(weights[i] / step) + zero, lowest, largest)
        rounded[i] = step * (levels - zero)
        inverse = np.linalg.inv(hessian[i:, i:])
        weights[i:] -= np.outer(inverse[0] / inverse[0, 0], weights[i] - rounded[i])
    return rounded


def steps(scheme, weights):
    low, high = np.minimum(weights.min(0), 0), np.maximum(weights.max(0), 0)
    if scheme.granularity == "tensor":
        low, high = low.min(), high.max()
    if scheme.symmetric:
        return np.maximum(-low, high) / 7, 0, -7, 7
    step = (high - low) / 15
    return step, np.round(-8 - low / step), -8, 7


@pytest.mark.parametrize("scheme", SCHEMES[:-1], ids=str)
def test_it_is_the_recursion_of_the_paper(scheme):
    kernel, gram = calibrated(0)
    made = np.asarray(gptq(scheme, kernel, gram).dequantized())
    np.testing.assert_allclose(made, naive(scheme, kernel, gram), atol=1e-4)


def test_blocks_of_inputs_change_nothing_but_the_order_of_the_sums():
    scheme = Scheme("int4", "channel")
    kernel, gram = calibrated(1, d_in=2 * BLOCK, tokens=1000)
    made = gptq(scheme, kernel, gram).dequantized()
    error, expected = (
        float(output_error(kernel, jnp.asarray(q, jnp.float32), gram))
        for q in (made, naive(scheme, kernel, gram))
    )
    assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_keeps_outputs_closer_than_rounding_to_the_nearest_does(scheme):
    for seed in range(3):
        kernel, gram = calibrated(seed)
        plain = packing.quantize(scheme, kernel).dequantized()
        corrected = gptq(scheme, kernel, gram).dequantized()
        nearest = output_error(kernel, plain, gram)
        assert output_error(kernel, corrected, gram) < 0.85 * nearest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_inputs_that_say_nothing_of_one_another_leave_the_nearest(scheme):
    kernel, _ = calibrated(2)
    plain = packing.quantize(scheme, kernel).dequantized()
    for gram in (np.eye(24), np.diag(np.arange(24.0)), np.zeros((24, 24))):
        made = gptq(scheme, kernel, jnp.asarray(gram, jnp.float32)).dequantized()
        np.testing.assert_allclose(made, plain, rtol=1e-6)


def test_the_error_of_outputs_is_that_of_the_inputs_themselves():
    rng = np.random.default_rng(0)
    x, kernel, other = (rng.normal(size=s).astype(np.float32) for s in [(50, 8), (8, 3), (8, 3)])
    expected = np.sum((x @ kernel - x @ other) ** 2) / np.sum((x @ kernel) ** 2)
    x, kernel, other = map(jnp.asarray, (x, kernel, other))
    assert output_error(kernel, other, x.T @ x) == pytest.approx(expected, rel=1e-4)


# --- Inputs ---------------------------------------------------------------------------------------


def batch_of(config, rows=3, seed=0):
    tokens = random_tokens(config, rows, config.context_length, seed=seed)
    weights = np.ones(tokens.shape, np.float32)
    weights[-1, 5:] = 0.0
    return Batch(tokens, tokens, weights)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=pytest.mark.slow if number else ())
        for number, config in enumerate(covering_configs()[::4])
    ],
    ids=name_of,
)
def test_every_kernel_that_a_format_is_of_has_a_gram_matrix(config):
    config = dataclasses.replace(config, weight_format="int8")
    like = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    flat = jax.tree_util.tree_flatten_with_path(like["params"])[0]
    codes = {
        (*(entry.key for entry in path[:-1]), "kernel"): leaf.shape
        for path, leaf in flat
        if path[-1].key == "codes"
    }
    plain = dataclasses.replace(config, weight_format="float32")
    grams = jax.eval_shape(
        lambda params, batch: sums(Decoder(plain), params, batch, True),
        random_params(plain),
        batch_of(plain),
    )
    # Routers and the gate of copying are never packed.
    gate = ("copying", "gate", "kernel")
    floats = {path for path in grams if path[-2] == "router" or path == gate}
    assert set(codes) == set(grams) - floats - {HEAD}
    for path, shape in codes.items():
        assert grams[path].shape == (*shape[:-1], shape[-2])


def test_stages_follow_the_text_through_the_model():
    serial = {
        ("body", "blocks", f"block_{k}", "attention", "query", "kernel"): jnp.zeros((2, 4, 4))
        for k in range(2)
    } | {HEAD: jnp.zeros((4, 4)), ("copying", "query", "kernel"): jnp.zeros((4, 4))}
    order = [{(path[2:3], layer) for path, layer in stage} for stage in stages(serial)]
    assert order == [
        {(("block_0",), 0)},
        {(("block_1",), 0)},
        {(("block_0",), 1)},
        {(("block_1",), 1)},
        {(("kernel",), 0)},  # of copying
        {((), 0)},
    ]
    stacks = {
        ("body", f"stack_{i}", *rest): jnp.zeros((*layers, 4, 4))
        for i in range(2)
        for rest, layers in [(("blocks", "block_0", "skip"), (3,)), (("feed_forward", "up"), ())]
    }
    sizes = [(stage[0][0][1], stage[0][0][2], len(stage)) for stage in stages(stacks)]
    assert sizes == [
        ("stack_0", "blocks", 3),
        ("stack_0", "feed_forward", 1),
        ("stack_1", "blocks", 3),
        ("stack_1", "feed_forward", 1),
    ]
