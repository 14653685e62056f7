"""Decoding: a decoder and its parameters, prepared once, read tokens with a cache.

    session = prepare(decoder, params)
    read = session.prefill(prompts)                  # logits after the prompts, and a cache
    read = session.extend(tokens, read.cache)        # logits after each of these tokens

All of it is pure. A session and a cache are trees of arrays, so they pass through `jit`, `vmap`,
`scan` and `while_loop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxdecoder.config import ModelConfig
from jaxdecoder.decoder import LAYOUTS, Decoder, Read
from jaxdecoder.kernels.device import current_device
from jaxdecoder.layers import copying, tree
from jaxdecoder.layers.cache import Cache, Cursor
from jaxdecoder.typing import Params


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["decoder"])
@dataclass(frozen=True)
class Session:
    """A decoder with its parameters laid out for decoding; made by `prepare`."""

    decoder: Decoder
    params: Params

    def empty_cache(self, rows: int) -> Cache:
        """Return a cache for so many texts that has seen nothing."""
        return empty_cache(self.decoder.config, rows, dtype=self.decoder.dtype)

    def prefill(
        self,
        tokens: Int[Array, "batch time"],
        start: Int[Array, "batch"] | None = None,
        *,
        last: bool = True,
    ) -> Read:
        """Read texts from their beginning.

        Rows are padded on the left: the first real token of each is in column `start`, which is 0
        if left out. `last`: logits after the last token only, (batch, 1, vocab).
        """
        cache = self.empty_cache(tokens.shape[0])
        if start is not None:
            cache = cache._replace(cursor=Cursor(cache.cursor.length, start))
        return self.extend(tokens, cache, last=last)

    def extend(self, tokens: Int[Array, "batch time"], cache: Cache, *, last: bool = False) -> Read:
        """Read tokens that follow what the cache holds."""
        read: Read = self.decoder.apply(  # type: ignore[assignment]  # Flax forgets the method
            {"params": self.params}, tokens, cache, last=last, method="extend"
        )
        return read


def prepare(decoder: Decoder, params: Params) -> Session:
    """Lay out a decoder's parameters for decoding, which reads all of them for every token."""
    layout = LAYOUTS[decoder.config.layout]
    params = {**params, tree.BODY: layout.unroll(params[tree.BODY])}
    return Session(decoder, tree.turned(params) if current_device().platform == "cpu" else params)


def empty_cache(config: ModelConfig, batch: int, *, dtype: DTypeLike = jnp.float32) -> Cache:
    """Return a cache that has seen nothing."""
    c = config.resolve()
    cursor = Cursor(np.zeros((), np.int32), jnp.zeros((batch,), jnp.int32))
    layers = LAYOUTS[c.layout].empty_caches(c, batch, dtype)
    if c.copying:
        layers = (layers, copying.empty_cache(c, batch, dtype))
    return Cache(cursor, layers)
