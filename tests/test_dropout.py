"""Dropout drops its share, anew each time, and scales what it keeps."""

import dataclasses
import functools

import jax
import numpy as np
from models import random_params, random_tokens, small

from jaxdecoder import Decoder


class TestDropout:
    # Without residuals and norms a block's output is that of its last dropout.
    CONFIG = small(
        residual=False,
        norm_placement="none",
        position="none",
        context_length=64,
        d_model=32,
        d_ff=32,
    )

    @staticmethod
    @functools.partial(jax.jit, static_argnums=(0, 3))
    def blocks(decoder, params, tokens, dropout, key):
        _, state = decoder.apply(
            {"params": params},
            tokens,
            dropout=dropout,
            rngs={"dropout": key},
            mutable=["intermediates"],
        )
        return state["intermediates"]["body"]["blocks"]["after_block_0"][0]

    def test_drops_its_share_anew_for_every_key_row_and_layer(self):
        decoder, params = Decoder(self.CONFIG), random_params(self.CONFIG)
        tokens = np.tile(random_tokens(self.CONFIG, 1, 64), (2, 1))
        once = self.blocks(decoder, params, tokens, 0.25, jax.random.key(0))
        again = self.blocks(decoder, params, tokens, 0.25, jax.random.key(0))
        other = self.blocks(decoder, params, tokens, 0.25, jax.random.key(1))
        assert once.shape == (2, 2, 64, 32)
        np.testing.assert_array_equal(once, again)
        dropped, dropped_then = once == 0, other == 0
        # Shares over 8,192 values have a standard deviation of 0.005 at most.
        for share in dropped[0].mean(), dropped[1].mean():
            assert abs(share - 0.25) < 0.025
        independent = 0.25**2
        for a, b in (
            (dropped, dropped_then),
            (dropped[0], dropped[1]),
            (dropped[:, 0], dropped[:, 1]),
            (dropped[:, :, 1:], dropped[:, :, :-1]),
            (dropped[..., 1:], dropped[..., :-1]),
        ):
            assert abs((a & b).mean() - independent) < 0.025

    def test_scales_what_it_keeps_and_does_nothing_outside_training(self):
        config = dataclasses.replace(self.CONFIG, n_layers=1, feed_forward=False)
        tokens = random_tokens(config, 2, 64)
        decoder, params = Decoder(config), random_params(config)
        key = jax.random.key(0)
        # One token has but one attention weight, dropped or scaled, then the output is.
        full = self.blocks(decoder, params, tokens[:, :1], None, key)[0]
        np.testing.assert_array_equal(
            full, self.blocks(decoder, params, tokens[:, :1], 0.0, key)[0]
        )
        assert (np.asarray(full) != 0).all()

    def test_keeps_the_mean(self):
        config = dataclasses.replace(
            self.CONFIG, n_layers=1, feed_forward=False, attention_projection=False, d_head=8
        )
        decoder, params = Decoder(config), random_params(config)
        tokens = random_tokens(config, 1, 8)
        full = self.blocks(decoder, params, tokens, None, jax.random.key(0))[0]
        keys = jax.random.split(jax.random.key(0), 500)
        noisy = np.stack([self.blocks(decoder, params, tokens, 0.25, key)[0] for key in keys])
        error = noisy.mean(0) - full
        standard_error = noisy.std(0) / np.sqrt(len(keys))
        assert np.abs(error / standard_error).max() < 5
        assert np.sqrt(np.mean((error / standard_error) ** 2)) < 1.5
