"""Update rules and schedules against their definitions."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import tree_leaves_with_path as leaves_with_path

from jaxdecoder.config import Config, OptimizerConfig, TrainConfig
from jaxdecoder.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    block_matrices,
    hyperparameters_of,
    make_optimizer,
    make_schedule,
    round_at_random,
)

PARAMS = {
    "embedding": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3),
    "blocks": {
        "up": {
            "kernel": jnp.sin(jnp.arange(2 * 3 * 5.0)).reshape(2, 3, 5),
            "bias": jnp.ones((2, 5)),
        },
        "norm": {"scale": jnp.ones((2, 3))},
    },
}
GRADS = jax.tree.map(lambda x: jnp.cos(3 * x) + 0.1, PARAMS)


def one_update(config, grads=GRADS, steps=100):
    optimizer = make_optimizer(config, hyperparameters(config, steps))
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, PARAMS)


def hyperparameters(config, steps):
    """Those of a run with this optimiser."""
    return hyperparameters_of(Config(optimizer=config, train=TrainConfig(steps=steps)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_rises_linearly_and_ends_where_it_should(schedule):
    config = OptimizerConfig(
        schedule=schedule, learning_rate=2.0, warmup_steps=10, final_fraction=0.25
    )
    rate = make_schedule(config, 110, config.learning_rate)
    for step in range(10):
        assert float(rate(step)) == pytest.approx(2.0 * (step + 1) / 10)
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(110)) == pytest.approx(2.0 if schedule == "constant" else 0.5)


def test_schedules_between_their_ends():
    config = OptimizerConfig(learning_rate=2.0, final_fraction=0.25, decay_fraction=0.2)

    def at(schedule, step):
        changed = dataclasses.replace(config, schedule=schedule)
        return float(make_schedule(changed, 100, changed.learning_rate)(step))

    for step in (0, 20, 50, 99):
        share = step / 100
        wave = 0.25 + 0.75 * (1 + math.cos(math.pi * share)) / 2
        assert at("cosine", step) == pytest.approx(2 * wave, rel=1e-5)
        assert at("linear", step) == pytest.approx(2 - 1.5 * share, rel=1e-5)
        assert at("wsd", step) == pytest.approx(2 - 1.5 * max(0, share - 0.8) / 0.2, rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_only(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, schedule="constant", weight_decay=0.0)
    plain = one_update(config)
    decayed = one_update(dataclasses.replace(config, weight_decay=0.5))
    difference = jax.tree.map(lambda a, b: a - b, decayed, plain)
    for path, change in jax.tree_util.tree_leaves_with_path(difference):
        parameter = PARAMS
        for entry in path:
            parameter = parameter[entry.key]
        decays = path[-1].key in ("kernel", "embedding")
        expected = -0.1 * 0.5 * parameter if decays else jnp.zeros_like(parameter)
        np.testing.assert_allclose(change, expected, atol=2e-6)


# By optimizer, where its state has an array for one matrix or a number for all.
STATES = {
    "adamw": "[1][0].count [1][0].mu [1][0].nu [1][2].count",
    "muon": "[1][0].inner_states['adam'].inner_state[0].count "
    "[1][0].inner_states['adam'].inner_state[2].count "
    "[1][0].inner_states['muon'].inner_state[0].count "
    "[1][0].inner_states['muon'].inner_state[0].mu "
    "[1][0].inner_states['muon'].inner_state[0].ns_coeffs "
    "[1][0].inner_states['muon'].inner_state[3].count "
    "[1][1].inner_state.count [1][2].inner_state.count",
    "lion": "[1][0].count [1][0].mu [1][2].count",
    "adafactor": "[1][0][0].count [1][0][0].v_row [1][0][0].v_col [1][0][0].v [1][0][2].count "
    "[1][1].inner_state.count",
    "sgd": "[1][0][0].trace [1][0][1].count [1][1].inner_state.count",
}


@pytest.mark.parametrize("name", STATES)
def test_states_keep_the_places_that_checkpoints_have(name):
    config = OptimizerConfig(name=name)
    optimizer = make_optimizer(config, hyperparameters(config, 10))
    state = leaves_with_path(optimizer.init({"up": {"kernel": jnp.ones((2, 3))}}))
    places = [jax.tree_util.keystr(path).removesuffix("['up']['kernel']") for path, _ in state]
    assert places == STATES[name].split()


def test_adamw_is_the_published_rule():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", gradient_clip=0.0)
    optimizer = make_optimizer(config, hyperparameters(config, 100))
    state, params = optimizer.init(PARAMS), PARAMS
    g, x = np.asarray(GRADS["embedding"], np.float64), np.asarray(PARAMS["embedding"], np.float64)
    m, v = np.zeros_like(g), np.zeros_like(g)
    for t in range(1, 4):
        updates, state = optimizer.update(GRADS, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        x = x - 0.1 * (step + 0.1 * x)
    np.testing.assert_allclose(params["embedding"], x, rtol=1e-5)


def test_muon_orthogonalises_each_layer_by_itself():
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0, gradient_clip=0.0
    )
    update = one_update(config)["blocks"]["up"]["kernel"]
    for layer in update:
        values = np.linalg.svd(np.asarray(layer), compute_uv=False)
        # Five Newton-Schulz steps bring singular values near 1, times sqrt(fan_out / fan_in).
        assert np.all(np.abs(values / math.sqrt(5 / 3) - 1) < 0.35)


def test_muon_moves_every_kernel_but_the_heads():
    params = {
        "head": {"kernel": jnp.ones((2, 3))},
        "stack": {"feed_forward": {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}},
        "embedding": jnp.ones((3, 2)),
    }
    chosen = block_matrices(params)
    assert [path[-2].key for path, is_one in leaves_with_path(chosen) if is_one] == ["up"]


def test_muon_moves_what_is_no_block_matrix_at_adams_rate():
    slow, fast = (
        one_update(
            OptimizerConfig(
                name="muon",
                learning_rate=1.0,
                adam_learning_rate=rate,
                schedule="constant",
                weight_decay=0.0,
            )
        )
        for rate in (0.01, 0.02)
    )
    chex.assert_trees_all_close(fast["embedding"], 2 * slow["embedding"], rtol=1e-5)
    chex.assert_trees_all_close(fast["blocks"]["norm"], _double(slow["blocks"]["norm"]), rtol=1e-5)
    chex.assert_trees_all_equal(fast["blocks"]["up"]["kernel"], slow["blocks"]["up"]["kernel"])
    # Adam's first step is the rate itself, which Nesterov's look-ahead lengthens by less than half.
    assert 0.01 <= float(jnp.abs(slow["embedding"]).max()) < 0.015


def _double(tree):
    return jax.tree.map(lambda x: 2 * x, tree)


def test_clipping_bounds_the_norm_of_all_gradients_together():
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, beta1=0.0, schedule="constant", weight_decay=0.0
    )
    large = jax.tree.map(lambda g: 100 * g, GRADS)
    update = one_update(dataclasses.replace(config, gradient_clip=0.5), large)
    norm = math.sqrt(sum(float(jnp.sum(u * u)) for u in jax.tree.leaves(update)))
    assert norm == pytest.approx(0.5, rel=1e-5)
    free = one_update(dataclasses.replace(config, gradient_clip=0.0), large)
    chex.assert_trees_all_close(free, jax.tree.map(jnp.negative, large), rtol=1e-6)


def test_adafactor_remembers_less_than_adam():
    wide = {"up": {"kernel": jnp.ones((256, 512))}}

    def remembered(name):
        config = OptimizerConfig(name=name)
        state = make_optimizer(config, hyperparameters(config, 10)).init(wide)
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert remembered("adafactor") < 0.02 * remembered("adamw")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_in_bfloat16_take_half_and_lead_the_same_way(name):
    def run(state_dtype):
        config = OptimizerConfig(
            name=name, learning_rate=0.01, schedule="constant", state_dtype=state_dtype
        )
        optimizer = make_optimizer(config, hyperparameters(config, 100))

        def step(carry, _):
            state, params = carry
            updates, state = optimizer.update(GRADS, state, params)
            return (state, optax.apply_updates(params, updates)), None

        first = optimizer.init(PARAMS), PARAMS
        return jax.jit(lambda carry: jax.lax.scan(step, carry, length=5)[0])(first)

    exact, rough = run("float32"), run("bfloat16")
    large = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.size > 1)
        for state, _ in (exact, rough)
    ]
    assert large[1] == large[0] / 2
    # A part in 256 of a step; lion's is the sign of a sum, Muon's a root of its matrix.
    chex.assert_trees_all_close(exact[1], rough[1], atol=5 * 0.01 * 0.05)


def test_rounding_at_random_keeps_the_mean_and_takes_neighbours_only():
    x = jnp.asarray([1 + 2**-10, -(1 + 2**-9), 3.0, 0.0, -1e-30, jnp.inf], jnp.float32)
    rows = jnp.tile(x, (20_000, 1))
    rounded = np.asarray(round_at_random(rows, jnp.uint32(3)), np.float64)
    assert set(rounded[:, 0]) == {1.0, 1 + 2**-7}
    assert set(rounded[:, 1]) == {-1.0, -(1 + 2**-7)}
    for column in (2, 3, 5):
        assert (rounded[:, column] == x[column]).all()
    # Shares of 1/8 and 1/4 over 20,000 draws have a standard deviation of 0.003 of the step.
    np.testing.assert_allclose(rounded[:, :2].mean(0), x[:2], atol=5 * 0.0031 * 2**-7, rtol=0)
    other = np.asarray(round_at_random(rows, jnp.uint32(4)), np.float64)
    assert 0.1 < (rounded[:, 1] != other[:, 1]).mean() < 0.6


def test_a_slow_average_in_bfloat16_does_not_stand_still():
    config = OptimizerConfig(
        schedule="constant", beta2=0.999, gradient_clip=0.0, state_dtype="bfloat16"
    )
    optimizer = make_optimizer(config, hyperparameters(config, 100))
    params = {"up": {"kernel": jnp.zeros((32, 32))}}

    def step(state, scale):
        grads = jax.tree.map(lambda x: x + scale, params)
        return optimizer.update(grads, state, params)[1], None

    # From 1 the average of squares falls by a part in 1,000 a step, once the gradients are 0.
    scales = jnp.concatenate([jnp.full(1, 31.6227766), jnp.zeros(500)])
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, scales))(optimizer.init(params))
    (nu,) = (x.nu for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))
    mean = float(np.mean(np.asarray(nu["up"]["kernel"], np.float64)))
    assert mean == pytest.approx(0.999**500, rel=0.02)


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)
