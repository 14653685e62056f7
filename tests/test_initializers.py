"""First weights have the distributions that their initialiser names."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdecoder import Decoder
from jaxdecoder.config import Config, ConfigError, ModelConfig, choices
from jaxdecoder.training.runs import check_beginning


class TestInitializers:
    CONFIG = ModelConfig(
        vocab_size=300,
        context_length=80,
        d_model=64,
        n_layers=3,
        n_heads=4,
        d_ff=100,
        d_head=20,
        qkv_bias=True,
        head_bias=True,
        init_std=0.05,
    )

    def init(self, initializer):
        config = dataclasses.replace(self.CONFIG, initializer=initializer)
        init = jax.jit(Decoder(config).init)
        # XLA has an operation for the bits of this kind of key: the others take seconds to compile.
        key = jax.random.key(0, impl="unsafe_rbg")
        return init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def leaves(self, params):
        """(where, name, values by layer) of every array."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            names = [entry.key for entry in path]
            layers = leaf if "blocks" in names else leaf[None]
            for layer in layers:
                yield names[-2] if len(names) > 1 else "", names[-1], np.asarray(layer)

    def check(self, params, kernel_std, bias_bound, embedding_std, bounded):
        for where, name, values in self.leaves(params):
            if name == "scale":
                assert (values == 1).all()
            elif name == "embedding":
                assert abs(values.std() / embedding_std - 1) < 0.05
                assert abs(values.mean()) < 0.1 * embedding_std
            elif name == "kernel":
                std = kernel_std(where, values.shape[0])
                assert abs(values.std() / std - 1) < 0.05, where
                assert abs(values.mean()) < 0.1 * std
                if bounded:
                    assert 0.98 < np.abs(values).max() / (std * np.sqrt(3)) <= 1.0001
                else:
                    assert np.abs(values).max() > 3 * std
            elif name == "bias":
                bound = 0.0 if where.endswith("norm") else bias_bound(where)
                assert np.abs(values).max() <= bound
                assert np.abs(values).max() >= 0.9 * bound

    def test_normal_draws_every_matrix_alike(self):
        self.check(self.init("normal"), lambda *_: 0.05, lambda _: 0.0, 0.05, False)

    def test_scaled_divides_what_is_added_to_the_residual_stream(self):
        def std(where, fan_in):
            return 0.05 / np.sqrt(2 * 3) if where in ("out", "down") else 0.05

        self.check(self.init("scaled"), std, lambda _: 0.0, 0.05, False)

    def test_uniform_fan_in_is_the_default_of_pytorch(self):
        fan_in = {"out": 80, "down": 100}
        self.check(
            self.init("uniform_fan_in"),
            lambda where, rows: 1 / np.sqrt(3 * rows),
            lambda where: fan_in.get(where, 64) ** -0.5,
            1.0,
            True,
        )

    def test_draw_every_layer_and_matrix_by_itself_and_by_the_key(self):
        config = dataclasses.replace(self.CONFIG, norm="none", bias=False, feed_forward=False)
        init = jax.jit(Decoder(config).init)
        params, other = (
            init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"] for seed in (0, 1)
        )
        first, second = (tree["body"]["blocks"]["block_0"]["attention"] for tree in (params, other))
        kernels = [first[name]["kernel"][i] for name in ("query", "key", "value") for i in (0, 1)]
        other = second["query"]["kernel"][0]
        draws = np.stack([np.ravel(kernel) for kernel in [*kernels, other]])
        correlation = np.corrcoef(draws) - np.eye(len(draws))
        assert np.abs(correlation).max() < 0.1


COMBINATIONS = [
    (initializer, tie, layout, norm)
    for initializer, tie, layout, norm in itertools.product(
        choices(ModelConfig, "initializer"),
        (False, True),
        choices(ModelConfig, "layout"),
        choices(ModelConfig, "norm"),
    )
    if not (tie and (initializer == "uniform_fan_in" or layout == "parallel_stacks"))  # refused
]


@pytest.mark.slow
@pytest.mark.parametrize(("initializer", "tie", "layout", "norm"), COMBINATIONS)
def test_a_new_model_knows_nothing_rather_than_something_wrong(initializer, tie, layout, norm):
    assert first_loss(initializer, tie, layout, norm) == pytest.approx(math.log(257), abs=1.5)


def test_a_new_model_with_pytorchs_weights_knows_nothing():
    loss = first_loss("uniform_fan_in", False, "serial", "layernorm")
    assert loss == pytest.approx(math.log(257), abs=1.5)


def first_loss(initializer, tie, layout, norm):
    config = ModelConfig(
        vocab_size=257,
        context_length=32,
        d_model=128,
        n_layers=2,
        n_heads=4,
        initializer=initializer,
        tie_embeddings=tie,
        layout=layout,
        norm=norm,
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 33), 0, 257)
    decoder, inputs = Decoder(config), tokens[:, :-1]
    params = jax.jit(decoder.init)(jax.random.key(0, impl="unsafe_rbg"), inputs)
    logits = jax.jit(decoder.apply)(params, inputs)
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean())


def test_embeddings_too_large_for_a_head_are_refused():
    with pytest.raises(ConfigError, match=r"model\.initializer.*model\.tie_embeddings = true"):
        check_beginning(
            Config(model=ModelConfig(initializer="uniform_fan_in", tie_embeddings=True))
        )
