"""The decoder: embed, body, head."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture, ConfigError, ModelConfig
from jaxdecoder.kernels.cross_entropy import cross_entropy, head_logits
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.kernels.packing import Packed, straight_through
from jaxdecoder.layers import copying
from jaxdecoder.layers.body import Layout, Passed
from jaxdecoder.layers.cache import Cache, Cursor
from jaxdecoder.layers.copying import Copying
from jaxdecoder.layers.linear import Kernel, Weights, embedding_initializer, scheme_of
from jaxdecoder.layers.positions import POSITIONS
from jaxdecoder.layers.serial import SERIAL
from jaxdecoder.layers.stacks import STACKS
from jaxdecoder.typing import Params

LAYOUTS: dict[str, Layout] = {"serial": SERIAL, "parallel_stacks": STACKS}


class Decoder(nn.Module):
    """A decoder-only language model. `dtype` is that of its compute; parameters are float32.

    `unrolled` takes parameters as `unroll_params` lays them out for decoding. The residual stream
    after each block is sown as an intermediate.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    unrolled: bool = False

    @property
    def architecture(self) -> Architecture:
        """The config, resolved."""
        return self.config.resolve()

    def setup(self) -> None:
        c = self.architecture
        self.embedding: Weights | Float[Array, "vocab d_model"]
        if c.packed and c.quantizes_head:
            self.embedding = Weights(c, c.d_model, c.vocab_size, False, name="embedding")
        else:
            self.embedding = self.param(
                "embedding", embedding_initializer(c), (c.vocab_size, c.d_model), jnp.float32
            )
        embed = POSITIONS[c.position].embed
        self.positions = embed(c, name="positions") if embed else None
        self.body = LAYOUTS[c.layout].body(c, self.dtype, self.unrolled)
        self.copying = Copying(c, self.dtype, name="copying") if c.copying else None
        if not c.tie_embeddings:
            width = LAYOUTS[c.layout].width(c)
            self.head = Weights(c, width, c.vocab_size, c.head_bias, name="head")

    def __call__(
        self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None
    ) -> Float[Array, "batch time vocab"]:
        """Return the logits for the token after each of `tokens`."""
        return self.logits(self.features(tokens, dropout=dropout))

    def losses(
        self,
        tokens: Int[Array, "batch time"],
        targets: Int[Array, "batch time"],
        *,
        dropout: Rate | None = None,
    ) -> Float[Array, "batch time"]:
        """Return what training minimises at each of `tokens`, in nats: the loss of the next token.

        In training (see `features`) those of early exits have their shares in it, and the routers
        of a mixture of depths add theirs.
        """
        passed = self.passed(tokens, dropout=dropout)
        first, *others = (
            share * self._cross_entropy(features, targets) for share, features in passed.heads
        )
        return sum(others, first) + passed.penalty

    def features(
        self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None
    ) -> Float[Array, "batch time width"]:
        """Return what the head sees. `dropout`: the share to drop in training; None outside it."""
        return self.passed(tokens, dropout=dropout).features

    def passed(self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None) -> Passed:
        """Return all that the body says of `tokens`, exits and penalty included; see `features`."""
        c = self.config
        if tokens.shape[1] > c.context_length:
            raise ConfigError(
                "model.context_length", c.context_length, f"{tokens.shape[1]} tokens do not fit"
            )
        positions = jnp.arange(tokens.shape[1])[None]
        rows = self._rows(tokens)
        passed = self.body(self._placed(rows, positions), positions, None, None, dropout)
        if self.copying is None:
            return passed
        return passed._replace(features=self.copying(passed.features, rows, positions)[0])

    def _cross_entropy(
        self, features: Float[Array, "batch time width"], targets: Int[Array, "batch time"]
    ) -> Float[Array, "batch time"]:
        kernel, bias = self._head()
        whole = kernel.dequantized() if isinstance(kernel, Packed) else kernel
        softcap = self.config.logit_softcap
        return cross_entropy(features, whole, bias, targets, logit_softcap=softcap)

    def extend(
        self, tokens: Int[Array, "batch time"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Array, "batch _ vocab"], Cache]:
        """Return logits for `tokens` that follow what the cache holds, and the cache with them.

        `last`: logits after the last token only, (batch, 1, vocab).
        """
        if not self.unrolled:
            unrolled = self.clone(unrolled=True, parent=None, name=None)
            params = unroll_params(self.variables["params"], self.config)
            return unrolled.bind({"params": params}).extend(tokens, cache, last=last)
        time = tokens.shape[1]
        positions = cache.cursor.query_positions(time)
        rows = self._rows(tokens)
        x = self._placed(rows, positions)
        layers, own = (cache.layers, None) if self.copying is None else cache.layers
        unbound, variables = self.clone(parent=None, name=None), self.variables

        def head(features: Float[Array, "batch time width"]) -> Float[Array, "batch time vocab"]:
            return unbound.bind(variables).logits(features)

        passed = self.body(x, positions, layers, cache.cursor, None, head)
        if self.copying is not None:
            features, kept = self.copying(passed.features, rows, positions, own, cache.cursor)
            passed = passed._replace(features=features, caches=(passed.caches, kept))
        logits = passed.logits
        if logits is None:
            logits = self.logits(passed.features[:, -1:] if last else passed.features)
        cursor = Cursor(cache.cursor.length + time, cache.cursor.start)
        assert passed.caches is not None
        return logits, Cache(cursor, passed.caches)

    def logits(
        self, features: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time vocab"]:
        """Apply the head, in float32 from its products on."""
        return head_logits(features, *self._head(), logit_softcap=self.config.logit_softcap)

    def _head(self) -> tuple[Kernel, Float[Array, " vocab"] | None]:
        if not self.config.tie_embeddings:
            return self.head()
        table = self._table()
        return (table if isinstance(table, Packed) else table.T), None

    def _table(self) -> Float[Array, "vocab d_model"] | Packed:
        """Return the embedding; packed, a kernel d_model -> vocab, whose columns are its rows."""
        table = self.embedding
        if isinstance(table, Weights):
            kernel, _ = table()
            return kernel
        if self.config.quantizes_head:
            return straight_through(scheme_of(self.config), table.T).T
        return table

    def _rows(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time d_model"]:
        """Return the tokens' rows of the embedding."""
        table = self._table()
        x = table.columns(tokens) if isinstance(table, Packed) else jnp.take(table, tokens, axis=0)
        return x.astype(self.dtype)

    def _placed(
        self, x: Float[Array, "batch time d_model"], positions: Int[Array, "#batch time"]
    ) -> Float[Array, "batch time d_model"]:
        """Return what the body sees of these rows."""
        return x if self.positions is None else x + self.positions(positions).astype(self.dtype)


def unroll_params(params: Params, config: ModelConfig) -> Params:
    """Return the parameters of a decoder as those of the same decoder with `unrolled`."""
    return {**params, "body": LAYOUTS[config.layout].unroll(params["body"], config.resolve())}


def empty_cache(config: ModelConfig, batch: int, *, dtype: DTypeLike = jnp.float32) -> Cache:
    """Return a cache that has seen nothing."""
    c = config.resolve()
    cursor = Cursor(np.zeros((), np.int32), jnp.zeros((batch,), jnp.int32))
    layers = LAYOUTS[c.layout].empty_caches(c, batch, dtype)
    if c.copying:
        layers = (layers, copying.empty_cache(c, batch, dtype))
    return Cache(cursor, layers)
