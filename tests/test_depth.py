"""Dynamic depth: what is trained, what is decoded, and what is left uncomputed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import random_params, random_tokens, slow, small

from jaxdecoder import Decoder
from jaxdecoder.config import ConfigError
from jaxdecoder.data.batches import Batch
from jaxdecoder.decoding import empty_cache, prepare
from jaxdecoder.layers.depth import CONFIDENCES, DEPTHS, exits_of
from jaxdecoder.training.evaluation import decoded_losses

TIME, PREFILLED = 8, 3
EARLY = small(depth="early_exit", n_layers=4, exit_threshold=0.3, position="rope")
EARLY_CONFIGS = [
    EARLY,
    dataclasses.replace(EARLY, exit_minimum=2, exit_every=2, n_layers=5, norm_placement="post"),
    dataclasses.replace(
        EARLY,
        exit_confidence="margin",
        exit_threshold=0.1,
        exit_every=2,
        norm_placement="parallel",
        n_kv_heads=2,
    ),
    dataclasses.replace(
        EARLY,
        attention=("sliding_window", "longformer"),
        position="alibi",
        norm="rmsnorm",
        tie_embeddings=True,
        exit_threshold=0.6,
    ),
]
MIXED = small(depth="mixture_of_depths", n_layers=4, position="rope")
MIXED_CONFIGS = [
    MIXED,
    dataclasses.replace(MIXED, mod_every=1, n_layers=2, mod_capacity=0.9),
    dataclasses.replace(
        MIXED,
        attention=("full", "fixed_sparse"),
        mod_every=4,
        position="t5",
        residual=False,
        norm_placement="sandwich",
    ),
]


def name_of(config):
    """Its place among the configs here."""
    return f"{config.depth} {(EARLY_CONFIGS + MIXED_CONFIGS).index(config)}"


@functools.cache
def model(config):
    return Decoder(config), random_params(config)


@functools.partial(jax.jit, static_argnums=0)
def step(decoder, params, tokens, cache):
    """Logits, the cache and the depth of tokens that follow what the cache holds."""
    return prepare(decoder, params).extend(tokens, cache)


def decode(config, tokens, at_once=PREFILLED):
    """Logits and depths (batch, time): some tokens at once, the others one by one."""
    decoder, params = model(config)
    logits, cache, _ = step(decoder, params, tokens[:, :at_once], empty_cache(config, len(tokens)))
    parts, depths = [logits], []
    for t in range(at_once, tokens.shape[1]):
        logits, cache, depth = step(decoder, params, tokens[:, t : t + 1], cache)
        parts.append(logits)
        depths.append(depth)
    return np.concatenate(parts, 1), np.stack(depths, 1)


def close(actual, expected):
    size = max(1.0, float(np.sqrt(np.mean(np.square(expected)))))
    np.testing.assert_allclose(actual / size, expected / size, atol=1e-4, rtol=0)


class TestStoppingEarly:
    @pytest.mark.parametrize("config", [EARLY, *slow(*EARLY_CONFIGS[1:])], ids=name_of)
    def test_is_what_the_naive_decoder_does_row_by_row(self, config):
        """Logits and depths, of rows that stop at different depths in one batch, past the context
        too: what a token finds of those that stopped before is what they stopped with."""
        tokens = random_tokens(config, 3, 2 * TIME, seed=1)
        logits, depths = decode(config, tokens)
        _, params = model(config)
        for row in range(3):
            expected, passed = naive.decode_stopping(config, params, tokens[row], PREFILLED, TIME)
            assert depths[row].tolist() == passed[PREFILLED:]
            close(logits[row], expected)
        assert len(np.unique(depths)) == len(exits_of(config))
        assert (depths.min(axis=0) < depths.max(axis=0)).any()

    def test_differs_from_stopping_nowhere(self):
        tokens = random_tokens(EARLY, 3, TIME)
        early, _ = decode(EARLY, tokens, at_once=1)
        full, depths = decode(dataclasses.replace(EARLY, exit_threshold=1.0), tokens, at_once=1)
        assert (depths == 4).all()
        assert np.abs(early - full).max() > 0.01

    def test_leaves_uncomputed_what_lies_above(self):
        """Of the two ways of every conditional, one has no product but those of keys and values."""
        decoder, params = model(EARLY)
        cache = empty_cache(EARLY, 1)
        traced = jax.make_jaxpr(step.__wrapped__, static_argnums=0)(
            decoder, params, random_tokens(EARLY, 1, 1), cache
        )
        found = [e for e in equations(traced.jaxpr) if e.primitive.name == "cond"]
        kinds = [tuple(len(products(branch)) for branch in e.params["branches"]) for e in found]
        # Query, key, value, scores, values mixed, out, up, down; and the head.
        assert kinds == [(2, 8 + 1)] * 4

    def test_of_one_row_waits_for_no_other(self):
        """A batch's rows are those of batches of one."""
        tokens = random_tokens(EARLY, 3, TIME, seed=1)
        logits, depths = decode(EARLY, tokens, at_once=1)
        for row in range(3):
            alone, depth = decode(EARLY, tokens[row : row + 1], at_once=1)
            assert depth[0].tolist() == depths[row].tolist()
            close(alone[0], logits[row])


def equations(jaxpr):
    """Those of a traced program and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def products(branch):
    """The matrix products that a branch's results need."""
    jaxpr = branch.jaxpr
    needed = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            needed |= {v for v in equation.invars if not hasattr(v, "val")}
            kept.append(equation)
    return [
        e
        for top in kept
        for e in [top, *(x for j in jaxprs_of(top) for x in equations(j))]
        if e.primitive.name == "dot_general"
    ]


def jaxprs_of(equation):
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if is_jaxpr(leaf)]


class TestConfidence:
    def test_is_the_probability_or_its_margin(self):
        logits = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0], [-9.0, -9.0, 40.0]], np.float32)
        for name, confidence in CONFIDENCES.items():
            config = small(depth="early_exit", exit_confidence=name)
            expected = [naive.confidence(config, row.astype(np.float64)) for row in logits]
            np.testing.assert_allclose(confidence(jnp.asarray(logits)), expected, atol=1e-6)


class TestTraining:
    @pytest.mark.parametrize(
        "config",
        [EARLY_CONFIGS[1], MIXED_CONFIGS[2], *slow(EARLY_CONFIGS[0], *MIXED_CONFIGS[:2])],
        ids=name_of,
    )
    def test_minimises_what_the_naive_decoder_says(self, config):
        params, tokens = random_params(config), random_tokens(config, 2, TIME + 1, seed=3)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        losses, full = training_losses(Decoder(config), params, inputs, targets)
        for row in range(2):
            close(losses[row], naive.training_losses(config, params, inputs[row], targets[row]))
            logits = naive.decode(config, params, inputs[row])
            close(full[row], naive.cross_entropy(logits, targets[row]))
        assert np.abs(losses - full).max() > 1e-3

    def test_gives_exits_shares_that_grow_with_depth_and_are_one_together(self):
        config = small(depth="early_exit", n_layers=7, exit_minimum=2, exit_every=2)
        assert exits_of(config) == pytest.approx({2: 2 / 19, 4: 4 / 19, 6: 6 / 19, 7: 7 / 19})
        flat = dataclasses.replace(config, exit_loss_power=0.0)
        assert exits_of(flat) == pytest.approx({2: 1 / 4, 4: 1 / 4, 6: 1 / 4, 7: 1 / 4})

    ROUTED = small(depth="mixture_of_depths", mod_loss_weight=1.0, mod_capacity=0.25)

    @pytest.mark.parametrize(
        "config", [small(depth="early_exit"), ROUTED, *slow(EARLY, MIXED)], ids=lambda c: c.depth
    )
    def test_gives_every_parameter_a_gradient(self, config):
        tokens = random_tokens(config, 4, TIME + 1)
        gradients = training_gradients(Decoder(config), random_params(config), tokens)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            assert np.isfinite(gradient).all(), path
            assert (np.asarray(gradient) != 0).mean() > 0.4, path

    def test_teaches_routers_to_choose_as_many_tokens_by_themselves(self):
        config = self.ROUTED
        params, tokens = random_params(config), random_tokens(config, 4, TIME + 1)
        decoder = Decoder(config)
        for _ in range(40):
            gradients = training_gradients(decoder, params, tokens)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        apply = jax.jit(functools.partial(decoder.apply, mutable=["intermediates"]))
        _, seen = apply({"params": params}, tokens[:, :-1])
        taken = seen["intermediates"]["body"]["blocks"]["block_1"]["taken"][0]
        assert abs(np.mean(taken) - 0.25) < 0.1


@functools.partial(jax.jit, static_argnums=0)
def training_losses(decoder, params, inputs, targets):
    """What training minimises, and the loss when nothing is trained."""
    apply = functools.partial(decoder.apply, {"params": params}, inputs, targets, method="losses")
    return apply(dropout=0.0), apply()


@functools.partial(jax.jit, static_argnums=0)
def training_gradients(decoder, params, tokens):
    def loss(params):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return jnp.mean(training_losses.__wrapped__(decoder, params, inputs, targets)[0])

    return jax.grad(loss)(params)


class TestDecodedLosses:
    def test_are_those_of_tokens_that_stop_early(self):
        tokens = random_tokens(EARLY, 2, TIME + 1, seed=2)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        params = random_params(EARLY)
        batch = Batch(inputs, targets, np.ones(inputs.shape, np.float32))
        losses, depths = decoded_losses(Decoder(EARLY), params, batch)
        for row in range(2):
            logits, passed = naive.decode_stopping(EARLY, params, inputs[row])
            close(losses[row], naive.cross_entropy(logits, targets[row]))
            assert depths[row].tolist() == passed
        assert 1 < np.mean(depths) < 4

    def test_of_a_fixed_depth_are_those_of_the_full_pass(self):
        config = dataclasses.replace(EARLY, depth="fixed")
        tokens = random_tokens(config, 2, TIME + 1)
        params, decoder = random_params(config), Decoder(config)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, TIME), np.float32))
        losses, depths = decoded_losses(decoder, params, batch)
        _, full = training_losses(decoder, params, batch.inputs, batch.targets)
        close(losses, full)
        assert (depths == 4).all()


class TestRouted:
    def test_blocks_are_the_last_of_every_so_many(self):
        config = small(depth="mixture_of_depths", n_layers=6, mod_every=3)
        assert DEPTHS["mixture_of_depths"].routed(config) == (False, False, True)
        blocks = random_params(config)["body"]["blocks"]
        assert [sorted(blocks[f"block_{i}"]) == ["block", "router"] for i in range(3)] == [
            False,
            False,
            True,
        ]

    def test_blocks_that_take_no_token_are_skipped_and_keep_their_cache(self):
        """A block whose weights are all not a number leaves no trace where it takes nothing."""
        decoder, params = model(MIXED)
        tokens = random_tokens(MIXED, 1, 1)
        routed = params["body"]["blocks"]["block_1"]
        for bias, taken in (-100.0, False), (100.0, True):
            router = {**routed["router"], "bias": jnp.full((2, 1), bias)}
            broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), routed["block"])
            blocks = {**params["body"]["blocks"], "block_1": {"router": router, "block": broken}}
            changed = {**params, "body": {**params["body"], "blocks": blocks}}
            before = empty_cache(MIXED, 1)
            logits, cache, _ = step(decoder, changed, tokens, before)
            assert bool(np.isnan(logits).any()) == taken
            assert np.isnan(cache.layers[1].layer[0].k).any() == taken
            assert bool(cache.layers[1].taken[0, 0]) == taken

    def test_blocks_compute_their_capacity_alone_in_training(self):
        config = small(depth="mixture_of_depths", mod_capacity=0.25, vocab_size=5)
        inputs = random_tokens(config, 2, TIME)
        traced = jax.make_jaxpr(training_losses.__wrapped__, static_argnums=0)(
            Decoder(config), random_params(config), inputs, inputs
        )
        rows = [
            e.outvars[0].aval.shape[0]
            for e in equations(traced.jaxpr)
            if e.primitive.name == "dot_general" and e.outvars[0].aval.shape[-1] == config.d_ff
        ]
        # In training a full block and a routed one; then both of them with all tokens.
        assert sorted(rows) == [2 * 2, 2 * TIME, 2 * TIME, 2 * TIME]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"depth": "early_exit", "exit_minimum": 2}, r"model\.exit_minimum.*at most 1"),
            ({"depth": "early_exit", "n_layers": 1}, r"model\.exit_minimum.*no exit"),
            ({"depth": "mixture_of_depths", "n_layers": 3}, r"model\.mod_every.*\[1, 3\]"),
        ],
    )
    def test_name_the_key_and_what_would_do(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            small(**changes)
