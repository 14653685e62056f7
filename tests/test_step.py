"""The pure train step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import logits_of

from jaxdecoder.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxdecoder.data.batches import Batch
from jaxdecoder.training.evaluation import bigram_loss, bits_per_byte, make_evaluator
from jaxdecoder.training.step import (
    evaluated_params,
    fuse,
    init_state,
    make_decoder,
    make_step,
)

CONFIG = Config(
    model=ModelConfig(
        vocab_size=11, context_length=8, d_model=16, n_layers=2, n_heads=2, norm="none", bias=False
    ),
    optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant"),
    train=TrainConfig(batch_size=4),
)


def a_batch(seed: int, weights: bool = True) -> Batch:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 11, (4, 9)).astype(np.int32)
    kept = draw.integers(0, 2, (4, 8)) if weights else np.ones((4, 8))
    return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], kept.astype(np.float32))))


def with_train(**changes) -> Config:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


@functools.cache
def step_of(config: Config):
    """Its compiled step, one for all tests."""
    return jax.jit(make_step(config))


@functools.cache
def first_state(config: Config):
    return jax.jit(functools.partial(init_state, config))()


def test_the_loss_is_the_mean_over_real_targets_in_nats():
    state, batch = first_state(CONFIG), a_batch(0)
    logits = logits_of(make_decoder(CONFIG), state.params, batch.inputs)
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    weights = np.asarray(batch.weights, np.float64)
    expected = ((log_z - chosen) * weights).sum() / weights.sum()
    _, metrics = step_of(CONFIG)(state, batch)
    assert float(metrics.train_loss) == pytest.approx(expected, rel=1e-5)
    assert make_evaluator(make_decoder(CONFIG))(state.params, [batch]) == pytest.approx(
        expected, rel=1e-5
    )


def test_what_is_padding_changes_nothing():
    batch = a_batch(1)
    other = batch._replace(targets=jnp.where(batch.weights > 0, batch.targets, 0))
    step, state = step_of(CONFIG), first_state(CONFIG)
    chex.assert_trees_all_equal(step(state, batch), step(state, other))


def test_the_gradient_is_that_of_the_mean_whatever_its_tokens_weigh():
    batch = a_batch(1)
    twice = batch._replace(weights=2 * batch.weights)
    step, state = step_of(CONFIG), first_state(CONFIG)
    chex.assert_trees_all_close(step(state, batch)[1], step(state, twice)[1], rtol=1e-5)


def test_accumulated_parts_equal_the_whole():
    state, batch = first_state(CONFIG), a_batch(2)
    whole, whole_metrics = step_of(CONFIG)(state, batch)
    parts, parts_metrics = step_of(with_train(gradient_accumulation=4))(state, batch)
    chex.assert_trees_all_close(whole_metrics, parts_metrics, rtol=1e-5)
    chex.assert_trees_all_close(whole.optimizer, parts.optimizer, atol=1e-6)


def test_fused_steps_equal_single_ones():
    batches = [a_batch(seed) for seed in range(3)]
    state = first_state(CONFIG)
    singles = []
    for batch in batches:
        state, metrics = step_of(CONFIG)(state, batch)
        singles.append(metrics)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    fused, metrics = jax.jit(fuse(make_step(CONFIG)))(first_state(CONFIG), stacked)
    chex.assert_trees_all_close(fused, state, atol=1e-6)
    chex.assert_trees_all_close(metrics, jax.tree.map(lambda *x: jnp.stack(x), *singles), rtol=1e-5)


NOISY = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, dropout=0.5),
    optimizer=dataclasses.replace(CONFIG.optimizer, ema_decay=0.75),
)


def test_the_average_of_the_weights_follows_them():
    before = first_state(NOISY)
    after, _ = step_of(NOISY)(before, a_batch(3))
    chex.assert_trees_all_close(
        evaluated_params(after),
        jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, before.params, after.params),
        atol=1e-7,
    )
    assert evaluated_params(first_state(CONFIG)) is not None


def test_dropout_differs_by_step_and_repeats_by_seed():
    step, batch, state = step_of(NOISY), a_batch(4), first_state(NOISY)
    first = step(state, batch)[1].train_loss
    again = step(state, batch)[1].train_loss
    later = step(state._replace(step=state.step + 1), batch)[1].train_loss
    assert first == again
    assert first != later


def test_weights_depend_on_the_seed_alone():
    a, b = first_state(CONFIG), first_state(with_train(batch_size=8))
    chex.assert_trees_all_equal(a.params, b.params)
    c = first_state(with_train(seed=2))
    assert not np.array_equal(a.params["embedding"], c.params["embedding"])


def test_bfloat16_compute_stays_near_float32():
    batch = a_batch(5, weights=False)
    state = first_state(CONFIG)
    _, full = step_of(CONFIG)(state, batch)
    after, half = step_of(with_train(compute_dtype="bfloat16"))(state, batch)
    assert float(half.train_loss) == pytest.approx(float(full.train_loss), rel=1e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))


def test_bits_per_byte_of_uniform_guessing():
    # A uniform guess among 256 bytes, one token a byte, costs 8 bits.
    assert bits_per_byte(math.log(256), tokens=1000, n_bytes=1000) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=500, n_bytes=1000) == pytest.approx(4)


def test_the_bigram_model_is_the_smoothed_table_of_pairs():
    draw = np.random.default_rng(0)
    train, validation = draw.integers(0, 5, 200), draw.integers(0, 6, 50)
    losses = []
    for a, b in itertools.pairwise(validation):
        followers = [y for x, y in itertools.pairwise(train) if x == a]
        kinds = max(1, len(set(followers)))
        unigram = (np.sum(train == b) + 1) / (len(train) + 6)
        probability = (followers.count(b) + kinds * unigram) / (len(followers) + kinds)
        losses.append(-math.log(probability))
    assert bigram_loss(train, validation, 6) == pytest.approx(np.mean(losses))
