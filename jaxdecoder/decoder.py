"""The decoder: embed, body, head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdecoder.config import ConfigError, ModelConfig
from jaxdecoder.kernels.cross_entropy import cross_entropy, head_logits
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.layers import serial, stacks
from jaxdecoder.layers.cache import Cache, Caches, Cursor
from jaxdecoder.layers.depth import Passed, exits_of
from jaxdecoder.layers.linear import Weights, embedding_initializer
from jaxdecoder.layers.positions import POSITIONS


class Layout(NamedTuple):
    """How the layers between embedding and head are wired.

    body: (config, dtype, unrolled) -> module from (x, positions, caches, cursor, dropout) to
        what the head sees and the extended caches, or to a whole `Passed`. One that has exits takes
        the head too, as a function from features to logits.
    unroll: (params, config) -> the body's parameters as `unrolled` takes them.
    empty_caches: (config, batch, dtype) -> the body's caches with nothing in them.
    width: (config) -> the width of what the head sees.
    """

    body: Callable[..., Any]
    unroll: Callable[[Any, ModelConfig], Any]
    empty_caches: Callable[[ModelConfig, int, Any], Caches]
    width: Callable[[ModelConfig], int]


LAYOUTS: dict[str, Layout] = {
    "serial": Layout(serial.Serial, serial.unroll, serial.empty_caches, lambda c: c.d_model),
    "parallel_stacks": Layout(
        stacks.ParallelStacks, stacks.unroll, stacks.empty_caches, stacks.width
    ),
}


class Decoder(nn.Module):
    """A decoder-only language model. `dtype` is that of its compute; parameters are float32.

    `unrolled` takes parameters as `unroll_params` lays them out for decoding. The residual stream
    after each block is sown as an intermediate.
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
        self.body = LAYOUTS[c.layout].body(c, self.dtype, self.unrolled)
        if not c.tie_embeddings:
            width = LAYOUTS[c.layout].width(c)
            self.head = Weights(c, width, c.vocab_size, c.head_bias, name="head")

    def __call__(
        self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None
    ) -> Float[Array, "batch time vocab"]:
        """Logits for the token after each of `tokens`."""
        return self.logits(self.features(tokens, dropout=dropout))

    def losses(
        self,
        tokens: Int[Array, "batch time"],
        targets: Int[Array, "batch time"],
        *,
        dropout: Rate | None = None,
    ) -> Float[Array, "batch time"]:
        """What training minimises at each of `tokens`, in nats: the loss of the next token.

        In training (see `features`) those of early exits have their shares in it, and the routers
        of a mixture of depths add theirs.
        """
        passed = self._pass(tokens, dropout)
        share = 1.0 - sum(share for share, _ in passed.exits)
        losses = share * self._cross_entropy(passed.features, targets)
        for share, features in passed.exits:
            losses += share * self._cross_entropy(features, targets)
        return losses + passed.penalty

    def features(
        self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None
    ) -> Float[Array, "batch time width"]:
        """What the head sees. `dropout`: the share to drop in training; None outside it."""
        return self._pass(tokens, dropout).features

    def _pass(self, tokens: Int[Array, "batch time"], dropout: Rate | None) -> Passed:
        c = self.config
        if tokens.shape[1] > c.context_length:
            raise ConfigError(
                "model.context_length", c.context_length, f"{tokens.shape[1]} tokens do not fit"
            )
        positions = jnp.arange(tokens.shape[1])[None]
        x = self._embed(tokens, positions)
        return Passed(*self.body(x, positions, None, None, dropout))

    def _cross_entropy(
        self, features: Float[Array, "batch time width"], targets: Int[Array, "batch time"]
    ) -> Float[Array, "batch time"]:
        softcap = self.config.logit_softcap
        return cross_entropy(features, *self._head(), targets, logit_softcap=softcap)

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
        positions = cache.cursor.query_positions(time)
        x = self._embed(tokens, positions)
        unbound = self.clone(parent=None, name=None)
        head = functools.partial(unbound.apply, self.variables, method="logits")
        asks = (head,) if len(exits_of(self.config)) > 1 else ()
        passed = Passed(*self.body(x, positions, cache.layers, cache.cursor, None, *asks))
        logits = passed.logits
        if logits is None:
            logits = self.logits(passed.features[:, -1:] if last else passed.features)
        cursor = Cursor(cache.cursor.length + time, cache.cursor.start)
        assert passed.caches is not None
        return logits, Cache(cursor, passed.caches)

    def logits(
        self, features: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time vocab"]:
        """The head, in float32 from its products on."""
        return head_logits(features, *self._head(), logit_softcap=self.config.logit_softcap)

    def _head(self) -> tuple[Float[Array, "width vocab"], Float[Array, " vocab"] | None]:
        return (self.embedding.T, None) if self.config.tie_embeddings else self.head()

    def _embed(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "#batch time"]
    ) -> Float[Array, "batch time d_model"]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        if self.positions is not None:
            x = x + self.positions(positions).astype(self.dtype)
        return x


def unroll_params(params: Any, config: ModelConfig) -> Any:
    """The parameters of a decoder as those of the same decoder with `unrolled`."""
    return {**params, "body": LAYOUTS[config.layout].unroll(params["body"], config)}


def empty_cache(config: ModelConfig, batch: int, *, dtype: Any = jnp.float32) -> Cache:
    """A cache that has seen nothing."""
    cursor = Cursor(np.zeros((), np.int32), jnp.zeros((batch,), jnp.int32))
    return Cache(cursor, LAYOUTS[config.layout].empty_caches(config, batch, dtype))
