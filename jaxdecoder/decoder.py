"""The decoder: embed, blocks, head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.config import ConfigError, ModelConfig
from jaxdecoder.layers.block import Block
from jaxdecoder.layers.cache import Cache, Caches, Cursor, LayerCache
from jaxdecoder.layers.linear import embedding_initializer, linear, product
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
        caches: Caches | None,
        cursor: Cursor | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time d_model"], Caches | None]:
        """The residual stream after these blocks, and their caches, one a block."""
        extended: list[Any] = []
        for i, mechanism in enumerate(self.config.attention_pattern):
            block = Block(self.config, mechanism, self.dtype, name=f"block_{i}")
            layer = None if caches is None else caches[i]
            x, layer = block(x, positions, layer, cursor, deterministic)
            self.sow("intermediates", f"after_block_{i}", x)
            extended.append(layer)
        return x, None if caches is None else tuple(extended)


class Decoder(nn.Module):
    """A decoder-only language model. `dtype` is that of its compute; parameters are float32.

    The blocks' parameters are stacked along a leading layer axis (`nn.scan`), so one layout serves
    every depth and removing a layer is a slice. Decoding reads every weight for every token, and a
    slice would be a copy: `unrolled` takes them as `unroll_params` lays them out, each its own
    array. The residual stream after each block is sown as an intermediate.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    unrolled: bool = False

    def setup(self) -> None:
        c = self.config.resolve()
        if c.vocab_size is None:
            raise ConfigError("model.vocab_size", None, "the decoder needs to know it")
        self.embedding = self.param(
            "embedding", embedding_initializer(c), (c.vocab_size, c.d_model), jnp.float32
        )
        embed = POSITIONS[c.position].embed
        self.positions = embed(c, name="positions") if embed else None
        if self.unrolled:
            self.blocks: Any = [
                Period(c, self.dtype, name=f"blocks_{i}") for i in range(periods(c))
            ]
        else:
            self.blocks = nn.scan(
                Period,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=periods(c),
                unroll=periods(c) if jax.default_backend() == "cpu" else 1,
            )(c, self.dtype, name="blocks")
        self.final_norm = NORMS[c.norm](c, self.dtype, name="final_norm")
        if not c.tie_embeddings:
            self.head = linear(
                c,
                c.d_model,
                c.vocab_size,
                bias=c.head_bias,
                dtype=self.dtype,
                out_dtype=jnp.float32,
                name="head",
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
        c = self.config
        if tokens.shape[1] > c.context_length:
            raise ConfigError(
                "model.context_length", c.context_length, f"{tokens.shape[1]} tokens do not fit"
            )
        positions = jnp.arange(tokens.shape[1])[None]
        x = self._embed(tokens, positions)
        for period in self.blocks if self.unrolled else [self.blocks]:
            x, _ = period(x, positions, None, None, deterministic)
        return self.final_norm(x)

    def extend(
        self, tokens: Int[Array, "batch time"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Array, "batch _ vocab"], Cache]:
        """Logits for `tokens` that follow what the cache holds, and the cache with them in it.

        `last`: logits after the last token only, (batch, 1, vocab).
        """
        if not self.unrolled:
            unrolled = self.clone(unrolled=True, parent=None, name=None)
            params = unroll_params(self.variables["params"], self.config)
            extended_by: Any = unrolled.apply(
                {"params": params}, tokens, cache, last=last, method="extend"
            )
            return extended_by
        time = tokens.shape[1]
        x = self._embed(tokens, cache.cursor.query_positions(time))
        layers: list[LayerCache] = []
        turn = len(self.config.attention_pattern)
        for i, period in enumerate(self.blocks):
            held = cache.layers[i * turn : (i + 1) * turn]
            x, extended = period(x, cache.cursor.query_positions(time), held, cache.cursor, True)
            layers += extended
        cursor = Cursor(cache.cursor.length + time, cache.cursor.start)
        x = x[:, -1:] if last else x
        return self.logits(self.final_norm(x)), Cache(cursor, tuple(layers))

    def logits(
        self, features: Float[Array, "batch time d_model"]
    ) -> Float[Array, "batch time vocab"]:
        """The head, in float32 from its products on."""
        c = self.config
        if c.tie_embeddings:
            kernel = self.embedding.T.astype(self.dtype)
            logits = product(features, kernel, preferred_element_type=jnp.float32)
        else:
            logits = self.head(features)
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits

    def _embed(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "#batch time"]
    ) -> Float[Array, "batch time d_model"]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        if self.positions is not None:
            x = x + self.positions(positions).astype(self.dtype)
        return x


def periods(config: ModelConfig) -> int:
    """How often the attention pattern repeats over the depth."""
    return config.n_layers // len(config.attention_pattern)


def unroll_params(params: Any, config: ModelConfig) -> Any:
    """The parameters of a decoder as those of the same decoder with `unrolled`."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    for i in range(periods(config)):
        rest[f"blocks_{i}"] = jax.tree.map(lambda stacked, i=i: stacked[i], params["blocks"])
    return rest


def empty_cache(config: ModelConfig, batch: int, *, dtype: Any = jnp.float32) -> Cache:
    """A cache that has seen nothing, with room for context_length tokens."""
    c = config.resolve()
    shape = (batch, c.n_kv_heads, c.context_length, c.d_head)
    cursor = Cursor(jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))
    layers = [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))] * c.n_layers
    return Cache(cursor, tuple(layers))
