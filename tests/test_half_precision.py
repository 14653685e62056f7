"""What norms and activations keep for the backward pass in half precision, and how blocks loop."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_tokens, small
from naive import ACTIVATIONS as NAIVE
from naive import GATES

from jaxdecoder import Decoder
from jaxdecoder.kernels.device import Device
from jaxdecoder.layers import serial
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.norms import LayerNorm, standardise


def kept(function, *arguments):
    """The arrays that differentiation keeps, as (type, shape)."""
    _, pull = jax.vjp(function, *arguments)
    return sorted((x.dtype.name, x.shape) for x in jax.tree.leaves(pull) if x.ndim)


def slope(function, x):
    """The derivative of a function of float64 numbers, by central differences."""
    return (function(x + 1e-6) - function(x - 1e-6)) / 2e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_recomputed_activations_keep_their_inputs_alone_in_half_precision(name, dtype):
    draw = np.random.default_rng(0)
    inputs = [jnp.asarray(draw.normal(size=(50, 4)), dtype) for _ in range(2)]
    inputs = inputs if ACTIVATIONS[name].gated else inputs[:1]
    if ACTIVATIONS[name].recomputed and dtype != "float32":
        assert kept(ACTIVATIONS[name], *inputs) == [(dtype, (50, 4))] * len(inputs)

    exact = [np.asarray(x, np.float64) for x in inputs]
    function = {**NAIVE, **GATES}[name]
    others = exact[1] if len(exact) > 1 else np.float64(1)
    value, pull = jax.vjp(ACTIVATIONS[name], *inputs)
    expected = [function(exact[0]) * others, slope(function, exact[0]) * others]
    expected += [function(exact[0])] if len(exact) > 1 else []
    tolerance = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-5}[dtype]
    for ours, theirs in zip((value, *pull(jnp.ones_like(value))), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs, rtol=tolerance, atol=tolerance
        )


def layer_norm(x, scale, bias, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_norm_keeps_its_input_and_two_numbers_a_row_in_half_precision(dtype):
    draw = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * draw.normal(size=(6, 32)), dtype)
    found = kept(lambda x: standardise(x, 1e-5), x)
    rows = ("float32", (6, 1))
    if dtype == "float32":
        assert found == [rows, ("float32", (6, 32))]
    else:
        assert found == [(dtype, (6, 32)), rows, rows]

    scale, bias, weights = draw.normal(size=(3, 32))

    def summed(x, params):
        out = LayerNorm(1e-5, use_bias=True).apply({"params": params}, x)
        return jnp.sum(out * weights)

    d_x, d_params = jax.grad(summed, (0, 1))(
        x, {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}
    )
    exact, theirs = np.asarray(x, np.float64), np.zeros((6, 32))
    for column in range(32):
        step = 1e-5 * np.eye(32)[column]
        higher, lower = (layer_norm(exact + s, scale, bias) @ weights for s in (step, -step))
        theirs[:, column] = (higher - lower) / 2e-5
    assert d_x.dtype == dtype
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-4
    np.testing.assert_allclose(np.asarray(d_x, np.float64), theirs, atol=tolerance, rtol=tolerance)
    d_scale = (layer_norm(exact, 1, 0) * weights).sum(0)
    np.testing.assert_allclose(d_params["scale"], d_scale, atol=1e-4, rtol=1e-4)


DEEP = small(n_layers=8, d_model=32, context_length=64)


@pytest.mark.parametrize(
    ("platform", "remat", "looped"),
    [
        ("cpu", "none", 1),
        ("gpu", "none", 1),
        ("tpu", "none", 8),
        ("cpu", "block", 8),
        ("gpu", "dots", 8),
    ],
)
def test_blocks_loop_where_it_saves_memory(monkeypatch, platform, remat, looped):
    """What one turn of a loop traces is there once, however many blocks there are."""
    monkeypatch.setattr(serial, "current_device", lambda: Device(platform, ""))
    lengths = []
    monkeypatch.setattr(
        nn,
        "scan",
        lambda *a, unroll, length, scan=nn.scan, **k: (
            lengths.append(length // unroll),
            scan(*a, unroll=unroll, length=length, **k),
        )[1],
    )
    config = dataclasses.replace(DEEP, remat=remat)
    jax.eval_shape(Decoder(config).init, jax.random.key(0), random_tokens(config, 1, 2))
    assert set(lengths) == {looped}
