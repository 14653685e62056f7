"""Quantized runs: packed at rest, in memory and while decoding, and like any other run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from models import (
    covering_configs,
    logits_of,
    name_of,
    random_params,
    random_tokens,
    small,
)
from models import shapes as shapes_of

from jaxdecoder import Decoder, analysis
from jaxdecoder.compression import quantization
from jaxdecoder.compression.options import Dequantize, Quantize
from jaxdecoder.compression.passes import corpus_of, loss_of
from jaxdecoder.compression.quantization import dequantize, nearest, pack, quantize, unpack
from jaxdecoder.config import Config, ConfigError, ModelConfig, TrainConfig, load
from jaxdecoder.decoding import empty_cache, prepare
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import packing
from jaxdecoder.layers.linear import scheme_of
from jaxdecoder.training.runs import load_model, read_config
from tests.runs import here

FLOATS = ("kernel", "embedding")


@pytest.fixture(scope="module", autouse=True)
def _without_samples():
    """Samples take most of a pass's time to compile; the scripts' test has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "show_sample", lambda config, params, tokenizer: "a sample")
        yield


@pytest.fixture(scope="module")
def int8(tiny_run, tmp_path_factory):
    """A run with its weights in int8, the head's too."""
    out = tmp_path_factory.mktemp("codes") / "int8"
    said = here("compress.py", "quantize", tiny_run, out, "--include-head")
    assert said.returncode == 0, said.output
    assert "validation loss:" in said.output
    return out, json.loads((out / "summary.json").read_text())


def options(source, out, **changes):
    return Quantize(str(source), str(out), **changes)


def packed(config, params):
    """The packed parameters of a packed config, from float ones."""
    whole = Config(model=config, train=TrainConfig(steps=0))
    return pack(params, whole, nearest(scheme_of(config)))


def unpacked(config, params):
    plain = replace(config, weight_format="float32", activation_format="float")
    return plain, unpack(params, Config(model=plain))


# --- Models ---------------------------------------------------------------------------------------

INT4 = {"weight_format": "int4", "weight_granularity": "group", "weight_group_size": 4}
ASYMMETRIC = {"weight_format": "int8", "weight_symmetric": False, "weight_head": True}
FLOAT8 = {"weight_format": "float8_e4m3fn", "weight_granularity": "tensor", "weight_head": True}
MODELS = [
    small(**INT4, weight_head=True, tie_embeddings=True, n_kv_heads=2, activation="swiglu"),
    small(**ASYMMETRIC, layout="parallel_stacks", n_layers=4, head_bias=True),
    small(**FLOAT8, attention=("linformer", "linear"), attention_block=4, attention_rank=2),
    small(**INT4, depth="mixture_of_depths", position="rope", qkv_bias=True),
    small(**ASYMMETRIC, depth="early_exit", norm="none", tie_embeddings=True),
    small(**ASYMMETRIC, convolution_width=3, copying=True, tie_embeddings=True, n_layers=1),
]


def and_slowly(fast, slow):
    """Configs for every run of the tests, and others for the long one."""
    return [*fast, *(pytest.param(config, marks=pytest.mark.slow) for config in slow)]


@pytest.mark.parametrize("config", and_slowly(MODELS[5:], MODELS[:5]), ids=name_of)
def test_a_packed_model_is_the_float_one_of_its_rounded_weights(config):
    config = config.resolve()
    plain = replace(config, weight_format="float32")
    params = packed(config, random_params(plain))
    floats, whole = unpacked(config, params)
    tokens = random_tokens(config, 2, 8)
    expected = logits_of(Decoder(floats), whole, tokens)
    # They are rounded: the model of the weights as they were is another.
    assert not np.allclose(
        expected, logits_of(Decoder(plain), random_params(plain), tokens), atol=1e-3
    )
    np.testing.assert_allclose(logits_of(Decoder(config), params, tokens), expected, atol=1e-4)
    one_by_one = decoded(Decoder(config), params, tokens)
    np.testing.assert_allclose(one_by_one, expected, atol=2e-4)


def decoded(decoder, params, tokens):
    """The logits of decoding token by token."""
    session = prepare(decoder, params)
    extend = jax.jit(lambda session, tokens, cache: session.extend(tokens, cache))
    cache, logits = empty_cache(decoder.config, len(tokens)), []
    for t in range(tokens.shape[1]):
        out, cache, _ = extend(session, tokens[:, t : t + 1], cache)
        logits.append(out)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("config", and_slowly(MODELS[:1], MODELS[1:2]), ids=name_of)
def test_a_model_that_rounds_its_weights_is_the_packed_one_and_has_their_gradients(config):
    config = config.resolve()
    rounding = replace(config, weight_packed=False)
    params = random_params(replace(config, weight_format="float32"))
    tokens = random_tokens(config, 2, 8)
    np.testing.assert_allclose(
        logits_of(Decoder(rounding), params, tokens),
        logits_of(Decoder(config), packed(config, params), tokens),
        atol=1e-4,
    )

    # Straight through: those of the float model whose weights are the rounded ones.
    floats, whole = unpacked(config, packed(config, params))
    expected = gradients_of(Decoder(floats), whole, tokens)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
        gradients_of(Decoder(rounding), params, tokens),
        expected,
    )


@partial(jax.jit, static_argnums=0)
def gradients_of(decoder, params, tokens):
    def loss(params):
        losses = decoder.apply({"params": params}, tokens, tokens, dropout=0.0, method="losses")
        return jnp.sum(losses)

    return jax.grad(loss)(params)


def test_activations_of_8_bits_change_the_model_a_little():
    config = small(weight_format="int8").resolve()
    params = packed(config, random_params(replace(config, weight_format="float32")))
    tokens = random_tokens(config, 2, 8)
    dynamic = Decoder(replace(config, activation_format="int8"))
    plain, rounded = (logits_of(d, params, tokens) for d in (Decoder(config), dynamic))
    difference = np.abs(plain - rounded).max() / np.abs(plain).max()
    assert 1e-4 < difference < 0.1
    np.testing.assert_allclose(decoded(dynamic, params, tokens), rounded, atol=0.05)


COVERING = [dataclasses.replace(c, **ASYMMETRIC) for c in covering_configs()[::3]]


@pytest.mark.parametrize("config", and_slowly(MODELS, COVERING), ids=name_of)
def test_the_bytes_are_those_counted_in_closed_form(config):
    size = packing.size(shapes_of(config), nonzero=False)
    assert analysis.weight_bytes(config) == size.bytes
    assert analysis.parameters(config)["total"] == size.parameters


def test_packed_models_hold_no_float_kernel():
    leaves = jax.tree_util.tree_flatten_with_path(shapes_of(MODELS[0]))[0]
    assert not [
        path for path, _ in leaves if path[-1].key in FLOATS and "positions" not in str(path)
    ]


# --- Runs -----------------------------------------------------------------------------------------


def test_int8_is_a_quarter_of_the_bytes_and_nearly_as_good(tiny_run, int8):
    before = json.loads((tiny_run / "summary.json").read_text())
    out, summary = int8
    assert abs(summary["validation_loss"] - before["validation_loss"]) < 0.01
    told = summary["compression"]
    assert told["before"]["parameters"] == told["at_once"]["parameters"] == summary["parameters"]
    ratio = told["at_once"]["bytes"] / told["before"]["bytes"]
    config = read_config(out)
    assert told["at_once"]["bytes"] == analysis.weight_bytes(config.model)
    assert 0.25 < ratio < 0.45  # norms, biases and scales are a part of so small a model
    assert config.model.packed
    # At rest as well: there is no float copy of the weights, nor moments of them.
    items = [ocp.PyTreeCheckpointer().metadata(out / "checkpoints" / "0" / "params")]
    items += [ocp.PyTreeCheckpointer().metadata(out / "checkpoints" / "0" / "optimizer")]
    held, count = (
        sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(item.item_metadata.tree))
        for item in items
    )
    assert (held, count) == (told["at_once"]["bytes"], 4)
    codes = load_model(out).params["body"]["blocks"]["block_0"]["attention"]["query"]["codes"]
    assert codes.dtype == jnp.int8


@pytest.mark.slow
def test_gptq_keeps_the_logits_closer_than_rounding_does(tiny_run, tmp_path):
    kind = {"bits": 4, "granularity": "tensor", "method": "gptq", "calibration_tokens": 2000}
    out = tmp_path / "gptq"
    told = quantize(options(tiny_run, out, **kind), "python compress.py")["compression"]
    assert told["output_error"] < 0.9 * told["output_error_nearest"]
    assert told["calibration_tokens"] > 64
    plain, made = load_model(tiny_run), load_model(out)
    _, corpus = corpus_of(plain, tiny_run)
    tokens = np.asarray(corpus.validation.tokens[:400], np.int32).reshape(25, 16)
    rounded = pack(plain.params, made.config, nearest(scheme_of(made.config.model)))
    expected = logits_of(plain.decoder, plain.params, tokens)
    errors = [
        float(np.mean(np.square(logits_of(made.decoder, params, tokens) - expected)))
        for params in (rounded, made.params)
    ]
    assert 0 < errors[1] < 0.9 * errors[0]


@pytest.mark.slow
def test_fine_tuning_goes_through_the_rounding_and_is_packed_as_it_was_trained(
    tiny_run, tmp_path, monkeypatch
):
    out = tmp_path / "tuned"
    kind = {"bits": 4, "granularity": "tensor", "fine_tune_steps": 16}
    asked = options(tiny_run, out, learning_rate=3e-3, **kind)
    pack_it = quantization._packed

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization, "_packed", stops)
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, "python compress.py")
    monkeypatch.setattr(quantization, "_packed", pack_it)
    trained = tmp_path / "tuned_fine_tuned" / "checkpoints"
    times = {path: path.stat().st_mtime for path in trained.glob("*/params/*")}
    summary = quantize(asked, "python compress.py")
    # What was trained before the stop was not trained again.
    assert times == {path: path.stat().st_mtime for path in trained.glob("*/params/*")}
    tuned = load_model(tmp_path / "tuned_fine_tuned")
    assert tuned.params["body"]["blocks"]["block_0"]["attention"]["query"]["kernel"].size
    config, corpus = corpus_of(tuned, tmp_path / "tuned_fine_tuned")
    assert summary["validation_loss"] == pytest.approx(
        loss_of(config, corpus, tuned.params), abs=1e-5
    )
    rounded = json.loads((tmp_path / "tuned_fine_tuned" / "compression.json").read_text())
    assert summary["validation_loss"] < rounded["at_once"]["validation_loss"] - 0.01
    assert read_config(out).compression.recipe[-1] == "python compress.py"


def test_floats_made_of_a_quantized_run_are_the_same_model_and_may_train(tiny_run, int8, tmp_path):
    codes, quantized = int8
    floats = tmp_path / "floats"
    summary = dequantize(Dequantize(str(codes), str(floats)), "second")
    assert summary["validation_loss"] == pytest.approx(quantized["validation_loss"], abs=1e-5)
    config = read_config(floats)
    assert config.model == read_config(tiny_run).model
    assert config.compression.recipe == (*read_config(codes).compression.recipe, "second")
    assert load(floats / "config.toml", ["--train.steps", "5"]).train.steps == 5


# --- Refused --------------------------------------------------------------------------------------


def test_what_is_packed_is_not_quantized_again_and_does_not_train(tiny_run, int8, tmp_path):
    once, _ = int8
    with pytest.raises(UserError, match=r"quantized already, to int8.*dequantize"):
        quantize(options(once, tmp_path / "twice"), "second")
    with pytest.raises(UserError, match=r"train\.steps = 5: the codes .* do not train"):
        load(once / "config.toml", ["--train.steps", "5"])
    with pytest.raises(UserError, match="floats already"):
        dequantize(Dequantize(str(tiny_run), str(tmp_path / "floats")), "second")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"granularity": "group", "group_size": 10}, r"group_size = 10: does not divide .*4 or 8"),
        ({"granularity": "group", "group_size": 3, "bits": 4}, r"must be even; 2 or 4"),
        ({"bits": 4, "format": "float8_e4m3fn"}, "has 8 bits"),
        ({"format": "float8_e5m2", "symmetric": False}, "no zero point"),
        ({"format": "float8_e5m2", "activations": 8}, "whole numbers"),
        ({"method": "gptq", "fine_tune_steps": 5}, "not both"),
        ({"method": "gptq", "calibration_tokens": 0}, "must be between 1 and"),
        ({"method": "gptq", "calibration_tokens": 10**9}, "must be between 1 and"),
        ({"fine_tune_steps": -1}, "at least 0"),
        ({"learning_rate": 0.0}, "above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny_run, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        quantize(options(tiny_run, tmp_path / "new", **changes), "python compress.py")
    assert not (tmp_path / "new").exists()


def test_odd_widths_have_no_pairs():
    with pytest.raises(ConfigError, match="d_ff = 63 is odd"):
        ModelConfig(d_model=16, n_heads=2, d_ff=63, weight_format="int4")


# --- Scripts --------------------------------------------------------------------------------------


def test_the_run_talks_in_half_precision_too(int8):
    arguments = ("--prompt", "one", "--max-new-tokens", "8", "--dtype", "bfloat16")
    said = here("sample.py", int8[0], *arguments)
    assert said.returncode == 0, said.output
    assert said.output.startswith("one")
