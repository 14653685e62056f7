"""The decoder: embed, blocks, head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.config import ConfigError, ModelConfig
from jaxdecoder.layers.block import Block
from jaxdecoder.layers.cache import Cache, Cursor, LayerCache
from jaxdecoder.layers.linear import embedding_initializer, linear
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS


class Period(nn.Module):
    """One turn of the attention pattern: as many blocks as the pattern has mechanisms."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        cache: LayerCache | None,
        cursor: Cursor | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time d_model"], LayerCache | None]:
        """The residual stream after these blocks, and their caches stacked."""
        caches = []
        for i, mechanism in enumerate(self.config.attention_pattern):
            block = Block(self.config, mechanism, self.dtype, name=f"block_{i}")
            layer = None if cache is None else LayerCache(cache.k[i], cache.v[i])
            x, layer = block(x, positions, layer, cursor, deterministic)
            self.sow("intermediates", f"block_{i}", x)
            caches.append(layer)
        stacked = None if cache is None else jax.tree.map(lambda *c: jnp.stack(c), *caches)
        return x, stacked


class Decoder(nn.Module):
    """A decoder-only language model. `dtype` is that of its compute; parameters are float32.

    The blocks' parameters are stacked along a leading layer axis (`nn.scan`), so one layout serves
    every depth and removing a layer is a slice. The residual stream after each block is sown as an
    intermediate.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config.resolve()
        if c.vocab_size is None:
            raise ConfigError("model.vocab_size", None, "the decoder needs to know it")
        self.embedding = self.param(
            "embedding", embedding_initializer(c), (c.vocab_size, c.d_model), jnp.float32
        )
        embed = POSITIONS[c.position].embed
        self.positions = embed(c, name="positions") if embed else None
        periods = c.n_layers // len(c.attention_pattern)
        self.blocks = nn.scan(
            Period,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, nn.broadcast, nn.broadcast),
            length=periods,
            unroll=periods if jax.default_backend() == "cpu" else 1,
        )(c, self.dtype, name="blocks")
        self.final_norm = NORMS[c.norm](c, self.dtype, name="final_norm")
        if not c.tie_embeddings:
            self.head = linear(
                c, c.d_model, c.vocab_size, bias=c.head_bias, dtype=self.dtype, name="head"
            )

    def __call__(
        self, tokens: Int[Array, "batch time"], *, deterministic: bool = True
    ) -> Float[Array, "batch time vocab"]:
        """Logits for the token after each of `tokens`."""
        return self.logits(self.features(tokens, deterministic=deterministic))

    def features(
        self, tokens: Int[Array, "batch time"], *, deterministic: bool = True
    ) -> Float[Array, "batch time d_model"]:
        """What the head sees: the normalised residual stream after the last block."""
        positions = jnp.arange(tokens.shape[1])[None]
        features, _ = self._run(tokens, positions, None, None, deterministic)
        return features

    def extend(
        self, tokens: Int[Array, "batch time"], cache: Cache
    ) -> tuple[Float[Array, "batch time vocab"], Cache]:
        """Logits for `tokens` that follow what the cache holds, and the cache with them in it."""
        time = tokens.shape[1]
        positions = cache.cursor.query_positions(time)
        features, layers = self._run(tokens, positions, cache.layers, cache.cursor, True)
        assert layers is not None
        cursor = Cursor(cache.cursor.length + time, cache.cursor.start)
        return self.logits(features), Cache(cursor, layers)

    def logits(
        self, features: Float[Array, "batch time d_model"]
    ) -> Float[Array, "batch time vocab"]:
        """The head, in float32 from its products on."""
        c = self.config
        if c.tie_embeddings:
            logits = features @ self.embedding.T.astype(self.dtype)
        else:
            logits = self.head(features)
        logits = logits.astype(jnp.float32)
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits

    def _run(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "#batch time"],
        layers: LayerCache | None,
        cursor: Cursor | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time d_model"], LayerCache | None]:
        c = self.config
        if layers is None and tokens.shape[1] > c.context_length:
            raise ConfigError(
                "model.context_length", c.context_length, f"{tokens.shape[1]} tokens do not fit"
            )
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        if self.positions is not None:
            x = x + self.positions(positions).astype(self.dtype)
        x, layers = self.blocks(x, positions, layers, cursor, deterministic)
        return self.final_norm(x), layers


def empty_cache(config: ModelConfig, batch: int, *, dtype: Any = jnp.float32) -> Cache:
    """A cache that has seen nothing, with room for context_length tokens."""
    c = config.resolve()
    pattern = len(c.attention_pattern)
    shape = (c.n_layers // pattern, pattern, batch, c.context_length, c.n_kv_heads, c.d_head)
    cursor = Cursor(jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))
    return Cache(cursor, LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
