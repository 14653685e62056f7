"""Whatever a config combines, the decoder trains, is causal, decodes with its cache, and costs what
is counted."""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import any_config, random_params, random_tokens, shapes
from test_analysis import not_learned, products, sums
from test_decoder import assert_close, decode

from jaxdecoder import Decoder, analysis
from jaxdecoder.layers.masked import MASKED

BATCH = 2


# A smaller example would cost minutes and tell no more: the drawn fields are printed.
PHASES = (Phase.explicit, Phase.generate)


@settings(max_examples=2, phases=PHASES)
@given(st.data())
def test_any_config_does_what_every_config_should(data):
    check(any_config(data.draw, turns=1))


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("JAXDECODER_EXAMPLES", "12")), phases=PHASES)
@given(st.data())
def test_very_many_configs_do(data):
    check(any_config(data.draw))


def check(config):
    decoder, params = Decoder(config), random_params(config)
    tokens = random_tokens(config, BATCH, config.context_length)
    loss, gradients, logits = train(decoder, params, tokens)
    assert np.isfinite(loss)
    assert np.isfinite(logits).all()
    has_gradients(config, gradients, tokens)
    is_causal(config, lambda tokens: train(decoder, params, tokens)[2], tokens, logits)
    start = jnp.zeros(BATCH, jnp.int32)
    assert_close(decode(decoder, params, tokens, start, (config.context_length // 2,)), logits)
    costs_what_is_counted(config, decoder)


@functools.partial(jax.jit, static_argnums=0)
def train(decoder, params, tokens):
    """The loss of predicting each row's tokens backwards, its gradients, and the logits."""

    def loss(params):
        losses = decoder.apply({"params": params}, tokens, tokens[:, ::-1], method="losses")
        return losses.mean(), decoder.apply({"params": params}, tokens)

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradients, logits


def has_gradients(config, gradients, tokens):
    """Every array of every layer has one, and every token that is there."""
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        names = [entry.key for entry in path]
        assert np.isfinite(gradient).all(), names
        if "block" in names or "router" in names:
            continue  # of a router, which may let in no tokens, or too few to choose among
        if names == ["embedding"] and not config.tie_embeddings:
            assert (gradient[np.unique(tokens)] != 0).any(axis=1).all()
        elif not cancels(config, names):
            layers = gradient.shape[0] if "blocks" in names else 1
            assert (gradient.reshape(layers, -1) != 0).any(axis=1).all(), names


def cancels(config, names):
    """Whether softmax cancels what a parameter adds: the same to the scores of all keys."""
    if names[-2:] != ["key", "bias"] or config.position == "rope" or config.qk_norm:
        return False
    block = next(name for name in names if name.startswith("block_"))
    return config.attention_pattern[int(block.removeprefix("block_"))] in MASKED


def is_causal(config, logits_of, tokens, before):
    for t in range(config.context_length):
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % config.vocab_size
        after = logits_of(changed)
        assert after[0, :t].tobytes() == before[0, :t].tobytes()
        assert after[1].tobytes() == before[1].tobytes()
        assert (after[0, t] != before[0, t]).any()


def costs_what_is_counted(config, decoder):
    params = shapes(config)
    assert analysis.parameters(config)["total"] == sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(params)
    )
    decoder = Decoder(dataclasses.replace(config, attention_implementation="reference"))
    tokens = jax.ShapeDtypeStruct((BATCH, config.context_length), jnp.int32)

    def total(params, tokens):
        return jnp.sum(decoder.apply({"params": params}, tokens))

    length = config.context_length
    forward = analysis.forward_flops(config, length, dense=True)["total"] - sums(config, length)
    assert products(jax.make_jaxpr(total)(params, tokens).jaxpr) == BATCH * forward
    gradient = jax.make_jaxpr(jax.grad(total))(params, tokens)
    assert products(gradient.jaxpr) == BATCH * (3 * forward - not_learned(config))
