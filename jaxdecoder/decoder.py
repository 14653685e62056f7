"""The decoder: embed, body, head."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture, ConfigError, ModelConfig
from jaxdecoder.kernels.cross_entropy import cross_entropy, head_logits
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.kernels.mesh import split
from jaxdecoder.kernels.packing import Packed, straight_through
from jaxdecoder.layers.body import Layout, Passed
from jaxdecoder.layers.cache import Cache, Cursor
from jaxdecoder.layers.copying import Copying
from jaxdecoder.layers.linear import Kernel, Weights, embedding_initializer, scheme_of
from jaxdecoder.layers.positions import POSITIONS
from jaxdecoder.layers.serial import SERIAL
from jaxdecoder.layers.stacks import STACKS

LAYOUTS: dict[str, Layout] = {"serial": SERIAL, "parallel_stacks": STACKS}


HeadWeights = tuple[Kernel, Float[Array, " vocab"] | None]
"""Kernel and bias of the head."""


class Read(NamedTuple):
    """What a decoder says of tokens that it reads with a cache."""

    logits: Float[Array, "batch _ vocab"]
    """After each token, or after the last."""
    cache: Cache
    """With the tokens in it."""
    depth: Int[Array, "batch"] | None = None
    """Blocks that a single token passed, where it may stop early."""


class Decoder(nn.Module):
    """A decoder-only language model. `dtype` is that of its compute; parameters are float32.

    The residual stream after each block is sown as an intermediate. To decode with a cache, see
    `decoding.py`.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

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
        self.body = LAYOUTS[c.layout].body(c, self.dtype)
        self.copying = Copying(c, self.dtype, name="copying") if c.copying else None
        if not c.tie_embeddings:
            width = LAYOUTS[c.layout].width(c)
            self.head = Weights(c, width, c.vocab_size, c.head_bias, name="head")

    def __call__(
        self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None
    ) -> Float[Array, "batch time vocab"]:
        """Return logits for the token after each of `tokens`."""
        return self.logits(self.features(tokens, dropout=dropout))

    def losses(
        self,
        tokens: Int[Array, "batch time"],
        targets: Int[Array, "batch time"],
        *,
        dropout: Rate | None = None,
    ) -> Float[Array, "batch time"]:
        """Return the loss of the token after each of `tokens`, in nats.

        In training (see `features`) early exits have their shares in it, and the routers of a
        mixture of depths add their loss.
        """
        passed = self.passed(tokens, dropout=dropout)
        first, *others = (
            share * self._cross_entropy(features, targets) for share, features in passed.heads
        )
        return sum(others, first) + passed.penalty

    def features(
        self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None
    ) -> Float[Array, "batch time width"]:
        """Return the input of the head. `dropout`: the share to drop in training, else None."""
        return self.passed(tokens, dropout=dropout).features

    def passed(self, tokens: Int[Array, "batch time"], *, dropout: Rate | None = None) -> Passed:
        """Return all outputs of the body, exits and penalty included; see `features`."""
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

    def extend(self, tokens: Int[Array, "batch time"], cache: Cache, *, last: bool = False) -> Read:
        """Read `tokens` that follow what the cache holds; see `decoding.Session`.

        The parameters are those that `decoding.prepare` lays out. `last`: logits after the last
        token only, (batch, 1, vocab).
        """
        time = tokens.shape[1]
        positions = cache.cursor.query_positions(time)
        rows = self._rows(tokens)
        x = self._placed(rows, positions)
        layers, own = (cache.layers, None) if self.copying is None else cache.layers
        head = partial(_logits, head=self._head(), softcap=self.config.logit_softcap)
        passed = self.body(x, positions, layers, cache.cursor, None, head)
        features, caches = passed.features, passed.caches or ()
        if self.copying is not None:
            features, kept = self.copying(features, rows, positions, own, cache.cursor)
            caches = (caches, kept)
        logits = passed.logits
        if logits is None:
            logits = head(features[:, -1:] if last else features)
        cursor = Cursor(cache.cursor.length + time, cache.cursor.start)
        return Read(logits, Cache(cursor, caches), passed.depth)

    def logits(
        self, features: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time vocab"]:
        """Return the logits of these features, in float32 from the head's products on."""
        return _logits(features, head=self._head(), softcap=self.config.logit_softcap)

    def _head(self) -> HeadWeights:
        if not self.config.tie_embeddings:
            return self.head()
        table = self._table()
        return (table if isinstance(table, Packed) else table.T), None

    def _table(self) -> Float[Array, "vocab d_model"] | Packed:
        """Return the embedding; if packed, as a kernel d_model -> vocab, its rows as columns."""
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
        return split(x.astype(self.dtype), "batch", "tokens", None)

    def _placed(
        self, x: Float[Array, "batch time d_model"], positions: Int[Array, "#batch time"]
    ) -> Float[Array, "batch time d_model"]:
        """Return these rows with their positions added, if positions are added."""
        return x if self.positions is None else x + self.positions(positions).astype(self.dtype)


def _logits(
    features: Float[Array, "batch time width"], *, head: HeadWeights, softcap: float | None
) -> Float[Array, "batch time vocab"]:
    logits = head_logits(features, *head, logit_softcap=softcap)
    return split(logits, "batch", "tokens", "vocabulary")
